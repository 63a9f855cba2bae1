"""What an editor's plugin does: sends what stands before and after the cursor to /infill, and shows the text between as it comes.

foveate serve --model path/to/code-model
python examples/editor_completion.py --file shapes.py --line 12 --column 5 --other colors.py

The model needs tokens for fill-in-the-middle, as Qwen Coder, StarCoder, CodeGemma and DeepSeek Coder have them. Python's standard
library is all that this needs.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

CODE = '''def area(width, height):
    """The area of a rectangle."""
    return ()

print(area(2, 3))
'''
CURSOR = (3, 13)


def split(text: str, line: int, column: int) -> tuple[str, str]:
    """What stands before the cursor and after it; both count from 1."""
    lines = text.splitlines(keepends=True)
    if not 1 <= line <= len(lines) + 1:
        raise SystemExit(f"--line {line} is outside the file, which has {len(lines)} lines")
    before = sum(map(len, lines[: line - 1]))
    width = len(lines[line - 1].rstrip("\n")) if line <= len(lines) else 0
    if not 1 <= column <= width + 1:
        raise SystemExit(f"--column {column} is outside line {line}, which has {width} characters")
    return text[: before + column - 1], text[before + column - 1 :]


def complete(url: str, key: str, body: dict) -> Iterator[str]:
    """The pieces of a stream of /infill, whose last event says "stop": true."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    try:
        with urlopen(Request(f"{url}/infill", json.dumps(body | {"stream": True}).encode(), headers)) as response:
            for event in response:
                if event.startswith(b"data: "):
                    found = json.loads(event[6:])
                    if "error" in found:
                        raise SystemExit(found["error"]["message"])
                    yield found["content"]
    except HTTPError as error:
        raise SystemExit(json.load(error)["error"]["message"]) from None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none", help="one of --api-key-file, if the server has keys")
    parser.add_argument("--file", type=Path, help="the file that is edited; a function of two lines without it")
    parser.add_argument("--line", type=int, default=CURSOR[0])
    parser.add_argument("--column", type=int, default=CURSOR[1])
    parser.add_argument(
        "--other", type=Path, action="append", default=[], help="another file of the project that the model may read"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    text = CODE if args.file is None else args.file.read_text(encoding="utf-8")
    before, after = split(text, args.line, args.column)
    body = {"input_prefix": before, "input_suffix": after, "n_predict": args.max_tokens, "temperature": 0}
    if args.other:
        body["input_extra"] = [{"filename": path.name, "text": path.read_text(encoding="utf-8")} for path in args.other]
    print(before, end="")
    for piece in complete(args.url, args.key, body):
        print(piece, end="", flush=True)
    print(after, end="")


if __name__ == "__main__":
    main()
