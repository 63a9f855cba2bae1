"""foveate as one of torch's flash attention implementations (torch.nn.attention, since torch 2.11).

    from foveate.integrations import torch_flash
    torch_flash.register()                                              # makes the name known, changes nothing
    torch.nn.attention.activate_flash_attention_impl("foveate")         # F.scaled_dot_product_attention where torch takes its flash kernel
    torch.nn.attention.restore_flash_attention_impl()

Whether a call goes to the flash kernel stays torch's choice: on a GPU never with a mask and in fp16 and bf16 only, on the CPU nearly
always. `foveate.drop_in.sdpa` takes every call. On an older torch register() raises RuntimeError, which names it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from foveate.ops.attention import arguments as checks
from foveate.ops.attention.op import attention_backward, attention_forward
from foveate.ops.attention.operands import Gradients, Operands

NAME = "foveate"


def register() -> None:
    """Make activate_flash_attention_impl("foveate") possible. Calling it again changes nothing."""
    import torch.nn.attention as attention

    add = getattr(attention, "register_flash_attention_impl", None)
    if add is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attention implementations (torch 2.11 and later have one); "
            "use foveate.drop_in.sdpa()"
        )
    add(NAME, register_fn=_activate)


class _Handle:
    def __init__(self, library: Library) -> None:
        self.library: Library | None = library

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
        self.library = None


def _activate() -> _Handle:
    library = Library("aten", "IMPL")
    kernels: dict[str, tuple[Any, str]] = {
        "_scaled_dot_product_flash_attention_for_cpu": (_cpu_forward, "CPU"),
        "_scaled_dot_product_flash_attention_for_cpu_backward": (_cpu_backward, "CPU"),
    }
    if torch.backends.cuda.is_built():
        kernels |= {
            "_scaled_dot_product_flash_attention": (_dense_forward, "CUDA"),
            "_scaled_dot_product_flash_attention_backward": (_dense_backward, "CUDA"),
            "_flash_attention_forward": (_flash_forward, "CUDA"),
            "_flash_attention_backward": (_flash_backward, "CUDA"),
        }
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"(?s).*Overriding a previously registered kernel"
        )  # that is the purpose
        for name, (kernel, key) in kernels.items():
            library.impl(name, kernel, key)
    return _Handle(library)


def _operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    dropout_p: float = 0.0,
    philox: Tensor | None = None,
    mask: Tensor | None = None,
    cu: tuple[Tensor | None, Tensor | None] = (None, None),
    longest: tuple[int, int] | None = None,
    window: tuple[int, int] = (-1, -1),
    alibi: Tensor | None = None,
    kv_lens: Tensor | None = None,
) -> Operands:
    """q, k, v in foveate's layout, [B, S, H, D] or packed; causal is bottom-right."""
    bias = keep = None
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
        bias, keep = (None, mask) if mask.dtype is torch.bool else (mask, None)
    max_q, max_k = (q.shape[1], k.shape[1]) if longest is None else longest
    return Operands(
        q=q, k=k, v=v, bias=bias, mask=keep, alibi=alibi, kv_lens=kv_lens, cu_q=cu[0], cu_k=cu[1], philox=philox,
        max_q=max_q, max_k=max_k, causal=causal, window_left=window[0], window_right=window[1],
        scale=q.shape[-1] ** -0.5 if scale is None else scale, dropout_p=dropout_p,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


_OF_QKV = list(Gradients(q=True, k=True, v=True, bias=False, rel_table=False, sinks=False))


def _gradients(dout: Tensor, out: Tensor, lse: Tensor, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    return attention_backward(dout, None, out, lse, *operands, _OF_QKV)[:3]


def _heads_last(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


# torch's CPU op is top-left causal, and [B, H, S, D] as all of scaled_dot_product_attention.


def _cpu_operands(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    attn_mask: Tensor | None,
    scale: float | None,
) -> Operands:
    if dropout_p:
        raise RuntimeError(
            f"dropout_p={dropout_p}: torch's flash attention on the CPU has no dropout, and neither has its stand-in"
        )
    q, k, v = _heads_last(query, key, value)
    corner = (-1, -1)
    if is_causal and q.shape[1] != k.shape[1]:
        is_causal, corner = False, (-1, q.shape[1] - k.shape[1])
        if corner[1] < 0:  # keys that no query sees: masked, so that they get gradients of 0
            rows, keys = (torch.arange(n) for n in (q.shape[1], k.shape[1]))
            attn_mask, corner = keys <= rows[:, None], (-1, -1)
    return _operands(q, k, v, is_causal, scale, mask=attn_mask, window=corner)


def _cpu_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    out, lse = attention_forward(*_cpu_operands(query, key, value, dropout_p, is_causal, attn_mask, scale))
    return out.transpose(1, 2), lse


def _cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    operands = _cpu_operands(query, key, value, dropout_p, is_causal, attn_mask, scale)
    gradients = _gradients(grad_out.transpose(1, 2), out.transpose(1, 2), logsumexp, operands)
    return tuple(_heads_last(*gradients))


# On a GPU: [B, H, S, D] for scaled_dot_product_attention, [B, S, H, D] or packed below it; causal is bottom-right, as in flash_attn.
# Seed and offset of dropout travel from the forward to the backward op as `rng_state`.


def _dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    q, k, v = _heads_last(query, key, value)
    out, lse, rng_state, unused, debug = _flash_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, is_causal, return_debug_mask, scale=scale
    )
    lengths = q.new_empty(0, dtype=torch.int32)
    return out.transpose(1, 2), lse, lengths, lengths, q.shape[1], k.shape[1], rng_state, unused, debug


def _dense_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    philox = philox_seed if dropout_p else None
    q, k, v = _heads_last(query, key, value)
    operands = _operands(q, k, v, is_causal, scale, dropout_p, philox)
    gradients = _gradients(grad_out.transpose(1, 2), out.transpose(1, 2), logsumexp, operands)
    return tuple(_heads_last(*gradients))


def _flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, ...]:
    unserved = {"return_debug_mask": return_debug_mask, "block_table": block_table is not None}
    unserved["seqused_k with cum_seq_k"] = seqused_k is not None and cum_seq_k is not None
    if names := [name for name, given in unserved.items() if given]:
        raise RuntimeError(
            f"foveate as torch's flash attention does not serve {', '.join(names)}; call foveate's functions for that"
        )
    philox = checks.draw_philox(query.device, None) if dropout_p else None
    alibi = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 2 else alibi_slopes[None]
    operands = _operands(
        query, key, value, is_causal, scale, dropout_p, philox, cu=(cum_seq_q, cum_seq_k),
        longest=None if cum_seq_q is None else (max_q, max_k), window=_window(window_size_left, window_size_right),
        alibi=alibi, kv_lens=seqused_k,
    )  # fmt: skip
    out, lse = attention_forward(*operands)
    empty = query.new_empty(0)
    rng_state = query.new_empty(2, dtype=torch.int64) if philox is None else philox
    return out, lse, rng_state, query.new_empty((), dtype=torch.int64), empty


def _flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    packed = query.dim() == 3
    operands = _operands(
        query, key, value, is_causal, scale, dropout_p, rng_state if dropout_p else None,
        cu=(cum_seq_q, cum_seq_k) if packed else (None, None), longest=(max_q, max_k) if packed else None,
        window=_window(window_size_left, window_size_right),
    )  # fmt: skip
    return _gradients(grad_out, out, logsumexp, operands)


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return (-1 if left is None else left), (-1 if right is None else right)
