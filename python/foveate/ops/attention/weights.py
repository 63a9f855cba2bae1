"""foveate.attention_weights: the probabilities of chosen query rows, for looking at a model.

A composition: q.k of the chosen rows by torch, the options in plain torch, and the softmax op of the backend. So what it can do
(gradients in every mode, vmap, meta and fake tensors, torch.compile) is what these can.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.reference import attention as reference
from foveate.backend.reference.rows import safe_softmax
from foveate.backend.registry import register
from foveate.ops import autograd, dtensor
from foveate.ops.attention import arguments as checks
from foveate.ops.attention.definition import check_lengths
from foveate.ops.attention.operands import Operands
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.checks import check_integer, check_same_device, check_strided, composition_backend, compute_dtype
from foveate.ops.softmax import softmax
from foveate.ops.torch_internals import FakeTensor

register("attention_weights", "native", native.supports())
register("attention_weights", "triton", triton_backend.serves)
register("attention_weights", "reference", lambda query: None)


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    rows: int | Sequence[int] | Tensor,
    heads: int | Sequence[int] | None = None,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    sinks: Tensor | None = None,
    kv_lens: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q @ k.T + ...) of chosen query rows: what `attention` with these options multiplies v by.

    q: [B, Sq, Hq, D]; k: [B, Skv, Hkv, D]; as `attention` takes them. rows: the queries, R integers from -Sq to Sq - 1 (-1 is the
    last), or an integer tensor [R] or, for other rows of each batch entry, [B, R]. heads: query heads, H integers from -Hq to Hq - 1;
    all if None. The other options mean what they mean in `attention`, for the whole of q: bias and mask have its shape, not that of
    the rows. Returns [B, H, R, Skv] in fp32, in fp64 for fp64 inputs, in the order of rows and heads; an int counts as one of them.

    Each row sums to 1, with sinks to less, by what the sink takes. A row that sees no key is 0, keys beyond kv_lens and masked ones
    have 0, and NaN in keys beyond kv_lens stays there. Memory is O(B * H * R * Skv), and one KV head of k in the compute dtype.

    Differentiable in q, k, bias, the table, sinks and learned numbers, in both modes and any number of times. backend: whose softmax
    runs ("native", "triton" or "reference", None for the first that can); q.k is torch's matrix product in fp32, which on a GPU obeys
    torch.backends.cuda.matmul for fp32 inputs, and "reference" stores k once for each query head.

    Raises ValueError or TypeError for arguments that do not fit, UnsupportedError for a named backend that cannot serve the call.
    dropout_p is refused unless it is 0: these are the probabilities before dropout. Values of `rows` and kv_lens in tensors on a GPU
    are not checked.
    """
    B, Sq, Skv, Hq, _ = checks.check_dense(q, k, k)
    q, k, _ = checks.same_kind(q, k, k)
    if type(q) not in autograd.PLAIN_TYPES:
        dtensor.refuse(
            "attention_weights", "call it on q.to_local() and k.to_local(), the heads or the batch of this rank", q, k
        )
    if checks.check_dropout(dropout_p) > 0:
        raise ValueError(
            f"dropout_p={dropout_p}: attention_weights gives the probabilities before dropout; leave dropout_p out"
        )
    bias = None if bias is None else checks.check_scores_operand("bias", bias, q, (B, Hq, Sq, Skv))
    mask = None if mask is None else checks.check_scores_operand("mask", mask, q, (B, Hq, Sq, Skv))
    kv_lens = None if kv_lens is None else checks.check_lengths("kv_lens", kv_lens, q, B)
    chosen_rows = _check_rows(rows, q)
    Hq = int(Hq)  # a graph is of this number of heads: torch.export makes sizes symbolic
    chosen_heads = range(Hq) if heads is None else _check_heads(heads, Hq)
    c = Operands(
        *checks.normalised(
            q, k, k, bias, mask, kv_lens, None, None, Sq, Skv, B, Hq, causal, window, scale, softcap, alibi_slopes, relative_bias, sinks,
            0.0, None, False, backend,
        )
    )  # fmt: skip
    if kv_lens is not None and _has_values(kv_lens):
        check_lengths(c)
    backend = composition_backend("attention_weights", q.device.type, q.dtype, c.backend)
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        return _weights(c, chosen_rows, chosen_heads, backend)


def _weights(c: Operands, rows: Tensor, heads: Sequence[int], backend: str) -> Tensor:
    B, Sq, Hq, _ = c.q.shape
    Skv = c.k.shape[1]
    distance, inside = reference.distances(rows, Sq, Skv, c.kv_lens)
    every_head = list(heads) == list(range(Hq))
    places = None if every_head else torch.tensor(list(heads), dtype=torch.int64, device=c.q.device)

    def of_heads(x: Tensor | None, dim: int) -> Any:
        return x if x is None or places is None or (x.dim() == 4 and x.shape[dim] == 1) else x.index_select(dim, places)

    def of_rows(x: Tensor | None, dim: int) -> Any:
        return x if x is None or x.shape[dim] == 1 != Sq else _take(x, rows, dim)

    q = c.scale * of_rows(c.q, 1).to(compute_dtype(c.q))
    product = _product if backend == "reference" else _product_by_kv_head
    s = reference.masked_scores(
        product(q, c.k, heads, None if c.kv_lens is None else inside.view(B, Skv, 1)), distance, inside,
        causal=c.causal, window=(c.window_left, c.window_right), softcap=c.softcap, bias=of_heads(of_rows(c.bias, 2), 1),
        mask=of_heads(of_rows(c.mask, 2), 1), alibi_slopes=of_heads(c.alibi, 1), rel_table=of_heads(c.rel_table, 1),
        rel_bidirectional=c.rel_bidirectional, rel_max_distance=c.rel_max_distance,
    )  # fmt: skip
    sinks = of_heads(c.sinks, 0)
    if sinks is not None:
        s = reference.with_sinks(s, sinks)
    p = safe_softmax(s)[0] if backend == "reference" else softmax(s, backend=backend)
    return p if sinks is None else p[..., :Skv].contiguous()


def _product(q: Tensor, k: Tensor, heads: Sequence[int], inside: Tensor | None) -> Tensor:
    """q.k of q [B, R, Hq, D] for some of its heads: [B, H, R, Skv]. inside: bool [B, Skv, 1], the keys that may be read."""
    group = int(q.shape[2] // max(k.shape[2], 1))
    keys = k.to(q.dtype) if inside is None else torch.where(inside[..., None], k.to(q.dtype), 0.0)
    chosen = list(heads)
    return torch.einsum("bihd,bjhd->bhij", q[:, :, chosen], keys[:, :, [h // group for h in chosen]])


def _product_by_kv_head(q: Tensor, k: Tensor, heads: Sequence[int], inside: Tensor | None) -> Tensor:
    """`_product`, with one KV head at a time in the compute dtype."""
    B, R, Hq, D = q.shape
    group = int(Hq // max(k.shape[2], 1))
    products: dict[int, Tensor] = {}
    for kv_head in dict.fromkeys(h // group for h in heads):
        members = [h for h in dict.fromkeys(heads) if h // group == kv_head]
        keys = k[:, :, kv_head].to(q.dtype)
        if inside is not None:  # 0 * NaN is NaN
            keys = torch.where(inside, keys, 0.0)
        some = torch.stack([q[:, :, h] for h in members], 1).reshape(B, len(members) * R, D)
        products |= zip(members, (some @ keys.mT).view(B, len(members), R, k.shape[1]).unbind(1))
    if not products:
        return q.new_zeros(B, 0, R, k.shape[1])
    return torch.stack([products[h] for h in heads], 1)


def _take(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """The entries `rows` of a dimension, other ones of each batch entry if rows is [B, R]."""
    if rows.dim() == 1:
        return x.index_select(dim, rows)
    x = x.expand(rows.shape[0], *x.shape[1:])
    shape = list(x.shape)
    shape[dim] = rows.shape[1]
    index = rows.view(rows.shape[0], *(-1 if d == dim else 1 for d in range(1, x.dim())))
    return x.gather(dim, index.expand(shape))


def _check_rows(rows: int | Sequence[int] | Tensor, q: Tensor) -> Tensor:
    """int64 [R] or [B, R] on q's device, from 0 on."""
    B, Sq = q.shape[:2]
    if not isinstance(rows, Tensor):
        return torch.tensor(_check_places("rows", "queries", rows, Sq), dtype=torch.int64, device=q.device)
    check_strided("rows", rows)
    if rows.is_floating_point() or rows.is_complex() or rows.dtype is torch.bool:
        raise TypeError(f"rows is {rows.dtype}; it must have integers, the places of queries (mask.nonzero()[:, 0])")
    if rows.dim() not in (1, 2) or (rows.dim() == 2 and rows.shape[0] != B):
        raise ValueError(f"rows has shape {list(rows.shape)}; it must be [R], or [B, R] with B = {B}")
    check_same_device("rows", rows, "q", q)
    rows = rows.to(torch.int64)
    if _has_values(rows):
        wrong = rows[(rows < -Sq) | (rows >= Sq)]
        if wrong.numel():
            raise ValueError(f"rows has {int(wrong[0])}; q has {Sq} queries, so rows go from {-Sq} to {Sq - 1}")
    return torch.where(rows < 0, rows + Sq, rows)


def _check_heads(heads: int | Sequence[int], Hq: int) -> list[int]:
    if isinstance(heads, Tensor):
        raise TypeError("heads must be integers, got a tensor; pass heads.tolist()")
    return _check_places("heads", "heads", heads, Hq)


def _check_places(name: str, what: str, places: int | Sequence[int], size: int) -> list[int]:
    if isinstance(places, (str, bytes)):
        raise TypeError(f"{name}={places!r} must be integers")
    given: list[Any] = list(places) if isinstance(places, Iterable) else [places]
    checked = []
    for place in given:
        if isinstance(place, bool) or type(place).__name__ == "bool":
            raise TypeError(f"{name} has {place}; it must have integers, the places of those that are wanted")
        place = check_integer(f"an entry of {name}", place)
        if not -size <= place < size:
            raise ValueError(f"{name} has {place}; q has {size} {what}, so {name} go from {-size} to {size - 1}")
        checked.append(place % size)
    return checked


def _has_values(x: Tensor) -> bool:
    """Whether they can be read here without waiting for a device."""
    if torch.compiler.is_compiling() or autograd.is_wrapped(x):
        return False
    return x.is_cpu and not isinstance(x, FakeTensor)
