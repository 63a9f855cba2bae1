"""Learning from preferences beside TRL: the same rows, weights and settings in both; loss and gradients compared, then time and memory.

    python benchmarks/preferences.py check                       # losses and gradients, a small Llama in fp32, every objective
    python benchmarks/preferences.py steps [--objective dpo] [--steps 6] [--rounds 2] [--out benchmarks/results]

Needs `trl` (written for 1.16.0, pip install --no-deps trl==1.16.0), which the package and its tests do not; the version is in the output.
check: TRL's trainers compute the loss of one batch of their own collators; foveate reads the same file. ORPO, SimPO (CPO) and GKD are in
trl.experimental. steps: SmolLM2-135M's sizes, 2 pairs of 2 x 1024 tokens a step, all weights, each engine in a process of its own,
the two take turns; the first 2 steps of a process do not count. Both precompute the reference. Peak memory is that of the process.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM = 2
OBJECTIVES = ("dpo", "ipo", "hinge", "simpo", "orpo", "kto", "reward", "distill")
SMALL = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
    "vocab_size": 49152,
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("check", "steps", "worker"))
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--engine", choices=("foveate", "trl"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence, in steps")
    parser.add_argument("--out", type=Path, help="folder for preferences_<date>.csv")
    args = parser.parse_args()
    if args.what == "worker":
        print(json.dumps(timed(args)))
    elif args.what == "check":
        check(args.objective)
    else:
        steps(args)


# ---- rows and models ---------------------------------------------------------------------------------------------------------


def rows_of(objective: str, count: int, length: int) -> list[dict[str, Any]]:
    rng = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(rng.choices(LETTERS, k=tokens))

    low, high = max(2, length // 4), max(3, length // 2)
    rows = []
    for i in range(count):
        row: dict[str, Any] = {"prompt": text(length // 4) + ":"}
        answers = text(rng.randint(low, high)), text(rng.randint(low, high))
        if objective == "kto":
            row |= {"completion": answers[0], "label": i % 2 == 0}
        elif objective == "distill":
            row |= {"completion": answers[0]}
        else:
            row |= {"chosen": answers[0], "rejected": answers[1]}
            if objective == "reward":
                row["margin"] = 0.5 * (i % 3)
        rows.append(row)
    return rows


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def model_at(folder: Path, config: dict[str, Any], seed: int, objective: str = "causal-lm") -> str:
    """A random model of transformers' format with a tokenizer of letters."""
    from foveate.train import fit

    folder.mkdir()
    texts = folder / "texts.jsonl"
    row = (
        {"text": LETTERS + ":"}
        if objective == "causal-lm"
        else {"prompt": LETTERS + ":", "chosen": "a", "rejected": "b"}
    )
    texts.write_text(json.dumps(row) + "\n")
    result = fit(
        objective=objective, new_model=config, tokenizer="char", train_data=[str(texts)], output_dir=str(folder / "out"), max_steps=1,
        seed=seed, progress=False, cache_dir=str(folder / "cache"), learning_rate=1e-30,
    )  # fmt: skip
    return str(result.last)


# ---- foveate -----------------------------------------------------------------------------------------------------------------


def settings(objective: str, model: str, data: str, folder: Path, teacher: str | None) -> dict[str, Any]:
    kind = {"ipo": "dpo", "hinge": "dpo"}.get(objective, objective)
    found: dict[str, Any] = {
        "objective": kind, "model": model, "train_data": [data], "output_dir": str(folder / "run"), "progress": False,
        "cache_dir": str(folder / "cache"), "learning_rate": 1e-6,
    }  # fmt: skip
    if objective in ("dpo", "ipo", "hinge"):
        found["loss_type"] = {"dpo": "sigmoid"}.get(objective, objective)
    if objective == "distill":
        found |= {"teacher": teacher, "loss_type": "jsd", "beta": 0.5}
    return found


def ours(
    objective: str, model: str, start: str, data: str, folder: Path, teacher: str | None
) -> tuple[float, dict[str, Any]]:
    """The loss of all rows and its gradients at the weights of `model`, with the reference `start`."""
    from safetensors.torch import load_file

    from foveate.train import TrainConfig
    from foveate.train.data.plan import ExampleIndex
    from foveate.train.fitting import _open
    from foveate.train.objectives.base import Beginning

    config = TrainConfig(**settings(objective, start, data, folder, teacher))
    opened = _open(config)
    module, task, store = opened.trained.model, opened.objective, opened.train.store
    task.begin(Beginning(module, [(store, opened.train.examples)], folder, 4096, False, False))
    module.load_state_dict(load_file(Path(model) / "model.safetensors"), strict=False)
    module.requires_grad_(True).train()
    examples = opened.train.examples_of([ExampleIndex(i, 0) for i in range(len(store))])
    [batch] = task.batches(module, store, [examples], 0)
    task.prepare(module, [batch], lambda x: x)
    loss = task.learn(module, batch)[0] / batch.target_count
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in module.named_parameters()}


# ---- TRL ---------------------------------------------------------------------------------------------------------------------


def trainer_of(
    objective: str, model: str, start: str, rows: list[dict[str, Any]], folder: Path, teacher: str | None, **more: Any
) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    common: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": len(rows), "report_to": [], "use_cpu": True, "max_length": 4096,
        "learning_rate": 1e-6, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False, **more,
    }  # fmt: skip
    kind: Any = AutoModelForSequenceClassification if objective == "reward" else AutoModelForCausalLM
    policy = kind.from_pretrained(model, dtype="float32")
    data = Dataset.from_list(rows)
    if objective in ("dpo", "ipo", "hinge"):
        from trl import DPOConfig, DPOTrainer

        reference = kind.from_pretrained(start, dtype="float32")
        config = DPOConfig(
            **common,
            loss_type=["sigmoid" if objective == "dpo" else objective],
            beta=0.1,
            precompute_ref_log_probs=True,
        )
        return DPOTrainer(policy, reference, args=config, train_dataset=data, processing_class=tokenizer)
    if objective == "kto":
        from trl import KTOConfig, KTOTrainer

        reference = kind.from_pretrained(start, dtype="float32")
        config = KTOConfig(**common, beta=0.1, train_sampling_strategy="sequential")
        return KTOTrainer(policy, reference, args=config, train_dataset=data, processing_class=tokenizer)
    if objective == "reward":
        from trl import RewardConfig, RewardTrainer

        policy.config.pad_token_id = tokenizer.pad_token_id
        return RewardTrainer(policy, args=RewardConfig(**common), train_dataset=data, processing_class=tokenizer)
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer(policy, args=ORPOConfig(**common, beta=0.1), train_dataset=data, processing_class=tokenizer)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(**common, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)
    return CPOTrainer(policy, args=config, train_dataset=data, processing_class=tokenizer)


def theirs(
    objective: str, model: str, start: str, rows: list[dict[str, Any]], folder: Path, teacher: str | None
) -> tuple[float, dict[str, Any]]:
    if objective == "distill":
        return their_divergence(model, rows, teacher)
    trainer = trainer_of(objective, model, start, rows, folder, teacher)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in trainer.model.named_parameters()}


def their_divergence(model: str, rows: list[dict[str, Any]], teacher: str | None) -> tuple[float, dict[str, Any]]:
    """GKD's loss function on whole logits: its trainer also generates, which is another matter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    student, other = (AutoModelForCausalLM.from_pretrained(path, dtype="float32") for path in (model, teacher))
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"])["input_ids"] + [end]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            scores = other(ids).logits[:, :-1]
        logits = student(ids).logits[:, :-1]
        total = total + GKDTrainer.generalized_jsd_loss(logits, scores, labels[:, 1:], beta=0.5, reduction="sum")
        count += int((labels[:, 1:] != -100).sum())
    loss = total / count
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in student.named_parameters()}


# ---- comparisons -------------------------------------------------------------------------------------------------------------


def check(objectives: list[str]) -> None:
    import transformers
    import trl

    print(f"trl {trl.__version__}, transformers {transformers.__version__}; relative differences, fp32")
    for objective in objectives:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kind = "reward" if objective == "reward" else "causal-lm"
            start, model = (model_at(folder / str(seed), SMALL, seed, kind) for seed in (0, 1))
            teacher = model_at(folder / "2", SMALL | {"hidden_size": 96}, 2) if objective == "distill" else None
            rows = rows_of(objective, 4, 48)
            data = written(folder, rows)
            our_loss, our_gradients = ours(objective, model, start, data, folder, teacher)
            their_loss, their_gradients = theirs(objective, model, start, rows, folder, teacher)
        largest = max(float(g.abs().max()) for g in their_gradients.values() if g is not None)
        worst = max(
            float((our_gradients[n] - g).abs().max())
            for n, g in their_gradients.items()
            if g is not None and n in our_gradients
        )
        print(
            f"{objective:8} loss {our_loss:.7f} beside {their_loss:.7f} ({abs(our_loss / their_loss - 1):.1e}), "
            f"gradients {worst / largest:.1e} of the largest"
        )


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step of one engine, and the process's peak memory."""
    [objective] = args.objective
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kind = "reward" if objective == "reward" else "causal-lm"
        model = model_at(folder / "model", SMOLLM2, 0, kind)
        rows = rows_of(objective, 2, args.length)
        data = written(folder, rows)
        times: list[float] = []
        count = args.steps + WARM
        if args.engine == "foveate":
            from foveate.train import fit

            result = fit(
                **settings(objective, model, data, folder, None), max_steps=count, batch_size=2, packing=True, log_every=1,
                max_length=2 * args.length, save_every=count,
            )  # fmt: skip
            tokens = [row for row in result.history if "tokens_per_second" in row]
            times = [result.tokens / count / row["tokens_per_second"] for row in tokens]
        else:
            from transformers import TrainerCallback

            class Clock(TrainerCallback):
                def on_step_begin(self, *_: Any, **__: Any) -> None:
                    self.start = time.perf_counter()

                def on_step_end(self, *_: Any, **__: Any) -> None:
                    times.append(time.perf_counter() - self.start)

            trainer = trainer_of(objective, model, model, rows, folder, None, max_steps=count, logging_strategy="no")
            trainer.add_callback(Clock())
            trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": times[WARM:], "memory_mib": peak}


def steps(args: argparse.Namespace) -> None:
    import trl

    table = []
    for objective in args.objective:
        if objective == "distill":
            continue  # TRL's GKD generates in its steps
        found: dict[str, list[dict[str, Any]]] = {"foveate": [], "trl": []}
        for _ in range(args.rounds):
            for engine in found:
                command = [sys.executable, __file__, "worker", "--objective", objective, "--engine", engine]
                command += ["--steps", str(args.steps), "--length", str(args.length)]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                found[engine].append(json.loads(result.stdout.splitlines()[-1]))
        row: dict[str, Any] = {"objective": objective, "trl": trl.__version__, "tokens": args.length}
        for engine, runs in found.items():
            row[f"{engine}_seconds"] = round(statistics.median(s for run in runs for s in run["seconds"]), 3)
            row[f"{engine}_mib"] = round(max(run["memory_mib"] for run in runs))
        row["faster"] = round(row["trl_seconds"] / row["foveate_seconds"], 2)
        table.append(row)
        print(row)
    if args.out:
        file = args.out / f"preferences_{time.strftime('%Y-%m-%d')}.csv"
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, table[0])
            writer.writeheader()
            writer.writerows(table)
        print(f"written to {file}")


if __name__ == "__main__":
    main()
