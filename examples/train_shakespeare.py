"""A small language model of characters, from scratch, on Shakespeare's plays.

    python examples/train_shakespeare.py tinyshakespeare.txt --output-dir shakespeare

The first 90 % of the text are learnt, the last 10 % are evaluated on. docs/guide/training.md has the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import foveate
from foveate.train import fit

MODEL = {
    "model_type": "llama",
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("shakespeare"))
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train, held_out = args.output_dir / "train.txt", args.output_dir / "held_out.txt"
    for file, part in ((train, text[:cut]), (held_out, text[cut:])):
        if not file.exists():  # written once, so that the tokens are found again
            file.write_text(part, encoding="utf-8")
    result = fit(
        new_model=MODEL, tokenizer="char", train_data=[train], eval_data=[held_out], output_dir=str(args.output_dir),
        max_steps=args.steps, batch_size=12, learning_rate=3e-3, beta2=0.99, weight_decay=0.1, warmup=100,
        schedule="linear", eval_every=400, precision="bf16", resume=args.resume,
    )  # fmt: skip
    print(f"{result.seconds:.0f} seconds, evaluation loss {result.best_loss:.4f} nats a character")
    llm = foveate.LLM(str(result.best))
    params = foveate.SamplingParams(max_tokens=200, temperature=0.8, seed=1)
    for output in llm.generate(["ROMEO:\n", "First Citizen:\n"], params):
        print("---\n" + output.prompt + output.outputs[0].text)


if __name__ == "__main__":
    main()
