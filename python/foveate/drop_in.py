"""foveate.drop_in.sdpa: torch.nn.functional.scaled_dot_product_attention of the whole process runs on foveate.

Unmodified models reach torch's function in one of three ways, and all are covered: as an attribute of torch.nn.functional (also
from inside nn.MultiheadAttention and nn.TransformerEncoder), under a name that a module took by `from ... import`, and not at all,
in the inference fast path of nn.MultiheadAttention and nn.TransformerEncoderLayer, which is switched off meanwhile.
A torch function mode would reach the first two as well, but costs microseconds on every torch call of the model.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from foveate.ops.attention import op as attention_op
from foveate.ops.attention.sdpa import _is_causal_bias
from foveate.ops.attention.sdpa import sdpa as _foveate_sdpa
from foveate.ops.torch_internals import without_torch_function

_torch_sdpa = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """`foveate.sdpa` in the place of torch's function: subclasses, fx proxies and function modes see the call, as they see torch's."""
    tensors = (query, key, value, attn_mask)
    if has_torch_function(tensors) and not _is_nested(query) and not _is_causal_bias(attn_mask):
        return handle_torch_function(
            scaled_dot_product_attention, tensors, query, key, value,
            attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    return _foveate_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _is_nested(query: Any) -> bool:
    """Nested tensors' own handler knows the call by its name, and would run torch's function."""
    with without_torch_function():
        return isinstance(query, torch.Tensor) and query.is_nested


class _State:
    """The state of this process: torch's function is replaced while `enabled` or inside `blocks` with-blocks."""

    lock = threading.Lock()
    enabled = False
    blocks = 0
    active = False
    fast_path = True  # torch's setting before
    runs_before = 0

    @classmethod
    def update(cls) -> None:
        wanted = cls.enabled or cls.blocks > 0
        if wanted == cls.active:
            return
        cls.active = wanted
        if wanted:
            cls.fast_path = torch.backends.mha.get_fastpath_enabled()
            cls.runs_before = attention_op.runs()
            torch.backends.mha.set_fastpath_enabled(False)
            _replace(_torch_sdpa, scaled_dot_product_attention)
        else:
            _replace(scaled_dot_product_attention, _torch_sdpa)
            torch.backends.mha.set_fastpath_enabled(cls.fast_path)


def _replace(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Every attribute of a loaded module that is `old` becomes `new`."""
    for name, module in list(sys.modules.items()):
        attributes = getattr(module, "__dict__", None)
        if name == __name__ or not isinstance(attributes, dict):
            continue
        for attribute in [key for key, value in list(attributes.items()) if value is old]:
            setattr(module, attribute, new)


class sdpa(ContextDecorator):
    """While active, F.scaled_dot_product_attention is `foveate.sdpa`, in eager mode and under torch.compile.

    `with foveate.drop_in.sdpa(): ...` and `@foveate.drop_in.sdpa()` for a block or a function, which may nest;
    `foveate.drop_in.sdpa().enable()` and `.disable()` for the process. All of them act on every thread.

    A call that foveate cannot serve raises its sentence; nothing goes back to torch. Not reached: a reference to torch's function that
    was put into an object, a closure or a default argument before, TorchScript, and nn.MultiheadAttention with need_weights=True
    (its default), which computes the weights by itself and never calls the function.
    """

    def enable(self) -> sdpa:
        """Replace torch's function until `disable`; again is the same as once."""
        with _State.lock:
            _State.enabled = True
            _State.update()
        return self

    def disable(self) -> None:
        """Undo `enable`, of this object or another."""
        with _State.lock:
            _State.enabled = False
            _State.update()

    def __enter__(self) -> sdpa:
        with _State.lock:
            _State.blocks += 1
            _State.update()
        return self

    def __exit__(self, *exception: object) -> None:
        with _State.lock:
            _State.blocks -= 1
            _State.update()


def calls() -> int:
    """Attention forward passes of foveate since the drop-in last became active, those inside compiled graphs included."""
    return attention_op.runs() - _State.runs_before
