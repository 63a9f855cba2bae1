"""Answers questions from a folder of texts: an embedder finds passages, a cross-encoder sorts them, a reader points at the answer.

foveate serve --model embed=PATH --model rank=PATH --model read=PATH
python examples/ask_documents.py --folder notes --question "Who repaired the bridge?"

embed: a BERT without a head, rank: one that classifies into one class, read: one for question answering. What the folder holds is
embedded once for each run. Python's standard library is all that this needs.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

SUFFIXES = {".txt", ".md"}


class Server:
    def __init__(self, url: str, key: str) -> None:
        self._url, self._headers = url, {"content-type": "application/json", "authorization": f"Bearer {key}"}

    def post(self, path: str, **body: Any) -> Any:
        try:
            with urlopen(Request(self._url + path, json.dumps(body).encode(), self._headers)) as response:
                return json.load(response)
        except HTTPError as error:
            raise SystemExit(f"{path}: {json.load(error)['error']['message']}") from None

    def embed(self, texts: list[str]) -> list[list[float]]:
        """In requests of 64."""
        found = []
        for i in range(0, len(texts), 64):
            found += [
                row["embedding"] for row in self.post("/v1/embeddings", model="embed", input=texts[i : i + 64])["data"]
            ]
        return found


def passages(folder: Path, words: int) -> list[tuple[str, str]]:
    """(file, text): the paragraphs of each file, put together up to so many words."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES):
        text: list[str] = []
        for paragraph in file.read_text(encoding="utf-8").split("\n\n"):
            if text and len(text) + len(paragraph.split()) > words:
                found.append((file.name, " ".join(text)))
                text = []
            text += paragraph.split()
        if text:
            found.append((file.name, " ".join(text)))
    return found


def similarity(a: list[float], b: list[float]) -> float:
    """The cosine."""
    length = (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
    return sum(x * y for x, y in zip(a, b)) / length if length else 0.0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none", help="one of --api-key-file, if the server has keys")
    parser.add_argument("--folder", type=Path, required=True, help=f"of files {', '.join(sorted(SUFFIXES))}")
    parser.add_argument("--question", action="append", dest="questions", metavar="TEXT", required=True)
    parser.add_argument("--words", type=int, default=120, help="of a passage; 120 by default")
    parser.add_argument("--nearest", type=int, default=20, help="passages that the embedder finds")
    parser.add_argument("--best", type=int, default=3, help="of them, that are read")
    args = parser.parse_args(argv)

    server, found = Server(args.url, args.key), passages(args.folder, args.words)
    if not found:
        raise SystemExit(f"{args.folder} has no text in files {', '.join(sorted(SUFFIXES))}")
    vectors = server.embed([text for _, text in found])
    for question, vector in zip(args.questions, server.embed(args.questions)):
        near = sorted(range(len(found)), key=lambda i: -similarity(vector, vectors[i]))[: args.nearest]
        texts = [found[i][1] for i in near]
        ranked = server.post("/v1/rerank", model="rank", query=question, documents=texts, top_n=args.best)["results"]
        read = [near[row["index"]] for row in ranked]
        answers = [
            (answer["score"], answer["answer"], found[i][0])
            for i in read
            for answer in server.post("/v1/answers", model="read", question=question, context=found[i][1], top_k=1)[
                "data"
            ]
        ]
        score, text, file = max(answers)
        print(f"> {question}\n{text}  ({file}, {score:.3f}; read: {', '.join(sorted({found[i][0] for i in read}))})\n")


if __name__ == "__main__":
    main()
