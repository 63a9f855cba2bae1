"""xformers.ops.memory_efficient_attention and its bias classes, on every device and dtype of foveate.

    from foveate.integrations.xformers import memory_efficient_attention, LowerTriangularMask, BlockDiagonalMask

xformers' own bias objects are understood too, by their class names and fields; xformers need not be installed. A program that says
`import xformers.ops` runs unmodified after `foveate.integrations.xformers.install()`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import foveate


class AttentionBias:
    """What is added to the scores, or which of them count, as an object instead of a tensor."""

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The bias as a tensor [..., M, N]: 0 where the query sees the key and -inf where not, and what the class adds."""
        name = type(self).__name__
        M, N = shape[-2:]
        blocks = [(slice(0, M), slice(0, N))]
        if isinstance(self, BlockDiagonalMask):
            starts, lens = self.k_seqinfo.seqstart_py, self.k_seqinfo.seqlen_py
            ends = starts[1:] if lens is None else [a + n for a, n in zip(starts, lens)]
            rows = [slice(*pair) for pair in pairwise(self.q_seqinfo.seqstart_py)]
            blocks = list(zip(rows, map(slice, starts, ends)))
        left, right = _window(self, name)
        seen = torch.zeros(M, N, dtype=torch.bool, device=device)
        for row, key in blocks:
            i, j = (torch.arange(x.stop - x.start, device=device) for x in (row, key))
            distance = j - i[:, None] - (0 if _CORNERS[name] == "top-left" else len(j) - len(i))
            seen[row, key] = ((left < 0) | (distance >= -left)) & ((right < 0) | (distance <= right))
        bias = torch.zeros(M, N, dtype=dtype, device=device).masked_fill(~seen, float("-inf")).expand(*shape)
        added = getattr(self, "_bias", None)
        return bias if added is None else bias + added


class LowerTriangularMask(AttentionBias):
    """Query i sees keys 0 to i (top-left)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Top-left causal, and a tensor that is added."""

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias


@dataclass
class LowerTriangularFromBottomRightMask(AttentionBias):
    """The last query sees the last key."""

    def make_local_attention(self, window_size: int) -> LowerTriangularFromBottomRightLocalAttentionMask:
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The same, of _window_size keys, its own among them."""

    _window_size: int


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """-window_left <= key - query <= window_right, counted from the bottom right."""

    window_left: int
    window_right: int


@dataclass
class _SeqLenInfo:
    """Where each sequence starts: seqstart_py[b] to seqstart_py[b + 1]; of padded keys only seqlen_py[b] from there on."""

    seqstart_py: list[int]
    seqlen_py: list[int] | None = None

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int]) -> _SeqLenInfo:
        starts = [0]
        for length in seqlens:
            starts.append(starts[-1] + length)
        return cls(starts)

    @classmethod
    def from_seqlens_padded(cls, seqlens: Sequence[int], padding: int) -> _SeqLenInfo:
        if any(n > padding for n in seqlens):
            raise ValueError(f"sequences of {list(seqlens)} keys do not fit into {padding} each")
        return cls([b * padding for b in range(len(seqlens) + 1)], list(seqlens))


@dataclass
class BlockDiagonalMask(AttentionBias):
    """Sequences packed into one row of the batch: a query sees the keys of its own sequence."""

    q_seqinfo: Any
    k_seqinfo: Any
    _batch_sizes: Sequence[int] | None = field(default=None, kw_only=True)

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, **_: Any
    ) -> BlockDiagonalMask:
        if kv_seqlen is not None and len(kv_seqlen) != len(q_seqlen):
            raise ValueError(
                f"{len(q_seqlen)} sequences of queries and {len(kv_seqlen)} of keys: there must be as many"
            )
        q_info = _SeqLenInfo.from_seqlens(q_seqlen)
        return cls(q_info, q_info if kv_seqlen is None else _SeqLenInfo.from_seqlens(kv_seqlen))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[BlockDiagonalMask, Tensor]:
        """(mask, the tensors [B, M, ...] side by side [1, sum of B * M, ...])."""
        mask = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        mask._batch_sizes = [x.shape[0] for x in tensors]
        return mask, torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], 1)

    @classmethod
    def from_tensor_lists_qk(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor]
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor]:
        """(mask, queries and keys side by side), each list as in `from_tensor_list`, with as many sequences."""
        (mask, q), (of_keys, k) = cls.from_tensor_list(tensors_q), cls.from_tensor_list(tensors_k)
        if mask._batch_sizes != of_keys._batch_sizes:
            raise ValueError(
                f"the queries are batches of {mask._batch_sizes} and the keys of {of_keys._batch_sizes}; they must be equal"
            )
        mask.k_seqinfo = of_keys.q_seqinfo
        return mask, q, k

    @classmethod
    def from_tensor_lists_qkv(
        cls, tensors_q: Sequence[Tensor], tensors_k: Sequence[Tensor], tensors_v: Sequence[Tensor] | None = None
    ) -> tuple[BlockDiagonalMask, Tensor, Tensor, Tensor | None]:
        """`from_tensor_lists_qk`, and the values side by side."""
        mask, q, k = cls.from_tensor_lists_qk(tensors_q, tensors_k)
        return mask, q, k, None if tensors_v is None else cls.from_tensor_list(tensors_v)[1]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """[1, total, ...] back into the tensors of `from_tensor_list`, or one [1, M, ...] for each sequence."""
        return self._split(tensor, self.q_seqinfo.seqstart_py)

    split_queries = split

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """`split` of keys or values."""
        return self._split(tensor, self.k_seqinfo.seqstart_py)

    def _split(self, tensor: Tensor, starts: list[int]) -> list[Tensor]:
        sizes = [1] * (len(starts) - 1) if self._batch_sizes is None else self._batch_sizes
        parts, b = [], 0
        for size in sizes:
            part = tensor[:, starts[b] : starts[b + size]]
            parts.append(part.reshape(size, -1, *tensor.shape[2:]))
            b += size
        return parts

    def make_causal(self) -> BlockDiagonalCausalMask:
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, _batch_sizes=self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        return BlockDiagonalCausalFromBottomRightMask(self.q_seqinfo, self.k_seqinfo, _batch_sizes=self._batch_sizes)

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        return BlockDiagonalCausalLocalAttentionMask(
            self.q_seqinfo, self.k_seqinfo, window_size, _batch_sizes=self._batch_sizes
        )

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, window_size, _batch_sizes=self._batch_sizes
        )


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Causal in each sequence, top-left: query i of it sees keys 0 to i."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Causal in each sequence, its last query sees its last key."""


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Top-left causal of _window_size keys."""

    _window_size: int = 0


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """Bottom-right causal of _window_size keys."""

    _window_size: int = 0


class BlockDiagonalPaddedKeysMask(BlockDiagonalMask):
    """Keys padded to one length: k_seqinfo.seqlen_py of them are there."""

    @classmethod
    def from_seqlens(  # type: ignore[override]
        cls, q_seqlen: Sequence[int], kv_padding: int, kv_seqlen: Sequence[int], **_: Any
    ) -> BlockDiagonalPaddedKeysMask:
        return cls(_SeqLenInfo.from_seqlens(q_seqlen), _SeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding))


class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The same, bottom-right causal."""


def install(*, replace: bool = False) -> None:
    """From now on `import xformers.ops` gives this module, for the whole process.

    It has memory_efficient_attention and the bias classes, nothing else of xformers. Raises RuntimeError if xformers has been imported,
    unless replace=True: what took functions from it before keeps them.
    """
    here = sys.modules[__name__]
    if getattr(sys.modules.get("xformers"), "ops", None) is here:
        return
    if "xformers" in sys.modules and not replace:
        raise RuntimeError(
            "xformers has been imported already; call install() before the program imports it, or install(replace=True)"
        )
    package = ModuleType("xformers", "foveate in the place of xformers")
    package.__spec__ = ModuleSpec("xformers", None, is_package=True)
    package.__path__ = []  # a package
    package.ops = here  # type: ignore[attr-defined]
    sys.modules["xformers"] = package
    for name in ("ops", "ops.fmha", "ops.fmha.attn_bias"):
        sys.modules[f"xformers.{name}"] = here


def __getattr__(name: str) -> Any:
    if name in ("fmha", "attn_bias"):  # xformers.ops.fmha.attn_bias.BlockDiagonalMask and its kind
        return sys.modules[__name__]
    raise AttributeError(
        f"foveate.integrations.xformers has no {name}; it has memory_efficient_attention and the bias classes"
    )


# Where each class is causal, if it is. Classes of other names are refused, not guessed.
_CORNERS: dict[str, str | None] = {
    "LowerTriangularMask": "top-left",
    "LowerTriangularMaskWithTensorBias": "top-left",
    "LowerTriangularFromBottomRightMask": "bottom-right",
    "LowerTriangularFromBottomRightLocalAttentionMask": "bottom-right",
    "LocalAttentionFromBottomRightMask": None,
    "BlockDiagonalMask": None,
    "BlockDiagonalPaddedKeysMask": None,
    "BlockDiagonalCausalMask": "top-left",
    "BlockDiagonalCausalLocalAttentionMask": "top-left",
    "BlockDiagonalCausalFromBottomRightMask": "bottom-right",
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": "bottom-right",
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": "bottom-right",
}


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(scale * query @ key.T + attn_bias) @ value, dropout with probability p. Returns query's shape with value's last dimension.

    query [B, M, H, K], key [B, N, H, K], value [B, N, H, Kv]; or [B, M, K] of one head; or [B, M, G, H, K], in which keys that are
    expanded over H are read once. attn_bias: floating, broadcasting to [B, H, M, N] and added; or one of the classes of this module
    or xformers. scale: K**-0.5 if None. op chooses one of xformers' kernels and must be None. Differentiable.
    """
    if op is not None:
        raise foveate.UnsupportedError(f"op={op!r} names a kernel of xformers; pass op=None, which runs foveate's")
    shape = query.shape
    if query.dim() == 3:
        query, key, value = (x[:, :, None] for x in (query, key, value))
    elif query.dim() == 5:
        query, key, value = query.flatten(2, 3), _groups(key), _groups(value)
    elif query.dim() != 4:
        raise ValueError(f"query has shape {list(shape)}; it takes [B, M, K], [B, M, H, K] or [B, M, G, H, K]")
    if isinstance(attn_bias, Tensor) and attn_bias.dim() == 5:
        attn_bias = attn_bias.flatten(1, 2)
    out = _attend(query, key, value, attn_bias, {"dropout_p": p, "scale": scale})
    out = out.reshape(*shape[:-1], out.shape[-1])
    return out if output_dtype is None else out.to(output_dtype)


def _groups(x: Tensor) -> Tensor:
    """[B, N, G, H, K] as heads: G of them where the H are one expanded, else G * H."""
    return x[:, :, :, 0] if x.shape[3] == 1 or x.stride(3) == 0 else x.flatten(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Any, options: dict[str, Any]) -> Tensor:
    if bias is None or isinstance(bias, Tensor):
        mask = bias if bias is not None and bias.dtype is torch.bool else None
        if bias is not None and bias.dim() == 3:
            bias = bias.view(q.shape[0], -1, *bias.shape[1:])  # [B * H, M, N] of xformers' three-dimensional form
        return foveate.attention(q, k, v, mask=mask, bias=None if mask is not None else bias, **options)
    name = type(bias).__name__
    if name not in _CORNERS:
        raise foveate.UnsupportedError(
            f"attn_bias is a {name}, which foveate does not serve; it serves {', '.join(_CORNERS)}, and tensors"
        )
    left, right = _window(bias, name)
    if not hasattr(bias, "q_seqinfo"):
        added = getattr(bias, "_bias", getattr(bias, "_subtensor", None)) if name.endswith("TensorBias") else None
        if _CORNERS[name] == "top-left":
            shift = q.shape[1] - k.shape[1]  # from the bottom right, where foveate counts
            if shift <= 0:
                k, v, right = k[:, : q.shape[1]], v[:, : q.shape[1]], 0
                added = None if added is None else added[..., : q.shape[1]]
            else:
                right = shift
        return foveate.attention(q, k, v, window=(left, right), bias=added, **options)
    if q.shape[0] != 1:
        raise ValueError(f"{name} describes sequences packed into one row; query has a batch of {q.shape[0]}")
    return _packed_sequences(q[0], k[0], v[0], bias, _CORNERS[name] == "top-left", (left, right), options)[None]


def _window(bias: Any, name: str) -> tuple[int, int]:
    """(left, right) in distances from the bottom right; -1 is unlimited. Causal is right = 0."""
    if name == "LocalAttentionFromBottomRightMask":
        return bias.window_left, bias.window_right
    size = getattr(bias, "_window_size", None) if "Local" in name else None
    return (-1 if size is None else size - 1), (-1 if _CORNERS[name] is None else 0)


def _packed_sequences(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, top_left: bool, window: tuple[int, int], options: dict[str, Any]
) -> Tensor:
    starts_q, starts_k = list(bias.q_seqinfo.seqstart_py), list(bias.k_seqinfo.seqstart_py)
    lens_q = [b - a for a, b in pairwise(starts_q)]
    lens_k = getattr(bias.k_seqinfo, "seqlen_py", None)
    lens_k = [b - a for a, b in pairwise(starts_k)] if lens_k is None else list(lens_k)
    if starts_q[-1] != q.shape[0] or starts_k[-1] > k.shape[0] or len(lens_q) != len(lens_k):
        raise ValueError(
            f"attn_bias describes {starts_q[-1]} queries and {starts_k[-1]} keys of {len(lens_q)} and {len(lens_k)} sequences; "
            f"query has {q.shape[0]} and key {k.shape[0]}"
        )
    if top_left:
        if any(n > m for n, m in zip(lens_q, lens_k)):
            return _one_by_one(q, k, v, starts_q, starts_k, lens_k, window[0], options)
        lens_k = lens_q  # no query sees a key after the one of its own number
    ends = [start + n for start, n in zip(starts_k, lens_k)]
    if ends != starts_k[1:] or ends[-1:] != [k.shape[0]]:
        rows = torch.cat([torch.arange(a, b, device=k.device) for a, b in zip(starts_k, ends)])
        k, v = k[rows], v[rows]
    cu_q = torch.tensor(starts_q, dtype=torch.int32, device=q.device)
    cu_k = torch.tensor(_SeqLenInfo.from_seqlens(lens_k).seqstart_py, dtype=torch.int32, device=q.device)
    return foveate.attention_varlen(
        q, k, v, cu_q, cu_k, max(lens_q, default=0), max(lens_k, default=0), window=window, **options
    )


def _one_by_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    lens_k: list[int],
    left: int,
    options: Any,
) -> Tensor:
    """Top-left causal where a sequence has more queries than keys: each has its own distance between the corners."""
    parts = []
    for b, n in enumerate(lens_k):
        own_q, own = q[starts_q[b] : starts_q[b + 1]][None], slice(starts_k[b], starts_k[b] + n)
        mask = LowerTriangularMask()
        if left < 0:
            parts.append(_attend(own_q, k[own][None], v[own][None], mask, options)[0])
            continue
        shift = own_q.shape[1] - n
        window = (left - shift if left >= shift else 0, shift) if shift > 0 else (left, 0)
        if shift > left:
            raise foveate.UnsupportedError(
                f"a top-left window of {left + 1} keys with {own_q.shape[1]} queries and {n} keys: use fewer queries, or no window"
            )
        keys = k[own][: own_q.shape[1]][None], v[own][: own_q.shape[1]][None]
        parts.append(foveate.attention(own_q, *keys, window=window, **options)[0])
    return torch.cat(parts)
