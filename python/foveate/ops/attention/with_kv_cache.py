"""foveate.attention_with_kv_cache: what a call means is checked here, then the op of `with_kv_cache_op.py` runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from foveate.backend.registry import UnsupportedError
from foveate.ops import autograd, flops
from foveate.ops.attention import arguments as checks
from foveate.ops.attention import with_kv_cache_op as kv_cache_op
from foveate.ops.attention.operands import DTYPES
from foveate.ops.attention.with_kv_cache_op import QUANTIZED
from foveate.ops.autograd import is_tracked, is_wrapped
from foveate.ops.checks import (
    DtypeError,
    check_backend_name,
    check_flag,
    check_integer,
    check_number,
    check_same_device,
    check_strided,
)
from foveate.ops.torch_internals import forward_ad, transforms_are_active

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foveate.ops.attention.arguments import CacheOptions


@overload
def attention_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, kv_lens: Tensor, return_lse: Literal[True], **options: Unpack[CacheOptions]
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def attention_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, kv_lens: Tensor, return_lse: Literal[False] = False,
    **options: Unpack[CacheOptions],
) -> Tensor: ...  # fmt: skip
@overload
def attention_with_kv_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, kv_lens: Tensor, return_lse: bool, **options: Unpack[CacheOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def attention_with_kv_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    kv_lens: Tensor,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = False,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    k_scale: Tensor | float | None = None,
    v_scale: Tensor | float | None = None,
    num_splits: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Appends k and v to the cache in place, then attends from q to the L = kv_lens[b] + Snew keys of each sequence. No backward.

    q: [B, Sq, Hq, D]. Dense caches: k_cache [B, Smax, Hkv, D], v_cache [B, Smax, Hkv, Dv]. Paged caches: [pages, page_size, Hkv, D
    or Dv], any page_size, with block_table int32 [B, max_pages]: key t of sequence b is row t % page_size of page
    block_table[b, t // page_size]. Any strides, but the last dimension of a cache is contiguous. Hkv divides Hq; any D and Dv.
    k, v: [B, Snew, Hkv, D or Dv], written to positions kv_lens[b] + i; kv_lens: int32 or int64 [B], the keys that are there before.
    Returns out [B, Sq, Hq, Dv], or (out, lse [B, Hq, Sq]) with return_lse.

    rotary_cos, rotary_sin: [max_pos, rot / 2], rot <= D, of q's dtype or fp32. k row i is rotated by position kv_lens[b] + i before it
    is stored, q row i by kv_lens[b] + i, without k by kv_lens[b] - Sq + i; pairs are (c, c + rot / 2), or (2c, 2c + 1) with
    rotary_interleaved.

    With distance = j - (i + L - Sq) of key j and query i, s = scale * q.k; softcap * tanh(s / softcap); - alibi_slopes * |distance|;
    masks; softmax; @ v. causal: distance <= 0, the last query sees the last key. window (left, right): -left <= distance <= right, None
    or -1 is unlimited. scale: D**-0.5 if None. alibi_slopes: fp32 [Hq] or [B, Hq]. sinks: [Hq], one more logit of each row, without a
    value. A row that sees no key gives out 0 and lse -inf. Keys from L on, unused pages and pages that lie wholly before the window
    are never read, and their block_table entries may be anything.

    Caches of int8 or float8_e4m3fn hold value / scale, rounded to nearest even and clamped. k_scale, v_scale: fp32, one number or
    [Hkv], fixed; or one for each token and head, the cache's shape without the last dimension, written at append as max|x| / 127
    (int8) or max|x| / 448 (fp8).

    num_splits: parts into which the keys of a sequence are divided for parallel work, 0 for a choice by the shapes and the number
    of threads. batch_invariant: a row's result has the same bits whatever its batch and the number of threads are.
    lse: natural log of the sum of exp(s), without the sink, fp32. backend: "native", "triton", "reference", or None for the first that can.

    Raises ValueError or TypeError before anything is written. Flash decoding: Dao et al. 2023; paged caches: Kwon et al. 2023
    (arXiv 2309.06180).
    """
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        check_strided(name, x)
    for name, given in (("k", k), ("v", v)):
        if given is not None:
            check_strided(name, given)
    kind = "cpu" if q.is_cpu else q.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        q = _autocast(q, to)
        k, v = k if k is None else _autocast(k, to), v if v is None else _autocast(v, to)
    B, Hq, D = _check_tensors(q, k_cache, v_cache, k, v, kv_lens, block_table)
    k_scale = _check_cache_scale("k_scale", k_scale, k_cache)
    v_scale = _check_cache_scale("v_scale", v_scale, v_cache)
    _check_rotary(rotary_cos, rotary_sin, q)
    left, right = (-1, -1) if window is None else checks.check_window(window)
    scale = float(D) ** -0.5 if scale is None else checks.check_scale(scale)  # D is a tensor inside torch.jit.trace
    softcap = 0.0 if softcap is None else checks.check_softcap(softcap)
    if alibi_slopes is not None:
        alibi_slopes = checks.check_alibi(alibi_slopes, q, B, Hq)
    if sinks is not None:
        sinks = checks.check_sinks(sinks, q, Hq)
    num_splits = check_integer("num_splits", num_splits, "0 (chosen for you) or a positive integer")
    causal, rotary_interleaved = check_flag("causal", causal), check_flag("rotary_interleaved", rotary_interleaved)
    batch_invariant, return_lse = check_flag("batch_invariant", batch_invariant), check_flag("return_lse", return_lse)
    if num_splits < 0:
        raise ValueError(f"num_splits={num_splits} must be 0 (chosen for you) or more")
    transformed, forward_mode = transforms_are_active(), forward_ad._current_level >= 0
    if torch.is_grad_enabled() or transformed or forward_mode:
        for name, leaf in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("sinks", sinks),
                        ("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin), ("k_scale", k_scale), ("v_scale", v_scale)):  # fmt: skip
            if leaf is not None and (leaf.requires_grad or transformed or forward_mode):
                _refuse_derivative(name, leaf)
    if k is not None:
        if 0 in k_cache.stride() or 0 in v_cache.stride():
            _check_writable("k_cache", k_cache)
            _check_writable("v_cache", v_cache)
        for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scales is not None and scales.dim() == 3:
                _check_writable(name, scales)
    flops.register()
    how = autograd.way(
        q, k_cache, v_cache, k, v, kv_lens, block_table, rotary_cos, rotary_sin, alibi_slopes, sinks, k_scale, v_scale
    )
    attend = kv_cache_op.attend if how == "kernel" else kv_cache_op.op
    out, lse = attend(
        q, k_cache, v_cache, k, v, kv_lens, block_table, rotary_cos, rotary_sin, rotary_interleaved, causal, left, right,
        scale, softcap, alibi_slopes, sinks, k_scale, v_scale, num_splits, batch_invariant, check_backend_name(backend),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _refuse_derivative(name: str, x: Tensor) -> None:
    if torch.compiler.is_compiling() and transforms_are_active():
        raise UnsupportedError(
            "attention_with_kv_cache has no derivative, and inside torch.compile cannot see whether this transform of torch.func wants "
            "one; call it outside of the transform"
        )
    if is_tracked(x):
        what = "requires a gradient" if x.requires_grad else "carries a gradient or a tangent"
        raise ValueError(
            f"{name} {what}, but attention_with_kv_cache has no backward; call it under torch.no_grad() with plain tensors, or "
            "train with foveate.attention"
        )


def _check_writable(name: str, x: Tensor) -> None:
    shared = [d for d in range(x.dim()) if x.stride(d) == 0 and x.shape[d] > 1]
    if shared and not is_wrapped(x):
        raise ValueError(
            f"{name} of shape {_shape(x)} is expanded in dimension {shared[0]} (stride 0), where several rows are one memory, so new keys "
            f"cannot be written to it; pass {name}.contiguous(), or share pages by a block_table"
        )


def _autocast(x: Tensor, to: torch.dtype) -> Tensor:
    return x if x.dtype is torch.float64 else x.to(to)


def _check_tensors(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    kv_lens: Tensor,
    block_table: Tensor | None,
) -> tuple[int, int, int]:
    """B, Hq, D."""
    B, Hq, D = _check_cache(q, k_cache, v_cache)
    if k is not None or v is not None:
        _check_new(k, v, q, *v_cache.shape[2:])
    _check_places(q, k_cache, kv_lens, block_table)
    return B, Hq, D


def _check_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[int, int, int]:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4:
            raise ValueError(f"{name} has shape {_shape(x)}; it must have four dimensions, [B, S, H, D]")
        check_same_device(name, x, "q", q)
    B, _, Hq, D = q.shape
    Hkv = v_cache.shape[2]
    if k_cache.shape[:3] != v_cache.shape[:3]:
        raise ValueError(
            f"k_cache {_shape(k_cache)} and v_cache {_shape(v_cache)} must be equal but for the last dimension"
        )
    if k_cache.shape[3] != D:
        raise ValueError(
            f"q has head dim {D} and k_cache has {k_cache.shape[3]} (the last dimension); they must be equal"
        )
    if (Hq != 0) if Hkv == 0 else (Hq % Hkv != 0):
        raise ValueError(
            f"q has {Hq} heads and the cache has {Hkv}; the number of query heads must be a multiple of the KV heads"
        )
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"the last dimension of {name} has stride {x.stride(3)}; it must be contiguous, as the cache is written in place"
            )
    if q.dtype not in DTYPES:
        raise DtypeError(f"q is {q.dtype}; attention_with_kv_cache takes {', '.join(map(str, DTYPES))}")
    if k_cache.dtype is not v_cache.dtype:
        raise DtypeError(f"k_cache is {k_cache.dtype} and v_cache {v_cache.dtype}; they must be equal")
    if k_cache.dtype is not q.dtype and k_cache.dtype not in QUANTIZED:
        raise DtypeError(
            f"q is {q.dtype} and the cache {k_cache.dtype}; cast q to the cache's dtype, or store int8 or float8_e4m3fn"
        )
    return B, Hq, D


def _check_new(k: Tensor | None, v: Tensor | None, q: Tensor, Hkv: int, Dv: int) -> None:
    """The keys and values to append."""
    B, _, _, D = q.shape
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together: both new keys and their values are appended")
    if k is not None and v is not None:
        for name, x, dim in (("k", k, D), ("v", v, Dv)):
            if x.dim() != 4 or x.shape != (B, k.shape[1], Hkv, dim):
                raise ValueError(
                    f"{name} has shape {_shape(x)}; it must be [B, Snew, Hkv, head dim] = [{B}, Snew, {Hkv}, {dim}]"
                )
            if x.dtype is not q.dtype:
                raise DtypeError(f"{name} is {x.dtype} and q {q.dtype}; cast it with .to(q.dtype)")
            check_same_device(name, x, "q", q)


def _check_places(q: Tensor, k_cache: Tensor, kv_lens: Tensor, block_table: Tensor | None) -> None:
    """What says where each sequence's keys lie."""
    B = q.shape[0]
    if not isinstance(kv_lens, Tensor):
        raise TypeError(f"kv_lens must be a torch.Tensor [B] of int32 or int64, got {type(kv_lens).__name__}")
    if kv_lens.shape != (B,) or kv_lens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"kv_lens is {kv_lens.dtype} of shape {_shape(kv_lens)}; it must be int32 or int64 [{B}]")
    check_same_device("kv_lens", kv_lens, "q", q)
    if block_table is None:
        if k_cache.shape[0] != B:
            raise ValueError(
                f"q has batch size {B} and the cache {k_cache.shape[0]}; they must be equal, unless the cache is paged (block_table)"
            )
    else:
        if not isinstance(block_table, Tensor):
            raise TypeError(
                f"block_table must be a torch.Tensor int32 [B, max_pages], got {type(block_table).__name__}"
            )
        if block_table.dim() != 2 or block_table.shape[0] != B or block_table.dtype is not torch.int32:
            raise ValueError(
                f"block_table is {block_table.dtype} of shape {_shape(block_table)}; it must be int32 [B, max_pages] with B = {B}"
            )
        if block_table.shape[1] > 1 and block_table.stride(1) != 1:
            raise ValueError("the last dimension of block_table must be contiguous; pass block_table.contiguous()")
        if k_cache.shape[1] == 0:
            raise ValueError("the pages of k_cache hold no keys: page_size (dimension 1) is 0")
        check_same_device("block_table", block_table, "q", q)


def _check_cache_scale(name: str, scale: Tensor | float | None, cache: Tensor) -> Tensor | None:
    if cache.dtype not in QUANTIZED:
        if scale is not None:
            raise ValueError(
                f"{name} is given, but the cache is {cache.dtype}; only int8 and float8_e4m3fn caches have scales"
            )
        return None
    if scale is None:
        raise ValueError(
            f"the cache is {cache.dtype} and needs {name}: a float, fp32 [Hkv], or fp32 {_shape(cache)[:3]}, one for each token and head"
        )
    if not isinstance(scale, Tensor):
        return torch.full((), check_number(name, scale), dtype=torch.float32, device=cache.device)
    if tuple(scale.shape) not in ((), (cache.shape[2],), tuple(cache.shape[:3])) or scale.dtype is not torch.float32:
        raise ValueError(
            f"{name} is {scale.dtype} of shape {_shape(scale)}; it must be float32 and a number, [Hkv] = [{cache.shape[2]}], or "
            f"{_shape(cache)[:3]}, one for each token and head"
        )
    check_same_device(name, scale, name[0] + "_cache", cache)
    return scale


def _check_rotary(cos: Tensor | None, sin: Tensor | None, q: Tensor) -> None:
    if (cos is None) != (sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if cos is None or sin is None:
        return
    check_strided("rotary_cos", cos)
    check_strided("rotary_sin", sin)
    if cos.dim() != 2 or cos.shape != sin.shape or cos.dtype is not sin.dtype:
        raise ValueError(
            f"rotary_cos is {cos.dtype} {_shape(cos)} and rotary_sin {sin.dtype} {_shape(sin)}; both must be [max_pos, rot / 2]"
        )
    if cos.dtype not in (torch.float32, q.dtype):
        raise DtypeError(f"rotary_cos and rotary_sin are {cos.dtype}; they must be float32 or {q.dtype}, as q is")
    if 2 * cos.shape[1] > q.shape[3]:
        raise ValueError(
            f"rotary_cos rotates 2 * {cos.shape[1]} elements of each head, but the head dim is {q.shape[3]}"
        )
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        check_same_device(name, x, "q", q)
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous; pass {name}.contiguous()")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
