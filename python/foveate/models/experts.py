"""Mixture of experts in place of an MLP: each token goes through the few that a router chooses for it (Shazeer et al. 2017, 1701.06538)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.files.checked import CheckpointError


@dataclass(frozen=True)
class ExpertsConfig:
    """count: of experts; per_token: how many a token goes through; inner: the width of each.

    router: "softmax" takes the softmax of all logits and then the best, "top" the softmax of the best logits alone, "sigmoid" chooses by
    the sigmoid plus a stored bias and weighs by the sigmoid (DeepSeek V3). normalize: weights of a token add up to 1. scale: of them.
    groups, top_groups: only experts of the best groups are chosen, by the sum of a group's best two scores with "sigmoid", by its best
    otherwise. shared_inner: width of an expert that every token goes through, 0 for none; shared_gate: it is multiplied by the sigmoid of
    a learned score.
    """

    count: int
    per_token: int
    inner: int
    router: str = "softmax"
    router_bias: bool = False
    normalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    shared_inner: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.per_token <= max(self.count, 1):
            raise CheckpointError(
                f"num_experts_per_tok={self.per_token} must be between 1 and the {self.count} experts that the config names"
            )
        if self.count % self.groups or not 1 <= self.top_groups <= self.groups:
            raise CheckpointError(
                f"{self.count} experts in {self.groups} groups (n_group), of which {self.top_groups} are chosen (topk_group), cannot be: "
                "groups are of one size, and no more are chosen than there are"
            )
        if self.per_token > max(self.count, 1) // self.groups * self.top_groups:
            raise CheckpointError(
                f"num_experts_per_tok={self.per_token} is more than the experts in {self.top_groups} of {self.groups} groups of "
                f"{self.count} experts (topk_group, n_group)"
            )


class Router(nn.Module):
    """Not an nn.Linear: it is small, decides everything, and is never quantised or adapted."""

    def __init__(self, hidden: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.count, hidden))
        self.bias = nn.Parameter(torch.zeros(config.count)) if config.router_bias else None
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.count)) if config.router == "sigmoid" else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, hidden] -> weights fp32 and experts int64, [tokens, per_token] each."""
        c = self.config
        if self.e_score_correction_bias is not None:
            return self._by_sigmoid(x, self.e_score_correction_bias)
        logits = F.linear(x, self.weight, self.bias).float()
        if c.router == "top":
            best, experts = logits.topk(c.per_token, -1)
            return best.softmax(-1), experts
        scores = logits.softmax(-1)
        if c.groups > 1:
            scores = self._of_best_groups(scores, scores.unflatten(-1, (c.groups, -1)).amax(-1))
        weights, experts = scores.topk(c.per_token, -1)
        if c.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * c.scale, experts

    def _by_sigmoid(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        choice = scores + bias.float()
        if c.groups > 1:
            by_group = choice.unflatten(-1, (c.groups, -1))
            choice = self._of_best_groups(choice, by_group.topk(min(2, by_group.shape[-1]), -1).values.sum(-1))
        experts = choice.topk(c.per_token, -1).indices
        weights = scores.gather(-1, experts)
        if c.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * c.scale, experts

    def _of_best_groups(self, scores: Tensor, of_groups: Tensor) -> Tensor:
        """scores [tokens, experts], -inf where the expert's group is not among the best; of_groups [tokens, groups]."""
        c = self.config
        best = of_groups.topk(c.top_groups, -1).indices
        kept = torch.zeros_like(of_groups).scatter_(-1, best, 1.0).bool()
        return scores.masked_fill(~kept.repeat_interleave(c.count // c.groups, -1), float("-inf"))


class Experts(nn.Module):
    """mlp: makes an expert of the given width. Names are Qwen3-MoE's: gate, experts.N, shared_expert, shared_expert_gate."""

    def __init__(self, hidden: int, config: ExpertsConfig, mlp: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.gate = Router(hidden, config)
        self.experts = nn.ModuleList(mlp(config.inner) for _ in range(config.count))
        self.shared_expert = mlp(config.shared_inner) if config.shared_inner else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if config.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, hidden] -> [B, S, hidden]. The tokens are sorted by expert, so that each expert that is chosen runs once."""
        tokens = x.flatten(0, -2)
        weights, chosen = self.gate(tokens)
        order = chosen.flatten().argsort(stable=True)
        rows = order // chosen.shape[1]
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        parts = [
            self.experts[expert](tokens[part][None])[0] for expert, part in enumerate(rows.split(counts)) if len(part)
        ]
        weighted = torch.cat(parts) * weights.flatten()[order, None].to(x.dtype) if parts else tokens[:0]
        # in the order of the token's own choices, whatever else is in the batch: the same bits alone and among others
        by_choice = weighted[order.argsort()]
        out = by_choice.unflatten(0, chosen.shape).sum(1)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens[None])[0]
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(tokens).sigmoid()
            out = out + shared
        return out.view_as(x)
