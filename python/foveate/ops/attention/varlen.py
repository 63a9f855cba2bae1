"""foveate.attention_varlen: attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from foveate.ops.attention import arguments as checks
from foveate.ops.attention.autograd import run, run_unusual
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.checks import check_flag

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foveate.ops.attention.arguments import SharedOptions


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[True],
    **options: Unpack[SharedOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[SharedOptions],
) -> Tensor: ...
@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    return_lse: bool,
    **options: Unpack[SharedOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | Tensor | None = None,
    softcap: float | Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    sinks: Tensor | None = None,
    score_mod: Any = None,
    score_mod_bwd: Any = None,
    score_mod_aux: Sequence[Tensor] = (),
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:  # out, or with return_lse (out, lse)
    """`attention` of each of B sequences by itself, packed one after the other along the first dimension.

    q: [total_q, Hq, D]; k: [total_k, Hkv, D]; v: [total_k, Hkv, Dv]. cu_seqlens_q, cu_seqlens_k: int32 or int64 [B + 1], from 0,
    never decreasing, to total: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1], and may be empty. max_seqlen_q and
    max_seqlen_k: Python integers, at least the longest sequence. Returns out [total_q, Hq, Dv], or (out, lse [Hq, total_q]).

    The options are those of `attention`. Positions and lengths (causal, window, ALiBi, relative bias) count within the sequence, and
    the dropout mask of sequence b is that of batch row b. A bias or a mask over packed rows would be as large as the scores:
    pad the sequences and use `attention` with kv_lens for those.
    """
    Hq, _ = checks.check_packed(q, k, v)
    q, k, v = checks.same_kind(q, k, v)
    cu_q = checks.check_lengths("cu_seqlens_q", cu_seqlens_q, q, None)
    cu_k = checks.check_lengths("cu_seqlens_k", cu_seqlens_k, q, None)
    B = cu_q.shape[0] - 1
    if cu_k.shape[0] != B + 1 or B < 0:
        raise ValueError(f"cu_seqlens_q has {B + 1} entries and cu_seqlens_k {cu_k.shape[0]}; both need B + 1 of them")
    max_q = checks.check_longest("max_seqlen_q", max_seqlen_q)
    max_k = checks.check_longest("max_seqlen_k", max_seqlen_k)
    if type(return_lse) is not bool:
        return_lse = check_flag("return_lse", return_lse)
    operands = checks.normalised(
        q, k, v, None, None, None, cu_q, cu_k, max_q, max_k, B, Hq, causal, window, scale, softcap, alibi_slopes, relative_bias, sinks,
        dropout_p, generator, deterministic, backend,
    )  # fmt: skip
    if (
        score_mod is not None
        or score_mod_bwd is not None
        or checks.has_aux(score_mod_aux)
        or isinstance(softcap, Tensor)
    ):
        out, lse = run_unusual(operands, score_mod, score_mod_bwd, score_mod_aux)
    else:
        out, lse = run(operands, return_lse)
    return (out, lse) if return_lse else out
