"""Answers a question from a text: python examples/question_answering.py --model FOLDER --question "Who ...?" [--context FILE]

FOLDER: a BERT fine-tuned for question answering, as Hugging Face saves it (config.json, model.safetensors, tokenizer.json).
"""

import argparse
import sys
from pathlib import Path

import foveate

CONTEXT = """The Battle of Hastings was fought on 14 October 1066 between the Norman army of William, the Duke of Normandy, and an
English army under King Harold Godwinson. It took place seven miles northwest of Hastings and was a decisive Norman victory."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--question", default="When was the Battle of Hastings?")
    parser.add_argument("--context", type=Path, help="a text file; a paragraph on Hastings without it")
    parser.add_argument("--top-k", type=int, default=3)
    args = parser.parse_args()
    context = CONTEXT if args.context is None else args.context.read_text()
    try:
        answerer = foveate.QuestionAnswerer(args.model)
        found = answerer(args.question, context, top_k=args.top_k, handle_impossible_answer=True)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for answer in [found] if isinstance(found, dict) else found:
        text = answer["answer"] or "(the text does not say)"
        print(f"{answer['score']:6.3f}  characters {answer['start']}-{answer['end']}  {text}")


if __name__ == "__main__":
    main()
