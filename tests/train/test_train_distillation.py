"""Distillation: the loss and its gradients over whole logits in fp64, evaluation, and teachers that do not fit."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch

from foveate.train import TrainConfig
from foveate.train.data.batch import IGNORED
from foveate.train.data.plan import ExampleIndex
from foveate.train.fitting import _open
from foveate.train.objectives.base import Beginning
from train_toys import GPT2, LLAMA, losses, options, run, texts


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    return str(
        run(
            folder,
            train_data=[texts(folder)],
            new_model=LLAMA | {"hidden_size": 48, "num_hidden_layers": 1},
            max_steps=20,
        ).last
    )


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("changes", [
    {"loss_type": "jsd", "beta": 0.3, "label_weight": 0.5}, {"loss_type": "reverse-kl", "temperature": 2.0}, {"teacher_top_k": 3},
], ids=["jsd", "reverse", "top-k"])  # fmt: skip
def test_loss_and_gradients_are_those_of_whole_logits(tmp_path, teacher, changes, packing):
    config = TrainConfig(
        **options(
            tmp_path,
            objective="distill",
            teacher=teacher,
            tokenizer=teacher,
            packing=packing,
            train_data=[texts(tmp_path, 5)],
            **changes,
        )
    )
    opened = _open(config)
    model, task, store = opened.trained.model.requires_grad_(True), opened.objective, opened.train.store
    task.begin(Beginning(model, [], tmp_path, 64, False, False))
    wide, their = copy.deepcopy(model).double(), copy.deepcopy(task._teacher).double()
    examples = opened.train.examples_of([ExampleIndex(i, 0) for i in range(5)])
    batch = task.collate(store, examples)
    terms, count, temperature = [], 0, config.temperature
    for i in range(5):
        ids = torch.tensor(store.get("tokens", i).astype("int64"))
        logits = wide.logits(wide.hidden(ids[None, :-1]))[0]
        scores = their.logits(their.hidden(ids[None, :-1]))[0].detach()
        p, q = (logits / temperature).log_softmax(-1), (scores / temperature).log_softmax(-1)
        if config.teacher_top_k:
            at = scores.topk(3, -1).indices
            p, q = p.gather(-1, at), scores.gather(-1, at).log_softmax(-1)
        if config.kind_of_loss == "jsd":
            m = (0.3 * q.exp() + 0.7 * p.exp()).log()
            terms.append(0.3 * (q.exp() * (q - m)).sum() + 0.7 * (p.exp() * (p - m)).sum())
            terms.append(-0.5 * logits.log_softmax(-1).gather(1, ids[1:, None]).sum())
        else:
            a, b = (q, p) if config.kind_of_loss == "forward-kl" else (p, q)
            terms.append((a.exp() * (a - b)).sum())
        count += len(ids) - 1
    truth = torch.stack(terms).sum() / count
    truth.backward()
    assert count == batch.target_count == int((batch["labels"] != IGNORED).sum())
    loss = task.learn(model, batch)[0] / count
    loss.backward()
    torch.testing.assert_close(loss.double(), truth, rtol=2e-5, atol=1e-6)
    wanted = {name: p.grad for name, p in wide.named_parameters()}
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, p in model.named_parameters():
        assert float((p.grad - wanted[name]).abs().max()) <= 5e-5 * scale, name


def test_a_student_comes_near_its_teacher_and_goes_on(tmp_path, teacher):
    common: dict[str, Any] = {
        "objective": "distill", "teacher": teacher, "tokenizer": teacher, "eval_fraction": 0.2, "new_model": GPT2, "best_by": "perplexity",
    }  # fmt: skip
    whole = run(tmp_path / "whole", **common, max_steps=12)
    assert losses(whole)[-1] < 0.7 * losses(whole)[0]
    assert whole.metrics["perplexity"] == pytest.approx(math.exp(whole.metrics["cross_entropy"]))
    assert whole.metrics["loss"] == pytest.approx(whole.metrics["divergence"])
    run(tmp_path / "parts", **common, max_steps=6, schedule="constant")
    longer = run(tmp_path / "parts", **common, max_steps=12, schedule="constant", resume=True)
    assert longer.steps == 12 and losses(longer)[-1] < losses(longer)[0]


def test_equal_models_have_nothing_to_learn_from_each_other(tmp_path, teacher):
    result = run(
        tmp_path, objective="distill", teacher=teacher, model=teacher, new_model=None, tokenizer=None, hidden_weight=1.0,
        lora_rank=2, max_steps=1,
    )  # fmt: skip
    assert losses(result)[0] == pytest.approx(0, abs=1e-5)
    assert json.loads((result.last / "adapter_config.json").read_text())["r"] == 2


def test_teachers_that_do_not_fit_are_named(tmp_path, teacher):
    common: dict[str, Any] = {"objective": "distill", "teacher": teacher}
    with pytest.raises(ValueError, match="has another tokenizer; a student learns from a teacher of the same tokens"):
        run(tmp_path, **common, train_data=[texts(tmp_path, 3)])
    with pytest.raises(ValueError, match="the teacher's have 48 numbers, and the student's 32"):
        run(tmp_path, **common, tokenizer=teacher, hidden_weight=1.0)
    with pytest.raises(ValueError, match="distill needs a teacher"):
        TrainConfig(**options(tmp_path, objective="distill"))
    with pytest.raises(ValueError, match="teacher_top_k is for forward-kl, not jsd"):
        TrainConfig(**options(tmp_path, **common, loss_type="jsd", teacher_top_k=3))
