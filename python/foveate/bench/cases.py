"""The cases: shapes and dtypes of each bench, a full and a quick list. A case's `name` is its row in tables and CSV files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class AttentionCase:
    """Self-attention of B sequences of S tokens, as many KV heads as query heads."""

    B: int
    S: int
    H: int
    D: int
    causal: bool
    dtype: str

    @property
    def name(self) -> str:
        return f"B{self.B} S{self.S} H{self.H} D{self.D} {'causal' if self.causal else 'full'}"

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, over batch and heads."""
        pairs = self.S * (self.S + 1) // 2 if self.causal else self.S * self.S
        return self.B * self.H * pairs


@dataclass(frozen=True)
class DecodeCase:
    """One query token for each of B sequences against a cache of S keys."""

    B: int
    S: int
    Hq: int
    Hkv: int
    D: int
    dtype: str

    @property
    def name(self) -> str:
        return f"B{self.B} S{self.S} H{self.Hq}/{self.Hkv} D{self.D}"

    @property
    def cache_bytes(self) -> int:
        return 2 * self.B * self.S * self.Hkv * self.D * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class RowsCase:
    """`rows` rows of `cols` logits. gradient: forward and backward."""

    rows: int
    cols: int
    dtype: str
    gradient: bool = False

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.cols}{' fwd+bwd' if self.gradient else ''}"

    @property
    def bytes(self) -> int:
        return self.rows * self.cols * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class LinearCase:
    """`rows` rows times a packed weight [outer, inner] in `format`; the rows are of `dtype`."""

    rows: int
    inner: int
    outer: int
    format: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.rows} row{'s' if self.rows > 1 else ''} x {self.outer} x {self.inner} {self.format}"


@dataclass(frozen=True)
class OverheadCase:
    """One query and one key: what a call costs beside its arithmetic. gradient: q, k and v require one."""

    op: str  # attention, attention_with_kv_cache
    H: int
    D: int
    dtype: str
    gradient: bool = False

    @property
    def name(self) -> str:
        return f"{self.op} B1 S1 H{self.H} D{self.D}{' with gradient' if self.gradient else ''}"


@dataclass(frozen=True)
class MemoryCase:
    """Forward and backward of causal self-attention in a process of its own."""

    B: int
    S: int
    H: int
    D: int
    dtype: str

    @property
    def name(self) -> str:
        return f"B{self.B} S{self.S} H{self.H} D{self.D} causal"


Case = AttentionCase | DecodeCase | RowsCase | LinearCase | OverheadCase | MemoryCase


def _attention(lengths: Sequence[int], dtypes: Sequence[str], H: int = 8) -> list[Case]:
    shapes = itertools.product(dtypes, (64, 128), (True, False), lengths)
    return [AttentionCase(1, S, H, D, causal, dtype) for dtype, D, causal, S in shapes]


def attention(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    return _attention((128,), dtypes, H=2) if quick else _attention((512, 1024, 2048, 4096), dtypes)


def backward(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    return _attention((128,), dtypes, H=2) if quick else _attention((512, 1024, 2048, 4096), dtypes)


def decode(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    if quick:
        return [DecodeCase(2, 256, 9, 3, 64, dtype) for dtype in dtypes]
    shapes = [(1, 1024), (8, 1024), (32, 1024), (1, 4096), (8, 4096), (32, 4096), (1, 32768), (8, 32768), (32, 32768)]
    heads = [(32, 8, 128), (9, 3, 64)]
    return [DecodeCase(B, S, *head, dtype) for dtype, head, (B, S) in itertools.product(dtypes, heads, shapes)]


def softmax(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    return [RowsCase(rows, cols, dtype) for dtype in dtypes for rows, cols in _rows(quick)]


def cross_entropy(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    shapes = itertools.product(dtypes, (False, True), _rows(quick))
    return [RowsCase(rows, cols, dtype, gradient) for dtype, gradient, (rows, cols) in shapes]


def _rows(quick: bool) -> list[tuple[int, int]]:
    """32 M elements: more than the caches hold."""
    return [(16, 1024)] if quick else [((32 << 20) // cols, cols) for cols in (1 << 10, 1 << 12, 1 << 15, 1 << 17)]


def linear(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    """One row reads the weights from memory, many rows multiply. Blocks meet fp32 rows."""
    formats = [(f, "fp32") for f in ("f32", "q8_0", "q4_0") if "fp32" in dtypes] + [("bf16", "bf16")] * (
        "bf16" in dtypes
    )
    inner, outer = (256, 320) if quick else (2048, 16384)
    return [LinearCase(rows, inner, outer, *f) for f in formats for rows in ((1, 5) if quick else (1, 16, 512))]


def overhead(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    return [
        OverheadCase(op, 8, 64, dtype, gradient)
        for dtype in dtypes
        for op, gradient in (("attention", False), ("attention", True), ("attention_with_kv_cache", False))
    ]


def memory(quick: bool, dtypes: Sequence[str]) -> list[Case]:
    lengths = (1024, 4096) if quick else (2048, 4096, 8192, 16384)
    return [MemoryCase(1, S, 4, 64, dtype) for dtype in dtypes for S in lengths]


BENCHES: dict[str, Callable[[bool, Sequence[str]], list[Case]]] = {
    "attention": attention,
    "backward": backward,
    "decode": decode,
    "softmax": softmax,
    "cross_entropy": cross_entropy,
    "linear": linear,
    "overhead": overhead,
    "memory": memory,
}
