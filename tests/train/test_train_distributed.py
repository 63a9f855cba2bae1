"""Training in several gloo processes: DDP, FSDP2 and context parallelism equal one process; checkpoints go from any number to any other."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from pathlib import Path

import pytest
import torch

import objective_toys as objectives
import train_toys
from foveate.models.llama import Llama, LlamaConfig
from foveate.train import TrainConfig, fit
from foveate.train.data.batch import IGNORED, Batch
from foveate.train.interrupt import Interrupted
from foveate.train.loop import Loop, LossModule
from foveate.train.objectives.causal_lm import CausalLM
from foveate.train.strategy import Strategy
from ranks import needs_fsdp, needs_gloo, run_ranks
from train_toys import GPT2, LLAMA, sentences, write_jsonl

pytestmark = [needs_gloo, needs_fsdp, pytest.mark.usefixtures("one_thread")]

# Adam divides a gradient by its own size, which would magnify rounding where gradients are almost 0; with this eps it does not.
_EVEN = {"adam_eps": 1.0, "learning_rate": 1.0, "max_grad_norm": 0.05}


def strategy_of(kind: str, context_parallel: int = 1) -> Strategy:
    from foveate.train.distributed.torchrun import DataParallel, FullyShard

    return {"ddp": DataParallel, "fsdp": FullyShard}[kind](torch.device("cpu"), context_parallel)


def rank_fits(rank: int, runs: list[tuple[str, int, dict]]) -> None:
    for kind, context_parallel, options in runs:
        fit(TrainConfig(**options), strategy=strategy_of(kind, context_parallel))


def outcome(options: dict) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The exported weights and the metrics that a run has left."""
    from safetensors.torch import load_file

    folder = Path(options["output_dir"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    [weights] = (folder / "last").glob("*model.safetensors")  # of a model, or of adapters
    return load_file(weights), rows


def prompts(folder: Path) -> str:
    """Rows whose share of target tokens differs widely, where a mean of the processes' means would be wrong."""
    rows = [{"prompt": text, "completion": text[: 1 + 7 * (i % 5)]} for i, text in enumerate(sentences(36))]
    return write_jsonl(folder / "prompts.jsonl", rows)


def options(folder: Path, name: str, **changes) -> dict:
    """A step always has 8 rows."""
    base = {
        "train_data": [prompts(folder)],
        "new_model": LLAMA | {"max_position_embeddings": 128},
        "eval_fraction": 0.2,
        "max_steps": 4,
    }
    base = train_toys.options(folder, **base, **_EVEN) | changes
    return base | {"output_dir": str(folder / name)}


def assert_same_run(ours: dict, one: dict, atol: float = 1e-6) -> None:
    (weights, rows), (wanted, wanted_rows) = outcome(ours), outcome(one)
    assert weights.keys() == wanted.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=atol)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted_rows]
    for row, other in zip(rows, wanted_rows):
        assert row.keys() == other.keys()
        for name in row.keys() - {"tokens_per_second", "memory_mib"}:
            assert row[name] == pytest.approx(other[name], rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("packing, size, accumulation", [(True, 2, 2), (True, 4, 1), (False, 2, 1)])
def test_ddp_and_fsdp_equal_one_process(tmp_path, packing, size, accumulation):
    one = options(tmp_path, "one", packing=packing, batch_size=8)
    fit(TrainConfig(**one))
    rows = {"packing": packing, "batch_size": 8 // size // accumulation, "accumulation": accumulation}
    runs = [(kind, 1, options(tmp_path, kind, **rows)) for kind in ("ddp", "fsdp")]
    run_ranks(rank_fits, size, tmp_path / "ranks", runs)
    for _, _, run in runs:
        assert_same_run(run, one)


@pytest.mark.parametrize("size, runs", [
    (2, [("ddp", 2, 8, LLAMA | {"num_key_value_heads": 1}), ("fsdp", 2, 8, GPT2)]),
    (4, [("ddp", 4, 4, LLAMA), ("fsdp", 2, 4, LLAMA)]),
])  # fmt: skip
def test_context_parallel_equals_one_process(tmp_path, size, runs):
    for i, (kind, context_parallel, rows, model) in enumerate(runs):
        length = "n_positions" if model is GPT2 else "max_position_embeddings"
        # GPT-2 with a row a sequence, the others packed
        changes = {"new_model": model | {length: 128}, "packing": model is not GPT2, "dropout": 0.0}
        one = options(tmp_path, f"one-{i}", batch_size=8, **changes)
        fit(TrainConfig(**one))
        # the rows of a step that one ring of processes reads, in one or two parts
        spread = options(
            tmp_path, f"spread-{i}", batch_size=rows, accumulation=8 * context_parallel // size // rows, **changes
        )
        run_ranks(rank_fits, size, tmp_path / f"ranks-{i}", [(kind, context_parallel, spread)])
        assert_same_run(spread, one)


def test_every_objective_equals_one_process(tmp_path):
    """Weights without gradients (BERT's pooler), weights that several layers read (T5), frozen ones (LoRA), metrics of the task."""
    base = options(tmp_path, "base", batch_size=8, max_steps=1)
    fit(TrainConfig(**base))
    wordpiece, unigram = objectives.wordpiece(tmp_path), objectives.unigram(tmp_path)
    squad = [objectives.squad(tmp_path, 16)]
    common = {"masked-lm": {"new_model": objectives.BERT, "tokenizer": wordpiece},
              "question-answering": {"new_model": objectives.BERT, "tokenizer": wordpiece, "max_length": 40, "doc_stride": 8,
                                     "train_data": squad, "eval_data": squad, "eval_fraction": 0},
              "span-corruption": {"new_model": objectives.T5_CONFIG, "tokenizer": unigram, "max_length": 40}}  # fmt: skip
    text = {"train_data": [train_toys.texts(tmp_path)]}
    cases = [text | changes | {"objective": name} for name, changes in common.items()]
    cases.append({"model": base["output_dir"] + "/last", "new_model": None, "tokenizer": None, "lora_rank": 4})
    runs = []
    for i, changes in enumerate(cases):
        one = options(tmp_path, f"one-{i}", batch_size=8, max_steps=2, gradient_checkpointing=True, **changes)
        fit(TrainConfig(**one))
        for kind in ("ddp", "fsdp"):
            two = options(
                tmp_path,
                f"{kind}-{i}",
                batch_size=2,
                accumulation=2,
                max_steps=2,
                gradient_checkpointing=True,
                **changes,
            )
            runs.append((kind, 1, two))
    run_ranks(rank_fits, 2, tmp_path / "ranks", runs)
    for kind, _, two in runs:
        name = Path(two["output_dir"]).name.replace(kind, "one")
        assert_same_run(two, options(tmp_path, name))


def tiny_llama() -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=64,
        tied=True, windows=(None, 6),
    )  # fmt: skip
    return Llama(config).double()


def gradients(strategy: Strategy, kind: str) -> dict[str, torch.Tensor]:
    """Of the loss of 8 rows with 1 to 17 labels each, in two micro-batches, clipped."""
    model = tiny_llama()
    objective = CausalLM(TrainConfig(output_dir="-", train_data=["-"], new_model={}, tokenizer="-"), None, 18)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 32, (8, 18), generator=generator)
    labels = torch.randint(0, 32, (8, 18), generator=generator)
    for row in range(8):
        labels[row, 1 + 5 * row % 17 :] = IGNORED
    # blocks of rows, so that the processes have very different numbers of labels
    mine = torch.arange(8).view(strategy.world_size, 2, -1)[strategy.rank]
    batches = []
    for rows in mine:
        batch = Batch(
            {"tokens": tokens[rows], "labels": labels[rows]},
            {},
            int((labels[rows] != IGNORED).sum()),
            rows.numel() * 18,
        )
        batches.append(strategy.share(batch))
    target_count = int(strategy.sum(torch.tensor(sum(batch.target_count for batch in batches))))
    assert target_count == int((labels != IGNORED).sum())
    assert int(strategy.sum(torch.tensor(sum(batch.tokens for batch in batches)))) == 8 * 18
    module = strategy.wrap(LossModule(model, objective))
    for i, batch in enumerate(batches):
        with strategy.accumulating(module, last=i == 1):
            (module(batch)[0] * (strategy.gradient_factor / target_count)).backward()
    norm = strategy.clip(model.parameters(), 0.05)
    grads = {name: p.grad for name, p in model.named_parameters()}
    if kind == "fsdp":
        grads = {name: grad.full_tensor() for name, grad in grads.items()}
    return grads | {"norm": norm}


def rank_gradients(rank: int, runs: list[tuple[str, int]]) -> list[dict[str, torch.Tensor]]:
    return [gradients(strategy_of(kind, context_parallel), kind) for kind, context_parallel in runs]


@pytest.mark.parametrize("size, runs", [
    (2, [("ddp", 1), ("fsdp", 1), ("ddp", 2), ("fsdp", 2)]),
    (3, [("ddp", 3), ("fsdp", 3)]),
    (4, [("ddp", 1), ("fsdp", 1), ("ddp", 4), ("fsdp", 2)]),
])  # fmt: skip
def test_gradients_in_fp64(tmp_path, size, runs):
    one = gradients(Strategy(), "one")
    for rank in run_ranks(rank_gradients, size, tmp_path, runs):
        for grads in rank:
            assert grads.keys() == one.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(
                    grad, one[name], rtol=1e-10, atol=1e-14, msg=lambda text, name=name: f"{name}: {text}"
                )


def test_checkpoints_go_to_other_numbers_of_processes(tmp_path):
    """Two steps on some number of processes, the other two on another: the same as all four on one."""
    one = options(tmp_path, "one", batch_size=8, eval_every=1)
    fit(TrainConfig(**one))
    changes = [(("fsdp", 2), (None, 1)), (("fsdp", 2), ("fsdp", 4)), (("fsdp", 4), ("ddp", 2)), ((None, 1), ("ddp", 2))]
    for half in (0, 1):
        for size in (1, 2, 4):
            runs = []
            for i, change in enumerate(changes):
                kind, number = change[half]
                if number == size:
                    run = options(tmp_path, str(i), batch_size=8 // size, eval_every=1, resume=half == 1)
                    runs.append((kind, 1, run))
            if size == 1:
                for _, _, run in runs:
                    stopped_fit(None, run, half)
            else:
                run_ranks(rank_stopped_fits, size, tmp_path / f"ranks-{half}-{size}", runs, half)
    for i in range(len(changes)):
        assert_same_run(options(tmp_path, str(i)), one)


class Stopped(Exception):
    pass


def stopped_fit(strategy: Strategy | None, run: dict, half: int) -> None:
    """Half 0 of the run stops after step 3, whose work is lost: the last checkpoint is that of step 2."""

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3 and half == 0:
            raise Stopped

    with pytest.raises(Stopped) if half == 0 else contextlib.nullcontext():
        fit(TrainConfig(**run), strategy=strategy, after_evaluation=stop)


def rank_stopped_fits(rank: int, runs: list[tuple[str, int, dict]], half: int) -> None:
    for kind, context_parallel, run in runs:
        stopped_fit(strategy_of(kind, context_parallel), run, half)


def rank_signalled(rank: int, folder: Path) -> int:
    """A signal to one of the processes; the step after which this one has stopped."""
    step = Loop._step
    Loop._step = lambda self, i: (rank == 1 and i == 1 and signal.raise_signal(signal.SIGTERM)) or step(self, i)
    with pytest.raises(Interrupted, match="stopped after step 2 of 4"):
        fit(TrainConfig(**options(folder, "run", batch_size=4)), strategy=strategy_of("ddp"))
    Loop._step = step
    return fit(TrainConfig(**options(folder, "run", batch_size=4, resume=True)), strategy=strategy_of("ddp")).steps


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path):
    one = options(tmp_path, "one", batch_size=8)
    fit(TrainConfig(**one))
    assert run_ranks(rank_signalled, 2, tmp_path / "ranks", tmp_path) == [4, 4]
    assert_same_run(options(tmp_path, "run"), one)


def rank_misfits(rank: int, folder: Path) -> list[str]:
    """Sentences of what cannot be done in two processes."""
    good = options(folder, "run", batch_size=4)
    fit(TrainConfig(**good), strategy=strategy_of("fsdp"))
    wider = good["new_model"] | {"intermediate_size": 64}
    calls = [
        lambda: strategy_of("ddp", 3),
        lambda: fit(TrainConfig(**good | {"resume": True, "new_model": wider}), strategy=strategy_of("ddp")),
    ]
    sentences = []
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        sentences.append(str(caught.value))
    return sentences


def test_errors_in_every_process(tmp_path):
    wanted = [
        "context_parallel=3 does not divide the 2 processes",
        r"is the state of another model .*: model\.layers\.0\.mlp\.down_proj\.weight has shape \(32, 48\) there and \(32, 64\) here",
    ]
    for found in run_ranks(rank_misfits, 2, tmp_path / "ranks", tmp_path):
        for pattern, sentence in zip(wanted, found):
            assert re.search(pattern, sentence), sentence
        assert len(found) == len(wanted)


def test_errors_without_other_processes(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="strategy='ddp' is for several processes, .*no RANK.*torchrun --nproc-per-node 2"
    ):
        fit(TrainConfig(**options(tmp_path, "run", strategy="ddp")))
    with pytest.raises(ValueError, match="context_parallel=2 .* needs objective='causal-lm' and a strategy"):
        TrainConfig(**options(tmp_path, "run", context_parallel=2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each would train alone; give a strategy"):
        fit(TrainConfig(**options(tmp_path, "run")))
