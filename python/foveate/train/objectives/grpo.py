"""GRPO (Shao et al. 2024, arXiv 2402.03300): a policy learns from rewards of its own completions, compared within groups of one prompt."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.data import preferences
from foveate.train.data.batch import IGNORED, Batch, filling
from foveate.train.data.examples import Columns, Example, Examples, length_notes, too_long
from foveate.train.data.token_store import TokenStore
from foveate.train.objectives.base import Beginning, Objective
from foveate.train.objectives.head import token_log_probs
from foveate.train.objectives.pairs import side_of
from foveate.train.objectives.preferences import autocast
from foveate.train.objectives.reference import LiveReference
from foveate.train.objectives.rewards import Reward, scored
from foveate.train.objectives.rollouts import generate

_WHAT = "prompts"
_KNOWN = (
    "prompt",
    "completion",
    "messages",
)  # of a row, that a reward function gets under names of its own or not at all


def advantages(rewards: np.ndarray, group: int, scale: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rewards in groups of `group`, each less its group's mean, with `scale` over the group's standard deviation (of n - 1) + 1e-4; and
    that deviation for each."""
    grouped = rewards.reshape(-1, group)
    deviation = np.broadcast_to(grouped.std(1, ddof=1, keepdims=True), grouped.shape)
    found = grouped - grouped.mean(1, keepdims=True)
    return (found / (deviation + 1e-4) if scale else found).reshape(-1), deviation.reshape(-1)


def grpo_losses(
    log_probs: Tensor, old: Tensor, advantage: Tensor, *, epsilon: float, epsilon_high: float, reference: Tensor | None = None,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """For each token -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k3 with r = exp(log_probs - old) and k3 = exp(d) - d - 1,
    d = reference - log_probs (Schulman 2020); k3; and whether r was clipped where that changes the loss."""
    ratio = torch.exp(log_probs - old)
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.minimum(ratio * advantage, clipped * advantage)
    was_clipped = ((ratio < 1 - epsilon) & (advantage < 0)) | ((ratio > 1 + epsilon_high) & (advantage > 0))
    if reference is None:
        return losses, torch.zeros_like(losses), was_clipped
    d = reference - log_probs
    k3 = torch.exp(d) - d - 1
    return losses + beta * k3, k3, was_clipped


@dataclass
class Rollout:
    """Completions of the prompts of one forward pass. sequences: prompt and completion, int32; prompts: how many tokens are the prompt's;
    old, reference: log-probabilities of each token after the first, 0 in prompts; empty where they are not needed."""

    sequences: list[np.ndarray]
    prompts: list[int]
    rewards: np.ndarray
    advantages: np.ndarray
    deviations: np.ndarray
    old: list[np.ndarray] = field(default_factory=list)
    reference: list[np.ndarray] = field(default_factory=list)


class GRPO(Objective):
    """Rows: {"prompt"}, a text or messages, and other fields, which the reward functions get.

    A step draws num_generations completions of each of its prompts, and learns from them num_iterations times. Packing is of the
    completions, each with its prompt. Evaluation draws as many, from seeds of their own, and reports the mean reward, of which its loss is
    the negative.
    """

    packs_examples = False

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, max_length: int, rewards: Sequence[Reward]) -> None:
        self.config, self.tokenizer, self.max_length = config, tokenizer, max_length
        self.steps_per_row = config.num_iterations
        self._rewards = rewards
        self._live: LiveReference | None = None
        self._rollouts: list[Rollout] = []
        if not rewards:
            raise ValueError("grpo needs a reward: MODULE:FUNCTION, FILE.py:FUNCTION, or the folder of a reward model")

    def signature(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Sequence[dict[str, Any]]) -> Columns:
        """tokens int32, the prompt's; row uint8, the row itself as JSON."""
        columns: Columns = {"tokens": [], "row": []}
        for row in rows:
            columns["tokens"].append(np.array(preferences.prompt_tokens(row, self.tokenizer), np.int32))
            columns["row"].append(np.frombuffer(json.dumps(dict(row), default=str).encode(), np.uint8))
        return columns

    def examples(self, store: TokenStore) -> Examples:
        lengths = store.lengths("tokens") if len(store) else np.empty(0, np.int64)
        longer = too_long(self.config, lengths + 1, self.max_length, _WHAT)
        documents = np.flatnonzero(~longer & (lengths > 0))
        return Examples(documents, np.zeros_like(documents), lengths[documents])

    def notes(self, store: TokenStore) -> list[str]:
        lengths = store.lengths("tokens") if len(store) else np.empty(0, np.int64)
        found = length_notes(self.config, lengths + 1, self.max_length, _WHAT)
        empty = int((lengths == 0).sum())
        return [*found, f"{empty} of {len(lengths)} prompts are empty and are left out"] if empty else found

    def begin(self, beginning: Beginning) -> None:
        if self.config.strength:
            self._live = LiveReference(beginning.model)

    def batches(
        self, model: Any, store: TokenStore, groups: Sequence[Sequence[Example]], step: int | None
    ) -> list[Batch]:
        if step is None:
            return [self._batch(self._rollout(model, store, group, (3, 0))) for group in groups]
        if step % self.steps_per_row == 0 or len(self._rollouts) != len(groups):
            self._rollouts = [self._rollout(model, store, group, (2, step)) for group in groups]
            for rollout in self._rollouts:
                self._look_back(model, rollout)
        return [self._batch(rollout) for rollout in self._rollouts]

    def _rollout(self, model: Any, store: TokenStore, examples: Sequence[Example], key: tuple[int, int]) -> Rollout:
        config, group = self.config, self.config.num_generations
        prompts = [store.get("tokens", example.document).tolist() for example in examples]
        seeds = [
            int(np.random.SeedSequence([config.seed, *key, i, example.document]).generate_state(1, np.uint64)[0])
            for i, example in enumerate(examples)
        ]
        found = generate(
            model, self.tokenizer, prompts, count=group, temperature=config.temperature, max_tokens=config.max_completion_length,
            max_length=self.max_length, seeds=seeds,
        )  # fmt: skip
        rows = [json.loads(store.get("row", example.document).tobytes()) for example in examples]
        fields: dict[str, list[Any]] = {"prompts": [], "completions": [], "completion_ids": []}
        others = dict.fromkeys(name for row in rows for name in row if name not in _KNOWN)
        sequences, lengths = [], []
        for prompt, row, samples in zip(prompts, rows, found):
            asked = row.get("prompt", row.get("messages"))
            for sample in samples:
                reply: Any = sample.text
                if not isinstance(asked, str):
                    reply = [{"role": "assistant", "content": sample.text}]
                fields["prompts"].append(asked)
                fields["completions"].append(reply)
                fields["completion_ids"].append(sample.token_ids)
                for name in others:
                    fields.setdefault(name, []).append(row.get(name))
                sequences.append(np.array(prompt + sample.token_ids, np.int32))
                lengths.append(len(prompt))
        rewards = scored(self._rewards, fields)
        found_advantages, deviations = advantages(rewards, group, config.scale_rewards)
        return Rollout(sequences, lengths, rewards, found_advantages, deviations)

    @torch.no_grad()
    def _look_back(self, model: Any, rollout: Rollout) -> None:
        """What of a rollout has to be known before the first step on it: the log-probabilities of then, and those of the reference."""
        device, training = next(model.parameters()).device, model.training
        batch = self._batch(rollout).to(device)
        if self.steps_per_row > 1:
            model.eval()
            rollout.old = self._ragged(self._log_probs(model, batch), rollout)
            model.train(training)
        if self._live is not None:
            with self._live.running(model) as before:
                rollout.reference = self._ragged(self._log_probs(before, batch), rollout)

    def _log_probs(self, model: Any, batch: Batch) -> Tensor:
        with autocast(self.config, batch):
            hidden = model.hidden(batch["tokens"], packed=batch.packed.get("tokens"))
            return token_log_probs(model, hidden, batch["labels"], self.config.temperature)

    def _ragged(self, values: Tensor, rollout: Rollout) -> list[np.ndarray]:
        lengths = [len(tokens) - 1 for tokens in rollout.sequences]
        rows = values.float().cpu().numpy()
        if self.config.packing:
            return np.split(rows[0][: sum(lengths)], np.cumsum(lengths)[:-1])
        return [row[:length] for row, length in zip(rows, lengths)]

    def _batch(self, rollout: Rollout) -> Batch:
        packing, kind = self.config.packing, self.config.kind_of_loss
        flagged = [
            (tokens, (np.arange(len(tokens)) >= prompt).astype(np.uint8))
            for tokens, prompt in zip(rollout.sequences, rollout.prompts)
        ]
        tensors, packed = side_of(flagged, packing)
        counts = [len(tokens) - prompt for tokens, prompt in zip(rollout.sequences, rollout.prompts)]
        shapes = [len(tokens) - 1 for tokens in rollout.sequences]
        weights = [1 / count if kind == "grpo" else 1.0 for count in counts]
        for name, values in (("advantages", rollout.advantages), ("weights", weights)):
            tensors[name] = _joined([np.full(n, value, np.float32) for n, value in zip(shapes, values)], packing)
        for name, ragged in (("old", rollout.old), ("reference", rollout.reference)):
            if ragged:
                tensors[name] = _joined(ragged, packing)
        for name, numbers in (("rewards", rollout.rewards), ("deviations", rollout.deviations)):
            tensors[name] = torch.from_numpy(np.asarray(numbers, np.float32))
        norms = {"grpo": len(counts), "dapo": sum(counts), "dr_grpo": len(counts) * self.config.max_completion_length}
        return Batch(tensors, packed, len(counts), sum(shapes), float(norms[kind]))

    def learn(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        config, mask = self.config, batch["labels"] != IGNORED
        found = self._log_probs(model, batch)
        high = config.epsilon if config.epsilon_high is None else config.epsilon_high
        old = batch.tensors.get("old", found.detach())
        losses, k3, clipped = grpo_losses(
            found, old, batch["advantages"], epsilon=config.epsilon, epsilon_high=high, reference=batch.tensors.get("reference"),
            beta=config.strength,
        )  # fmt: skip
        return (losses * batch["weights"] * mask).sum(), self._sums(batch) | {
            "kl": (k3.detach() * mask).sum(),
            "clip_ratio": (clipped & mask).float().sum(),
        }

    def _sums(self, batch: Batch) -> dict[str, Tensor]:
        deviations = batch["deviations"]
        return {
            "reward": batch["rewards"].sum(), "reward_std": deviations.sum(), "frac_reward_zero_std": (deviations == 0).float().sum(),
            "completions/mean_length": (batch["labels"] != IGNORED).float().sum(),
        }  # fmt: skip

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        sums = self._sums(batch)
        return {"loss": -sums["reward"], **sums}

    def metrics(self, means: dict[str, Tensor]) -> dict[str, float]:
        """kl and clip_ratio are means over tokens, the others over completions."""
        for name in ("kl", "clip_ratio"):
            if name in means:
                means[name] = means[name] / means["completions/mean_length"].clamp(min=1)
        return super().metrics(means)

    def state(self) -> dict[str, Tensor]:
        """The completions of the steps that are not finished with them."""
        if self.steps_per_row == 1 or not self._rollouts:
            return {}
        found: dict[str, Tensor] = {}
        for i, r in enumerate(self._rollouts):
            arrays = {
                "lengths": np.array([len(tokens) for tokens in r.sequences]), "tokens": np.concatenate(r.sequences),
                "prompts": np.array(r.prompts), "rewards": r.rewards, "advantages": r.advantages, "deviations": r.deviations,
            }  # fmt: skip
            arrays |= {
                name: np.concatenate(values) for name, values in (("old", r.old), ("reference", r.reference)) if values
            }
            found |= {f"{i}.{name}": torch.from_numpy(np.array(values)) for name, values in arrays.items()}
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._rollouts = []
        for i in range(sum(name.endswith(".lengths") for name in state)):
            part = {name.partition(".")[2]: t.numpy() for name, t in state.items() if name.startswith(f"{i}.")}
            ends = np.cumsum(part["lengths"])[:-1]
            places = np.cumsum(part["lengths"] - 1)[:-1]
            old, reference = (np.split(part[name], places) if name in part else [] for name in ("old", "reference"))
            tokens, prompts = np.split(part["tokens"], ends), part["prompts"].tolist()
            numbers = part["rewards"], part["advantages"], part["deviations"]
            self._rollouts.append(Rollout(tokens, prompts, *numbers, old, reference))


def _joined(values: Sequence[np.ndarray], packing: bool) -> Tensor:
    """float32 [1, total], or [B, longest]: 0 where nothing is."""
    if packing:
        whole = torch.from_numpy(np.concatenate(values).astype(np.float32))
        return F.pad(whole, (0, filling(len(whole))))[None]
    out = torch.zeros(len(values), max(map(len, values)))
    for row, part in zip(out, values):
        row[: len(part)] = torch.from_numpy(np.asarray(part, np.float32))
    return out
