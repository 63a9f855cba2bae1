"""Disentangled attention (He et al. 2020, arXiv 2006.03654): scores of contents and of relative positions, by products of their own."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models.deberta_config import DebertaConfig
from foveate.models.layers import split_heads
from foveate.models.sequences import PackedSequences
from foveate.ops.attention.dense import attention

_STEP = 16  # packed sequences whose lengths lie in one step of so many tokens are computed together


@functools.lru_cache(maxsize=64)
def _buckets(longest: int, buckets: int, max_relative: int) -> Tensor:
    """int64 [2 * longest - 1]: the bucket of each distance i - j from 1 - longest to longest - 1, on the CPU.

    The distances up to half of the buckets are their own, those beyond share buckets of growing width.
    """
    distance = torch.arange(1 - longest, longest, device="cpu")
    if not buckets:
        return distance
    half = buckets // 2
    size = distance.abs().clamp_min(half).float()  # the logarithm is for those beyond
    # in fp32 and in this order: at the edges of the buckets, rounding decides
    steps = torch.log(size / half) / torch.log(torch.tensor((max_relative - 1) / half, device="cpu")) * (half - 1)
    far = (torch.ceil(steps).long() + half) * distance.sign()
    return torch.where(distance.abs() <= half, distance, far)


@dataclass(frozen=True)
class Group:
    """Sequences that are computed together. places: int64 [n, S], the tokens in the packed row, or None for the batch as it is.

    rows: int64 [S, S], the row of the used part of the position table for query i and key j, or None without relative positions.
    inside: bool [n, S], False at padding, or None without any; options: of `attention`, which say where padding is.
    """

    places: Tensor | None
    rows: Tensor | None
    inside: Tensor | None
    options: dict[str, Any]

    def of(self, x: Tensor) -> Tensor:
        """The group's part [n, S, ...] of x: [B, S, ...], or [1, total, ...] if it is packed."""
        return x if self.places is None else x[0, self.places]


class Sequences:
    """How the sequences of one forward pass are laid out: a padded batch, or groups of packed ones of nearly the same length."""

    def __init__(
        self,
        config: DebertaConfig,
        tokens: Tensor,
        packed: PackedSequences | None,
        inside: Tensor | None,
        options: dict[str, Any],
    ) -> None:
        """inside: bool [B, S], False at the padding of a batch; options: what `attention` is told of it."""
        self._device = tokens.device
        self.attend = attention if packed is None else packed.attend_batch
        self._longest = tokens.shape[1] if packed is None else packed.longest
        self._table: Tensor | None = None
        self.used = slice(0, 0)  # the rows of the position table that the distances of these sequences reach
        if config.terms and self._longest:
            buckets = _buckets(self._longest, config.buckets, config.max_relative)
            rows = (buckets + config.span).clamp(0, 2 * config.span - 1)
            self.used = slice(int(rows[0]), int(rows[-1]) + 1)
            self._table = (rows - self.used.start).to(self._device)
        self._back: Tensor | None = None
        if packed is None:
            self.groups = [Group(None, self._rows(tokens.shape[1]), inside, options)]
        else:
            self.groups = list(self._grouped(packed))

    def _grouped(self, packed: PackedSequences) -> Iterator[Group]:
        starts = packed.cu_seqlens.tolist()
        lengths = [end - start for start, end in itertools.pairwise(starts)]
        back = torch.empty(starts[-1], dtype=torch.int64)
        before = 0
        order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: lengths[i])
        for _, alike in itertools.groupby(order, key=lambda i: (lengths[i] - 1) // _STEP):
            members = list(alike)
            length = torch.tensor([lengths[i] for i in members])
            step = torch.arange(lengths[members[-1]])
            inside = step < length[:, None]
            places = torch.tensor([starts[i] for i in members])[:, None] + step * inside
            back[places[inside]] = before + torch.arange(places.numel()).view(places.shape)[inside]
            before += places.numel()
            whole = bool(inside.all())
            options = {} if whole else {"kv_lens": length.int().to(self._device)}
            yield Group(
                places.to(self._device), self._rows(len(step)), None if whole else inside.to(self._device), options
            )
        self._back = back.to(self._device)

    def _rows(self, length: int) -> Tensor | None:
        if self._table is None:
            return None
        place = torch.arange(length, device=self._device)
        return self._table[place[:, None] - place + (self._longest - 1)]

    def join(self, parts: list[Tensor]) -> Tensor:
        """The groups' [n, S, ...] as [B, S, ...], or [1, total, ...] if they are packed."""
        if self._back is None:
            return parts[0]
        return torch.cat([part.flatten(0, 1) for part in parts])[self._back][None]


class DisentangledAttention(nn.Module):
    """scale * (q_i . k_j + q_i . pk_(i-j) + pq_(i-j) . k_j): pk and pq are projections of the embeddings of distances.

    The last two are a bias of `foveate.attention`, [n, H, S, S]; config.terms says which of them there are.
    """

    def __init__(self, config: DebertaConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.dropout_p, self.terms = config.num_heads, config.attention_dropout, config.terms
        self.scale = 1 / math.sqrt(size // config.num_heads * config.score_terms)
        self.query_proj = nn.Linear(size, size)
        self.key_proj = nn.Linear(size, size, bias=config.key_bias)
        self.value_proj = nn.Linear(size, size)
        own = not config.shared_projections
        self.pos_key_proj = nn.Linear(size, size, bias=config.key_bias) if own and "c2p" in config.terms else None
        self.pos_query_proj = nn.Linear(size, size) if own and "p2c" in config.terms else None
        self.pos_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, sequences: Sequences, positions: Tensor | None) -> Tensor:
        """x [B, S, hidden]; positions [rows, hidden]: what the table of distances has in sequences.used."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.query_proj, self.key_proj, self.value_proj))
        pos_k, pos_q = self._positions(positions)
        parts = []
        for group in sequences.groups:
            qs, ks, vs = group.of(q), group.of(k), group.of(v)
            bias = self._bias(qs, ks, pos_k, pos_q, group.rows)
            dropout_p = self.dropout_p if self.training else 0.0
            out = sequences.attend(qs, ks, vs, scale=self.scale, bias=bias, dropout_p=dropout_p, **group.options)
            parts.append(out.flatten(2))
        return sequences.join(parts)

    def _positions(self, positions: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Distances as keys and as queries, [rows, H, D] each, scaled."""
        if positions is None:
            return None, None
        positions = self.pos_dropout(positions)
        projections = (("c2p", self.pos_key_proj or self.key_proj), ("p2c", self.pos_query_proj or self.query_proj))
        pos_k, pos_q = (
            split_heads(project(positions), self.heads) * self.scale if term in self.terms else None
            for term, project in projections
        )
        return pos_k, pos_q

    def _bias(
        self, q: Tensor, k: Tensor, pos_k: Tensor | None, pos_q: Tensor | None, rows: Tensor | None
    ) -> Tensor | None:
        if rows is None:
            return None
        shape = (q.shape[0], self.heads, *rows.shape)
        found = []
        if pos_k is not None:
            found.append(torch.einsum("bshd,phd->bhsp", q, pos_k).gather(-1, rows.expand(shape)))
        if pos_q is not None:
            by_key = torch.einsum("bshd,phd->bhsp", k, pos_q).gather(-1, rows.t().expand(shape))
            found.append(by_key.transpose(-1, -2))
        return found[0] if len(found) == 1 else found[0] + found[1]
