"""GRPO: its loss and gradients against the formula in fp64, completions by the engine on the training weights, rewards, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.train import TrainConfig, fit
from foveate.train.data.plan import ExampleIndex
from foveate.train.fitting import TrainResult, _open
from foveate.train.objectives.base import Beginning
from foveate.train.objectives.grpo import advantages
from foveate.train.objectives.rewards import resolve, scored
from foveate.train.objectives.rollouts import generate
from preference_toys import pairs
from train_toys import largest_difference, losses, options, run, write_jsonl


def vowels(completions: list[str]) -> list[float]:
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def prompts(folder: Path, count: int = 6) -> str:
    rows = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in pairs(count)]
    return write_jsonl(folder / "prompts.jsonl", rows)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"objective": "grpo", "batch_size": 2, "num_generations": 4, "max_completion_length": 6}
    if "train_data" not in changes:
        common["train_data"] = [prompts(folder)]
    return options(folder, **common | changes)


def learn(folder: Path, **changes: Any) -> TrainResult:
    return fit(TrainConfig(**settings(folder, **changes)), rewards=[vowels])


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
def test_loss_and_gradients_are_those_of_the_formula(tmp_path, kind, packing):
    config = TrainConfig(
        **settings(
            tmp_path,
            loss_type=kind,
            packing=packing,
            beta=0.2,
            num_iterations=2,
            temperature=0.8,
            epsilon=0.05,
            epsilon_high=0.1,
        )
    )
    opened = _open(config, [vowels])
    model, task, store = opened.trained.model.requires_grad_(True), opened.objective, opened.train.store
    task.begin(Beginning(model, [(store, opened.train.examples)], tmp_path, 64, False, False))
    start = copy.deepcopy(model).double()
    groups = [opened.train.examples_of([ExampleIndex(i, 0)]) for i in range(2)]
    batches = task.batches(model, store, groups, 0)
    with torch.no_grad():  # the second step on the same completions, so that ratios are not 1
        for p in model.parameters():
            p.add_(0.03 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    assert [
        b.tensors["tokens"].equal(a.tensors["tokens"]) for a, b in zip(batches, task.batches(model, store, groups, 1))
    ] == [True] * 2
    wide = copy.deepcopy(model).double()

    def logs(m: Any, tokens: np.ndarray, prompt: int) -> torch.Tensor:
        ids = torch.tensor(tokens.astype("int64"))
        out = (m.logits(m.hidden(ids[None, :-1]))[0] / 0.8).log_softmax(-1)
        return out.gather(1, ids[1:, None])[prompt - 1 :, 0]

    terms, tokens, clipped = [], 0, 0
    for rollout in task._rollouts:
        mean, deviation = rollout.rewards.mean(), rollout.rewards.std(ddof=1)
        for sequence, prompt, reward in zip(rollout.sequences, rollout.prompts, rollout.rewards):
            new = logs(wide, sequence, prompt)
            with torch.no_grad():
                old = logs(start, sequence, prompt)  # the reference too: it began as that
            a, r = float((reward - mean) / (deviation + 1e-4)), torch.exp(new - old)
            loss = -torch.minimum(r * a, r.clamp(0.95, 1.1) * a) + 0.2 * (torch.exp(old - new) - (old - new) - 1)
            clipped += int((r < 0.95).sum() if a < 0 else (r > 1.1).sum())
            tokens += len(new)
            terms.append(loss.mean() if kind == "grpo" else loss.sum())
    norm = {"grpo": 8, "dapo": tokens, "dr_grpo": 8 * 6}[kind]
    truth = torch.stack(terms).sum() / norm
    truth.backward()
    found = [task.learn(model, batch) for batch in batches]
    total = sum(loss for loss, _ in found) / sum(batch.norm for batch in batches)
    total.backward()
    assert sum(batch.norm for batch in batches) == norm
    assert clipped > 0 and sum(int(sums["clip_ratio"]) for _, sums in found) == clipped
    torch.testing.assert_close(total.double(), truth, rtol=1e-4, atol=1e-5)
    wanted = {name: p.grad for name, p in wide.named_parameters()}
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, p in model.named_parameters():
        assert float((p.grad - wanted[name]).abs().max()) <= 1e-4 * scale, name


def test_advantages_are_relative_to_the_group():
    found, deviations = advantages(np.array([1.0, 3.0, 5.0, 5.0]), 2, True)
    np.testing.assert_allclose(found, [-0.70706, 0.70706, 0, 0], atol=1e-4)
    np.testing.assert_allclose(deviations, [2**0.5, 2**0.5, 0, 0])
    np.testing.assert_allclose(advantages(np.array([1.0, 3.0]), 2, False)[0], [-1, 1])


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_completions_follow_the_weights_that_are_trained(tmp_path, lora_rank):
    """The engine reads the modules themselves: a change in place is in the next completion, which is the argmax of a loop without cache."""
    from foveate.train.modules.lora import LoraConfig, add_lora

    opened = _open(TrainConfig(**settings(tmp_path)), [vowels])
    model, tokenizer = opened.trained.model, opened.trained.tokenizer
    if lora_rank:
        add_lora(model, LoraConfig(lora_rank))
    prompt = opened.train.store.get("tokens", 0).tolist()
    texts = []
    for change in (0.0, 0.3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(change * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
            [[sample]] = generate(
                model, tokenizer, [prompt], count=1, temperature=1e-4, max_tokens=5, max_length=64, seeds=[1]
            )
            tokens = list(prompt)
            while len(tokens) < len(prompt) + len(sample.token_ids):
                tokens.append(int(model.logits(model.hidden(torch.tensor([tokens])))[0, -1].argmax()))
        assert sample.token_ids == tokens[len(prompt) :]
        texts.append(sample.token_ids)
    assert texts[0] != texts[1] and model.training  # as it was
    many = generate(
        model, tokenizer, [prompt, prompt[:2]], count=3, temperature=1.0, max_tokens=6, max_length=64, seeds=[1, 2]
    )
    alone = generate(model, tokenizer, [prompt[:2]], count=3, temperature=1.0, max_tokens=6, max_length=64, seeds=[2])
    assert [s.token_ids for s in many[1]] == [s.token_ids for s in alone[0]]
    assert len({tuple(s.token_ids) for s in many[0]}) > 1


def test_the_reward_rises_and_a_run_goes_on_in_the_middle_of_its_completions(tmp_path):
    common: dict[str, Any] = {
        "num_iterations": 2,
        "learning_rate": 2e-2,
        "num_generations": 8,
        "eval_fraction": 0.3,
        "best_by": "reward",
    }
    result = learn(tmp_path / "whole", **common, max_steps=24)
    rewards = [row["reward"] for row in result.history if "reward" in row]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.1
    assert rewards[0] == rewards[1] and result.history[0]["kl"] == 0 and result.history[1]["kl"] > 0
    assert (
        result.metrics["reward"] == pytest.approx(-result.metrics["loss"])
        and "completions/mean_length" in result.metrics
    )

    short = learn(tmp_path / "short", **common, max_steps=6)

    class Stop(Exception):
        pass

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 4:  # after a checkpoint of step 3, the first of two steps on the same completions being done
            raise Stop

    config = TrainConfig(**settings(tmp_path / "stopped", **common, max_steps=6, save_every=1, eval_every=2))
    with pytest.raises(Stop):
        fit(config, rewards=[vowels], after_evaluation=stop)
    assert json.loads((tmp_path / "stopped/out/checkpoints.json").read_text())["last"] == "step-00000003"
    again = fit(config.replace(resume=True), rewards=[vowels])
    assert largest_difference(short, again) == 0
    assert losses(short) == losses(again)


def test_a_reward_model_and_a_file_are_rewards(tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs(8))
    judge = run(tmp_path / "judge", objective="reward", train_data=[data], max_steps=6)
    file = tmp_path / "score.py"
    file.write_text(
        "def right(completions, answer, **rest):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    model, right = resolve([str(judge.last), f"{file}:right"])
    found = model(prompts=["the: ", "fox "], completions=["dog", "rain"])
    assert len(found) == 2 and found[0] != found[1]
    # the same number that training computes for the same text
    tokens = judge.tokenizer.encode("the: dog") + sorted(judge.tokenizer.eos_ids)[:1]
    with torch.no_grad():
        assert found[0] == pytest.approx(float(judge.model(torch.tensor([tokens]))), abs=1e-5)
    result = fit(TrainConfig(**settings(tmp_path, reward=[str(judge.last), f"{file}:right"], lora_rank=0, max_steps=2)))
    assert result.steps == 2 and right(["a b"], ["b"]) == [1.0]


def test_rewards_that_are_none_are_named(tmp_path):
    for name, sentence in (
        ("nonsense", "is neither MODULE:FUNCTION nor FILE.py:FUNCTION nor the folder"), ("json:nothing", "json has no function nothing"),
        ("no_such_module:f", "no_such_module cannot be imported"), (f"{tmp_path}/absent.py:f", "absent.py is not there"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            resolve([name])
    fields = {"prompts": ["a", "b"], "completions": ["x", "y"]}
    with pytest.raises(ValueError, match="gave 1 numbers for 2 completions"):
        scored([lambda completions: [1.0]], fields)
    with pytest.raises(ValueError, match="gave nan for 'y'; it must be a number"):
        scored([lambda completions: [None, float("nan")]], fields)
    assert scored([lambda completions: [None, 2], lambda prompts, **rest: [1, 1]], fields).tolist() == [1, 3]
    with pytest.raises(ValueError, match="grpo needs a reward"):
        run(tmp_path, **settings(tmp_path))
    with pytest.raises(ValueError, match=r"row 1 of .*: there is no 'prompt'"):
        learn(tmp_path / "rows", train_data=[write_jsonl(tmp_path / "rows.jsonl", [{"text": "x"}])])
