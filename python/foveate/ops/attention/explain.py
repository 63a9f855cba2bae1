"""foveate.explain: which backend a call of `attention` or its kin would run on, and why not on the others."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.backend.registry import ORDER, Query, why_not
from foveate.ops.attention import arguments as checks
from foveate.ops.attention.dense import attention
from foveate.ops.attention.operands import Used, query
from foveate.ops.attention.varlen import attention_varlen
from foveate.ops.attention.weights import attention_weights


@dataclass(frozen=True)
class Explanation:
    """`str()` is a table. forward and backward map each backend to "chosen", "able" or the sentence why not."""

    query: Query
    forward: dict[str, str]
    backward: dict[str, str]
    op: str = "attention"

    @property
    def chosen(self) -> str | None:
        """The backend that runs the forward pass; None if the call would raise UnsupportedError."""
        return next((name for name, answer in self.forward.items() if answer == "chosen"), None)

    def __str__(self) -> str:
        D, Dv, *options = self.query.features
        dims = f"head dim {D}" if self.op == "attention_weights" else f"head dims {D} and {Dv}"
        title = f"{self.op} on {self.query.device}, {self.query.dtype}, {dims}"
        title += f", with {', '.join(map(str, options))}" if options else ""
        rows = [("backend", "forward", "backward")]
        rows += [(name, self.forward[name], self.backward[name]) for name in self.forward]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}" for row in rows]
        return "\n".join([title, *lines])


def explain(q: Tensor, k: Tensor, v: Tensor | None = None, **options: Any) -> Explanation:
    """Answers for `attention(q, k, v, **options)`, for `attention_varlen` if options has its cu_seqlens, or for
    `attention_weights(q, k, **options)` if it has `rows` and there is no v, without running it.

    Tensors may be on any device, meta and fake too. Raises the same ValueError or TypeError as the call for wrong shapes, dtypes
    and option names. `print(foveate.explain(q, k, v, causal=True))` shows a table.
    """
    packed, weights = "cu_seqlens_q" in options, v is None and "rows" in options
    function = attention_weights if weights else attention_varlen if packed else attention
    operands = (q, k) if v is None else (q, k, v)
    bound = inspect.signature(function).bind(*operands, **options)
    v = k if v is None else v
    bound.apply_defaults()
    o = bound.arguments
    if packed:
        checks.check_packed(q, k, v)
    else:
        checks.check_dense(q, k, v)
    q, k, v = checks.same_kind(q, k, v)
    answers = {
        "varlen": packed,
        "causal": bool(o["causal"]),
        "window": o["window"] is not None and max(checks.check_window(o["window"])) >= 0,
        "softcap": o["softcap"] is not None and checks.check_softcap(o["softcap"]) > 0,
        "dropout_p": checks.check_dropout(o["dropout_p"]) > 0,
    }
    used = Used(*(answers.get(name, o.get(name) is not None) for name in Used._fields))
    call = query(q.device.type, q.dtype, q.shape[-1], v.shape[-1], used)
    if weights:
        both = _answers("attention_weights", call, o["backend"])
        return Explanation(call, both, dict(both), "attention_weights")
    backward = call
    if o["score_mod"] is not None and o["score_mod_bwd"] is None:
        backward = call._replace(features=(*call.features, "no score_mod_bwd"))
    return Explanation(
        call, _answers("attention", call, o["backend"]), _answers("attention_backward", backward, o["backend"])
    )


def _answers(op: str, call: Query, backend: str | None) -> dict[str, str]:
    reasons = {name: why_not(op, name, call) for name in ORDER}
    checks.check_backend_name(backend)
    able = [name for name in ORDER if reasons[name] is None and backend in (None, name)]
    return {name: "chosen" if able[:1] == [name] else reason or "able" for name, reason in reasons.items()}
