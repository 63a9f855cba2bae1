"""foveate.attention_varlen: attention over packed sequences of different lengths, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.ops.attention import arguments as checks
from foveate.ops.attention import op as attention_op
from foveate.ops.attention import score_mod as with_score_mod
from foveate.ops.attention.relative_bias import RelativeBias
from foveate.ops.checks import check_backend_name, check_flag


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
    Hq, D = checks.check_packed(q, k, v)
    q, k, v = checks.same_kind(q, k, v)
    cu_q = checks.check_lengths("cu_seqlens_q", cu_seqlens_q, q, None)
    cu_k = checks.check_lengths("cu_seqlens_k", cu_seqlens_k, q, None)
    if cu_q.shape[0] != cu_k.shape[0] or cu_q.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens_q has {cu_q.shape[0]} entries and cu_seqlens_k {cu_k.shape[0]}; both need B + 1 of them"
        )
    max_seqlen_q = checks.check_longest("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.check_longest("max_seqlen_k", max_seqlen_k)
    if type(causal) is not bool or type(deterministic) is not bool or type(return_lse) is not bool:
        causal, deterministic = check_flag("causal", causal), check_flag("deterministic", deterministic)
        return_lse = check_flag("return_lse", return_lse)
    if isinstance(scale, Tensor):
        q, scale = checks.scaled(q, scale, Hq), 1.0
    else:
        scale = D**-0.5 if scale is None else checks.check_scale(scale)
    learned = isinstance(softcap, Tensor)
    if isinstance(softcap, Tensor):
        softcap = checks.check_learned_softcap(softcap, q, backend)
    else:
        softcap = 0.0 if softcap is None else checks.check_softcap(softcap)
    left, right = (-1, -1) if window is None else checks.check_window(window)
    table, bidirectional, max_distance, philox = None, True, 0, None
    if alibi_slopes is not None:
        alibi_slopes = checks.check_alibi(alibi_slopes, q, cu_q.shape[0] - 1, Hq)
    if relative_bias is not None:
        table = checks.check_table(relative_bias, q, Hq)
        bidirectional, max_distance = relative_bias.bidirectional, relative_bias.max_distance
    if sinks is not None:
        sinks = checks.check_sinks(sinks, q, Hq)
    if type(dropout_p) is not float or dropout_p != 0:
        dropout_p = checks.check_dropout(dropout_p)
        philox = checks.draw_philox(q.device, generator) if dropout_p > 0 else None
    operands = (
        q, k, v, None, None, alibi_slopes, table, sinks, None, cu_q, cu_k, philox, max_seqlen_q, max_seqlen_k, causal,
        left, right, scale, softcap, bidirectional, max_distance, dropout_p,
        deterministic or torch.are_deterministic_algorithms_enabled(), check_backend_name(backend) or "",
    )  # fmt: skip
    if score_mod is not None or score_mod_bwd is not None or score_mod_aux:
        out, lse = with_score_mod.run(operands, score_mod, score_mod_bwd, score_mod_aux)
    elif learned:
        out, lse = attention_op.definition(operands)
    else:
        out, lse = attention_op.run(operands, need_lse=return_lse)
    return (out, lse) if return_lse else out
