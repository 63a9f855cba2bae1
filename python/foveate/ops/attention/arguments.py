"""What the arguments of attention mean, checked: each function returns its argument in the form that the op takes, or raises a
sentence. Values that need data (kv_lens, cu_seqlens) are checked below the op, where reading them costs no device sync on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.ops import autograd
from foveate.ops.attention.operands import DTYPES
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.checks import (
    DtypeError,
    check_backend_name,
    check_flag,
    check_floating,
    check_generator,
    check_integer,
    check_learned,
    check_number,
    check_same_device,
    check_strided,
    compute_dtype,
)

if TYPE_CHECKING:
    from typing_extensions import TypedDict

    class SharedOptions(TypedDict, total=False):
        """The options that `attention`, `attention_varlen` and `ring_attention` share, for the overloads of return_lse."""

        causal: bool
        window: tuple[int | None, int | None] | None
        scale: float | Tensor | None
        softcap: float | Tensor | None
        alibi_slopes: Tensor | None
        relative_bias: RelativeBias | None
        sinks: Tensor | None
        score_mod: Any
        score_mod_bwd: Any
        score_mod_aux: Sequence[Tensor]
        dropout_p: float
        generator: torch.Generator | None
        deterministic: bool
        backend: str | None

    class DenseOptions(SharedOptions, total=False):
        bias: Tensor | None
        mask: Tensor | None
        kv_lens: Tensor | None

    class CacheOptions(TypedDict, total=False):
        """The options of `attention_with_kv_cache`, for its overloads of return_lse."""

        k: Tensor | None
        v: Tensor | None
        block_table: Tensor | None
        rotary_cos: Tensor | None
        rotary_sin: Tensor | None
        rotary_interleaved: bool
        causal: bool
        window: tuple[int | None, int | None] | None
        scale: float | None
        softcap: float | None
        alibi_slopes: Tensor | None
        sinks: Tensor | None
        k_scale: Tensor | float | None
        v_scale: Tensor | float | None
        num_splits: int
        batch_invariant: bool
        backend: str | None


_UNLIMITED = 2**40  # a longer window than this is as good as none, and keeps index arithmetic far from overflow


def normalised(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any, kv_lens: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, B: int, Hq: int,
    causal: bool, window: Any, scale: Any, softcap: Any, alibi_slopes: Any, relative_bias: Any, sinks: Any, dropout_p: float,
    generator: torch.Generator | None, deterministic: bool, backend: str | None,
) -> tuple[Any, ...]:  # fmt: skip
    """`Operands` as a plain tuple, of operands that have been checked and the options that dense and packed calls share."""
    if type(causal) is not bool or type(deterministic) is not bool:
        causal, deterministic = check_flag("causal", causal), check_flag("deterministic", deterministic)
    D = q.shape[-1]
    if isinstance(scale, Tensor):
        q, scale = scaled(q, scale, Hq), 1.0
    else:
        scale = D**-0.5 if scale is None else check_scale(scale)
    if isinstance(softcap, Tensor):
        softcap = check_learned_softcap(softcap, q, backend)
    else:
        softcap = 0.0 if softcap is None else check_softcap(softcap)
    left, right = (-1, -1) if window is None else check_window(window)
    alibi = table = philox = None
    bidirectional, max_distance = True, 0
    if alibi_slopes is not None:
        alibi = check_alibi(alibi_slopes, q, B, Hq)
    if relative_bias is not None:
        table = check_table(relative_bias, q, Hq)
        bidirectional, max_distance = relative_bias.bidirectional, relative_bias.max_distance
    if sinks is not None:
        sinks = check_sinks(sinks, q, Hq)
    if generator is not None:
        check_generator(generator)
    if type(dropout_p) is not float or dropout_p != 0:
        dropout_p = check_dropout(dropout_p)
        philox = draw_philox(q.device, generator) if dropout_p > 0 else None
    return (
        q, k, v, bias, mask, alibi, table, sinks, kv_lens, cu_q, cu_k, philox, max_q, max_k, causal, left, right, scale, softcap,
        bidirectional, max_distance, dropout_p, deterministic or torch.are_deterministic_algorithms_enabled(),
        check_backend_name(backend),
    )  # fmt: skip


def check_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int, int, int, int]:
    """B, Sq, Skv, Hq, D of q [B, Sq, Hq, D], k [B, Skv, Hkv, D], v [B, Skv, Hkv, Dv]."""
    _check_tensors(q, k, v)
    qs, ks, vs = q.shape, k.shape, v.shape
    if len(qs) != 4 or len(ks) != 4 or len(vs) != 4:
        raise ValueError(
            "q, k and v must have four dimensions, [B, S, H, D]; "
            f"got shapes {_shape(q)}, {_shape(k)} and {_shape(v)}{_rank_cure(q, k, v)}"
        )
    B, Sq, Hq, D = qs
    Bk, Skv, Hkv, Dk = ks
    Bv, Sv, Hv, Dv = vs
    if Bk != B or Bv != B:
        raise ValueError(f"q, k and v have batch sizes {B}, {Bk} and {Bv}; they must be equal (expand the smaller one)")
    if Sv != Skv:
        raise ValueError(f"k has {Skv} keys and v has {Sv} values; they must be equal")
    _check_heads(Hq, Hkv, Hv, D, Dk, Dv)
    return B, Sq, Skv, Hq, D


def check_packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, int]:
    """Hq, D of q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv]."""
    _check_tensors(q, k, v)
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ValueError(
            "packed q, k and v must have three dimensions, [total, H, D]; "
            f"got shapes {_shape(q)}, {_shape(k)} and {_shape(v)}"
        )
    _, Hq, D = q.shape
    total_k, Hkv, Dk = k.shape
    total_v, Hv, Dv = v.shape
    if total_v != total_k:
        raise ValueError(f"k has {total_k} keys and v has {total_v} values; they must be equal")
    _check_heads(Hq, Hkv, Hv, D, Dk, Dv)
    return Hq, D


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not (isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise TypeError(f"q, k and v must be torch.Tensors, got {_type(q)}, {_type(k)} and {_type(v)}")
    if not (q.layout is k.layout is v.layout is torch.strided) or q.is_nested or k.is_nested or v.is_nested:
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_strided(name, x)


def _check_heads(Hq: int, Hkv: int, Hv: int, D: int, Dk: int, Dv: int) -> None:
    if Hv != Hkv:
        raise ValueError(f"k has {Hkv} heads and v has {Hv}; they must be equal")
    if (Hq != 0) if Hkv == 0 else (Hq % Hkv != 0):
        raise ValueError(
            f"q has {Hq} heads and k and v have {Hkv}; the number of query heads must be a multiple of the number of KV heads"
        )
    if Dk != D:
        raise ValueError(f"q has head dim {D} and k has {Dk}; they must be equal")
    if D == 0 or Dv == 0:
        raise ValueError(f"head dims are {D} for q and k and {Dv} for v; attention takes 1 or more")


def same_kind(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of one device and dtype, cast by autocast where it is on."""
    dtype = q.dtype
    if q.is_cpu and k.is_cpu and v.is_cpu:
        kind = "cpu"
    else:
        device = q.device
        if k.device != device or v.device != device:
            raise ValueError(
                f"q, k and v are on {device}, {k.device} and {v.device}; move them to one device with .to(q.device)"
            )
        kind = device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        # As torch's own attention: everything floating but fp64 is cast.
        to = torch.get_autocast_dtype(kind)
        q, k, v = (x.to(to) if x.dtype in _AUTOCAST_DTYPES else x for x in (q, k, v))
        dtype = q.dtype
    if k.dtype is not dtype or v.dtype is not dtype:
        raise DtypeError(f"q, k and v have dtypes {dtype}, {k.dtype} and {v.dtype}; cast them to one with .to(q.dtype)")
    if dtype not in DTYPES:
        raise DtypeError(f"q, k and v have dtype {dtype}; attention takes {', '.join(map(str, DTYPES))}")
    return q, k, v


_AUTOCAST_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def scaled(q: Tensor, scale: Tensor, Hq: int) -> Tensor:
    """q [..., Hq, D] times a learned scale of shape () or [Hq], rounded once to q's dtype."""
    check_floating("scale", scale)
    check_same_device("scale", scale, "q", q)
    if tuple(scale.shape) not in ((), (Hq,)):
        raise ValueError(
            f"scale has shape {_shape(scale)}; a learned one is a tensor of one number, of shape [], or of one for each of the {Hq} "
            f"query heads, [{Hq}]"
        )
    dtype = compute_dtype(q)
    return (q.to(dtype) * scale.to(dtype)[..., None]).to(q.dtype)


def check_scale(scale: float) -> float:
    return check_number("scale", scale, "a finite number, or None for D**-0.5")


def check_learned_softcap(softcap: Tensor, q: Tensor, backend: str | None) -> Tensor:
    check_learned("softcap", softcap, "q", q, backend)
    return softcap.to(compute_dtype(q))


def check_softcap(softcap: float) -> float:
    wanted = "a finite number above 0, or None or 0 for none"
    softcap = check_number("softcap", softcap, wanted)
    if softcap < 0:
        raise ValueError(f"softcap={softcap} must be {wanted}")
    return softcap


def check_dropout(dropout_p: float) -> float:
    wanted = "a probability in [0, 1)"
    dropout_p = check_number("dropout_p", dropout_p, wanted)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p} must be {wanted}")
    return dropout_p


_WINDOW = "a pair (left, right) of integers from 0 up, where None or -1 is unlimited"


def check_window(window: tuple[int | None, int | None]) -> tuple[int, int]:
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window={window!r} must be {_WINDOW}")
    left, right = (-1 if side is None else side for side in window)
    if not (isinstance(left, int) and isinstance(right, int)):
        wanted = f"one of {_WINDOW}, in {window!r}"
        left, right = (check_integer("a side of window", side, wanted) for side in (left, right))
    if left < -1 or right < -1:
        raise ValueError(f"window=({left}, {right}) must be {_WINDOW}")
    return (-1 if left > _UNLIMITED else left), (-1 if right > _UNLIMITED else right)


def check_scores_operand(name: str, x: Tensor, q: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """bias or mask as a view of four dimensions."""
    check_strided(name, x)
    if name == "mask" and x.dtype is not torch.bool:
        raise ValueError(
            f"mask has dtype {x.dtype}; it must be torch.bool with True = keep (an additive mask goes to bias)"
        )
    if name == "bias" and x.dtype not in DTYPES:
        raise ValueError(f"bias has dtype {x.dtype}; it must be floating (a bool mask goes to mask)")
    check_same_device(name, x, "q", q)
    if x.dim() < 4:
        x = x[(None,) * (4 - x.dim())]
    if x.dim() > 4 or any(size != 1 and size != full for size, full in zip(x.shape, shape)):
        raise ValueError(
            f"{name} of shape {_shape(x)} does not broadcast to [B, Hq, Sq, Skv] = {list(shape)}; "
            "each of its dimensions must be 1 or equal"
        )
    return x


def check_alibi(slopes: Tensor, q: Tensor, B: int, Hq: int) -> Tensor:
    """fp32 [1 or B, Hq]."""
    if not isinstance(slopes, Tensor):
        raise TypeError(f"alibi_slopes must be a torch.Tensor, got {_type(slopes)}")
    if tuple(slopes.shape) not in ((Hq,), (B, Hq)) or not slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes must be float32 of shape [Hq] = [{Hq}] or [B, Hq] = [{B}, {Hq}]; "
            f"got {slopes.dtype} of shape {_shape(slopes)}"
        )
    check_same_device("alibi_slopes", slopes, "q", q)
    if autograd.is_tracked(slopes):
        raise ValueError("alibi_slopes has no gradient; pass alibi_slopes.detach(), or learn a bias")
    slopes = slopes.to(torch.float32).contiguous()
    return slopes[None] if slopes.dim() == 1 else slopes


def check_table(relative_bias: RelativeBias, q: Tensor, Hq: int) -> Tensor:
    """The table [buckets, Hq] in the accumulation dtype."""
    if not isinstance(relative_bias, RelativeBias):
        raise TypeError(f"relative_bias must be a foveate.RelativeBias, got {_type(relative_bias)}")
    table = relative_bias.table
    if table.shape[1] != Hq:
        raise ValueError(f"the table of relative_bias has shape {_shape(table)}, [buckets, Hq]; q has {Hq} heads")
    check_same_device("the table of relative_bias", table, "q", q)
    return table.to(compute_dtype(q)).contiguous()


def check_sinks(sinks: Tensor, q: Tensor, Hq: int) -> Tensor:
    """[Hq] in the accumulation dtype."""
    if not isinstance(sinks, Tensor):
        raise TypeError(f"sinks must be a torch.Tensor, got {_type(sinks)}")
    if tuple(sinks.shape) != (Hq,) or not sinks.is_floating_point():
        raise ValueError(f"sinks must be a float tensor [Hq] = [{Hq}], got {sinks.dtype} of shape {_shape(sinks)}")
    check_same_device("sinks", sinks, "q", q)
    return sinks.to(compute_dtype(q)).contiguous()


def check_lengths(name: str, lengths: Tensor, q: Tensor, size: int | None) -> Tensor:
    """int32 or int64 [size], of any size if None."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {_type(lengths)}")
    if lengths.dim() != 1 or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{name} must be int32 or int64 with one dimension, got {lengths.dtype} of shape {_shape(lengths)}"
        )
    if size is not None and lengths.shape[0] != size:
        raise ValueError(f"{name} has {lengths.shape[0]} entries for a batch of {size}")
    check_same_device(name, lengths, "q", q)
    return lengths.contiguous()


def has_aux(aux: Any) -> bool:
    """Whether there are tensors for score_mod."""
    if isinstance(aux, Tensor):
        raise TypeError("score_mod_aux must be a sequence of tensors, got a tensor; pass (score_mod_aux,)")
    return bool(aux)


def check_longest(name: str, longest: int) -> int:
    longest = check_integer(name, longest, "the length of the longest sequence, a Python int")
    if longest < 0:
        raise ValueError(f"{name}={longest} must be the length of the longest sequence, 0 or more")
    return longest


def draw_philox(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """int64 [2], seed and offset, drawn on the device, or where the generator lives and then copied."""
    check_generator(generator)
    where = device if generator is None else generator.device
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=where, generator=generator).to(device)


def _rank_cure(*tensors: Tensor) -> str:
    if all(x.dim() == 3 for x in tensors):
        return "; packed sequences [total, H, D] go to attention_varlen, a single sequence needs .unsqueeze(0)"
    return ""


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


def _type(x: object) -> str:
    return type(x).__name__
