"""The training loop: the loss, its normalisation, schedules, precision, evaluation, early stopping, and what it writes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from foveate.models import load_model
from foveate.train import NonFiniteLoss, TrainConfig, fit
from foveate.train.data.plan import best_fit
from foveate.train.optimizer import adamw, parameter_groups
from foveate.train.schedule import rate_factor
from train_toys import GPT2, LLAMA, largest_difference, losses, options, run, sentences, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def prompts(folder, count=48):
    """Rows whose share of target tokens differs widely, where a mean of means would be wrong."""
    rows = [{"prompt": text, "completion": text[: 1 + 7 * (i % 5)]} for i, text in enumerate(sentences(count))]
    return write_jsonl(folder / "prompts.jsonl", rows)


@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_is_one_big_batch(tmp_path, packing):
    data = [prompts(tmp_path)]
    config = {
        "new_model": LLAMA | {"max_position_embeddings": 128},
        "train_data": data,
        "max_steps": 4,
        "packing": packing,
    }
    # Adam divides a gradient by its own size, which would magnify rounding where gradients are almost 0; with this eps it does not
    config |= {"adam_eps": 1.0, "learning_rate": 1.0, "max_grad_norm": 0}
    results = [
        run(tmp_path / str(n), **config, cache_dir=str(tmp_path / "c"), batch_size=8 // n, accumulation=n)
        for n in (1, 2, 8)
    ]
    for other in results[1:]:
        assert largest_difference(results[0], other) < 1e-6
        assert losses(other) == pytest.approx(losses(results[0]), abs=1e-6)
    assert results[0].tokens == results[2].tokens


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_the_mean_over_the_target_tokens(tmp_path, packing):
    """Of a step with a learning rate of almost nothing, against torch's own cross-entropy over each text by itself."""
    rows = len(best_fit(np.array([len(text) for text in sentences(40)]), 64)) if packing else 40
    result = run(
        tmp_path, max_steps=1, batch_size=rows, learning_rate=1e-30, warmup=0, weight_decay=0.0, packing=packing
    )
    assert result.tokens == sum(map(len, sentences(40)))
    model, tokenizer = result.model, result.tokenizer
    total, count = 0.0, 0
    for text in sentences(40):
        ids = torch.tensor([[*tokenizer.encode(text), *tokenizer.eos_ids]])
        logits = model(ids[:, :-1]).detach()
        total += float(torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    assert losses(result) == pytest.approx([total / count], rel=1e-5)


def test_schedules():
    def factors(schedule, **more):
        return [rate_factor(s, 100, schedule=schedule, warmup_steps=10, **more) for s in range(100)]

    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert factors(schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    linear = factors("linear", min_factor=0.1)
    assert linear[10] == 1 and linear[55] == pytest.approx(0.55) and linear[99] == pytest.approx(0.1 + 0.9 / 90)
    cosine = factors("cosine", min_factor=0.1)
    assert cosine[10] == 1 and cosine[55] == pytest.approx(0.55) and cosine[99] == pytest.approx(0.1, abs=1e-3)
    wsd = factors("wsd", decay_share=0.2)
    assert wsd[10:81] == [1.0] * 71 and wsd[90] == pytest.approx(0.5) and wsd[99] == pytest.approx(0.05)
    assert factors("constant")[10:] == [1.0] * 90


def test_only_matrices_decay(tmp_path):
    model = run(tmp_path, new_model=GPT2, max_steps=1).model
    decay, rest = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert {names[id(p)].rsplit(".", 2)[-2] for p in decay["params"]} == {"c_attn", "c_proj", "c_fc"}
    assert all(names[id(p)].endswith(".weight") for p in decay["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert adamw(model, learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8).defaults["fused"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        adamw(model, learning_rate=1.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    """Dropout included, which must be drawn again in the backward pass as it was."""
    settings = {"new_model": GPT2, "dropout": 0.2, "max_steps": 3}
    plain = run(tmp_path / "a", **settings)
    again = run(tmp_path / "b", **settings, gradient_checkpointing=True)
    assert largest_difference(plain, again) == 0
    without = run(tmp_path / "c", **settings | {"dropout": 0.0})
    assert largest_difference(plain, without) > 0


def test_bf16_keeps_fp32_weights(tmp_path):
    full = run(tmp_path / "a", max_steps=12)
    half = run(tmp_path / "b", max_steps=12, precision="bf16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert largest_difference(full, half) > 0
    assert losses(half) == pytest.approx(losses(full), rel=0.02)
    assert losses(half)[-1] < 0.9 * losses(half)[0]


def test_gradients_are_clipped(tmp_path):
    free = run(tmp_path / "a", max_steps=1, max_grad_norm=0)
    clipped = run(tmp_path / "b", max_steps=1, max_grad_norm=1e-3)
    assert losses(free, "grad_norm") == pytest.approx(losses(clipped, "grad_norm"))  # the norm before
    assert losses(free, "grad_norm")[0] > 1e-2
    assert largest_difference(free, clipped) > 0


def test_evaluation_best_and_last(tmp_path):
    result = run(tmp_path, eval_fraction=0.25, max_steps=12, eval_every=3, learning_rate=3e-2)
    evaluated = losses(result, "eval_loss")
    assert len(evaluated) == 4 and result.metrics["loss"] == evaluated[-1]
    assert losses(result, "eval_perplexity") == pytest.approx([math.exp(x) for x in evaluated])
    assert result.best_loss == min(evaluated)
    assert int(result.best.name.removeprefix("step-")) == 3 * (1 + evaluated.index(min(evaluated)))
    assert result.last.name == "step-00000012"
    assert {p.name for p in (tmp_path / "out").glob("step-*")} == {result.best.name, result.last.name}
    reloaded = load_model(tmp_path / "out" / "last")
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(reloaded(tokens), result.model(tokens))


def test_early_stopping(tmp_path):
    """A learning rate that makes it worse from the second evaluation on."""
    settings = {
        "eval_fraction": 0.25,
        "max_steps": 60,
        "eval_every": 1,
        "learning_rate": 1.0,
        "schedule": "constant",
        "patience": 3,
    }
    result = run(tmp_path, **settings, warmup=0)
    evaluated = losses(result, "eval_loss")
    best = evaluated.index(min(evaluated))
    assert result.steps == best + 1 + 3 == len(evaluated) < 60
    assert result.last.name == f"step-{result.steps:08d}"
    assert run(tmp_path, **settings, warmup=0, resume=True).steps == result.steps


def test_what_a_run_writes(tmp_path):
    pytest.importorskip("tensorboard")
    result = run(tmp_path, eval_fraction=0.25, max_steps=4, log_every=2, eval_every=4, tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history and [line["step"] for line in lines] == [2, 4, 4]
    assert set(lines[0]) == {
        "step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_mib", "epoch",
    }  # fmt: skip
    assert (tmp_path / "out" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "out" / "tensorboard").glob("events*"))
    assert sorted(p.name for p in result.last.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "state", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not any(
        b"pickle" in p.read_bytes() or p.suffix in (".pt", ".bin") for p in result.last.rglob("*") if p.is_file()
    )


def test_the_bar_tells_speed_and_memory(tmp_path, capsys):
    run(tmp_path, max_steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "training" in shown and "3/3" in shown and "tokens/s" in shown and "MiB" in shown and "loss" in shown


def test_a_loss_that_is_no_number_stops_with_the_batch(tmp_path):
    from safetensors.torch import load_file

    with pytest.raises(
        NonFiniteLoss,
        match=r"the loss is .* and the gradient's norm nan at step \d+.*the batch is in .*\. The last checkpoint is .*lower learning_rate",
    ):
        run(tmp_path, max_steps=20, learning_rate=1e30, warmup=0, schedule="constant", save_every=1, max_grad_norm=0)
    [file] = (tmp_path / "out").glob("not_finite_step_*.safetensors")
    saved = load_file(file)
    assert saved["0.tokens"].shape == saved["0.labels"].shape and saved["0.tokens"].numel() > 0
    step = int(file.name.split("_")[3])
    assert (tmp_path / "out" / "last").resolve().name == f"step-{step - 1:08d}"


def test_a_run_is_its_seed(tmp_path):
    first, second = (run(tmp_path / name, dropout=0.1, seed=3) for name in "ab")
    assert largest_difference(first, second) == 0 and losses(first) == losses(second)
    assert largest_difference(first, run(tmp_path / "c", dropout=0.1, seed=4)) > 0


def test_an_output_folder_with_a_run_is_not_overwritten(tmp_path):
    run(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="already has a run.*go on with resume, or choose another output_dir"):
        run(tmp_path, max_steps=1)


def test_options_and_a_config_go_together(tmp_path):
    config = TrainConfig(**options(tmp_path, max_steps=1))
    assert fit(config, max_steps=2).steps == 2
    assert texts(tmp_path) in config.train_data
