"""
Compiled kernels of foveate. Take them through torch.ops.foveate or the public functions.
"""

from __future__ import annotations

import collections.abc
import typing

import torch

__all__: list[str] = [
    "Decoder",
    "DecoderAdapter",
    "attention_backward",
    "attention_forward",
    "attention_with_kv_cache",
    "copy_memory",
    "copy_pages",
    "cpu_target",
    "cpu_targets",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "cuda_emulated",
    "cuda_info",
    "glu_backward",
    "glu_forward",
    "has_cuda_kernels",
    "multiply_add",
    "operand_names",
    "packed_linear",
    "packed_rows",
    "read_memory",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary",
    "set_dlpack_exchange",
    "softmax_backward",
    "softmax_columns_backward",
    "softmax_columns_forward",
    "softmax_forward",
    "uses_dlpack_exchange",
]

class DecoderAdapter:
    """
    A LoRA adapter of all layers; python/foveate/models/native_adapter.py builds it
    """
    def __init__(self, layers: collections.abc.Sequence[collections.abc.Sequence[typing.Any]]) -> None: ...

class Decoder:
    """
    All layers of a causal language model in one call; python/foveate/models/native_decoder.py builds it
    """
    def __init__(
        self,
        *,
        hidden: typing.SupportsInt | typing.SupportsIndex,
        heads_q: typing.SupportsInt | typing.SupportsIndex,
        heads_kv: typing.SupportsInt | typing.SupportsIndex,
        head_dim: typing.SupportsInt | typing.SupportsIndex,
        softcap: typing.SupportsFloat | typing.SupportsIndex,
        activation: str,
        activation_limit: typing.SupportsFloat | typing.SupportsIndex,
        final_norm: typing.Any,
        rotary: collections.abc.Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
    ) -> None: ...
    def add_experts(
        self,
        *,
        router: typing.Any,
        kind: str,
        choice_bias: torch.Tensor | None = None,
        per_token: typing.SupportsInt | typing.SupportsIndex,
        groups: typing.SupportsInt | typing.SupportsIndex = 1,
        top_groups: typing.SupportsInt | typing.SupportsIndex = 1,
        normalize: bool = False,
        scale: typing.SupportsFloat | typing.SupportsIndex = 1.0,
        experts: collections.abc.Sequence[typing.Any],
        shared: typing.Any = None,
        shared_gate: typing.Any = None,
    ) -> None: ...
    def add_layer(
        self,
        *,
        attention_norm: typing.Any = None,
        attention_out_norm: typing.Any = None,
        mlp_norm: typing.Any = None,
        mlp_out_norm: typing.Any = None,
        q: typing.Any,
        k: typing.Any = None,
        v: typing.Any = None,
        o: typing.Any,
        clip: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        q_norm: typing.Any = None,
        k_norm: typing.Any = None,
        norms_after_rotary: bool = False,
        rotary: typing.SupportsInt | typing.SupportsIndex = -1,
        interleaved: bool = False,
        scale: typing.SupportsFloat | typing.SupportsIndex,
        window_left: typing.SupportsInt | typing.SupportsIndex = -1,
        alibi: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        mlp: typing.Any = None,
        parallel: bool = False,
        residual_scale: typing.SupportsFloat | typing.SupportsIndex = 1.0,
    ) -> None: ...
    def step(
        self,
        x: torch.Tensor | None,
        lens: torch.Tensor | None,
        block_table: torch.Tensor | None,
        k_pages: torch.Tensor | None,
        v_pages: torch.Tensor | None,
        k_scale: torch.Tensor | None,
        v_scale: torch.Tensor | None,
        plan: tuple,
        threads: typing.SupportsInt | typing.SupportsIndex,
        adapters: collections.abc.Sequence[
            tuple[DecoderAdapter, typing.SupportsInt | typing.SupportsIndex, typing.SupportsInt | typing.SupportsIndex]
        ] = [],
    ) -> None: ...

def attention_backward(
    operands: tuple,
    rel_buckets: torch.Tensor | None,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    grads: tuple,
    workspace: collections.abc.Callable,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None:
    """
    workspace: bytes -> a tensor of them on the device, asked for where the kernels need one
    """

def attention_forward(
    operands: tuple,
    rel_buckets: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    plan: tuple,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def attention_with_kv_cache(
    operands: tuple,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    workspace: tuple,
    plan: tuple,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def copy_memory(
    x: torch.Tensor | None, out: torch.Tensor | None, threads: typing.SupportsInt | typing.SupportsIndex
) -> None: ...
def copy_pages(
    pool: torch.Tensor | None,
    from_pages: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
    to_pages: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
) -> None: ...
def cpu_target() -> str:
    """
    the CPU instruction set in use
    """

def cpu_targets() -> list[tuple[str, bool]]:
    """
    (name, runs on this machine) of every compiled CPU instruction set, weakest first
    """

def cross_entropy_backward(
    dloss: torch.Tensor | None,
    logits: torch.Tensor | None,
    target: torch.Tensor | None,
    stats: torch.Tensor | None,
    dlogits: torch.Tensor | None,
    ignore_index: typing.SupportsInt | typing.SupportsIndex,
    label_smoothing: typing.SupportsFloat | typing.SupportsIndex,
    z_loss: typing.SupportsFloat | typing.SupportsIndex,
    softcap: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def cross_entropy_forward(
    logits: torch.Tensor | None,
    target: torch.Tensor | None,
    loss: torch.Tensor | None,
    stats: torch.Tensor | None,
    ignore_index: typing.SupportsInt | typing.SupportsIndex,
    label_smoothing: typing.SupportsFloat | typing.SupportsIndex,
    z_loss: typing.SupportsFloat | typing.SupportsIndex,
    softcap: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def cuda_info() -> dict:
    """
    whether CUDA kernels are compiled in, the CUDA versions (13000 is 13.0), the number of devices, why there are none
    """

def glu_backward(
    dout: torch.Tensor | None,
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    gelu: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def glu_forward(
    gate: torch.Tensor | None,
    up: torch.Tensor | None,
    out: torch.Tensor | None,
    gelu: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def has_cuda_kernels() -> bool:
    """
    whether this build has CUDA kernels, or the emulator's
    """

def multiply_add(
    sums: torch.Tensor | None,
    dtype: str,
    steps: typing.SupportsInt | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> int: ...
def operand_names() -> dict:
    """
    the fields of each NamedTuple that a function here takes, by the name of its class
    """

def packed_linear(
    x: torch.Tensor | None,
    data: torch.Tensor | None,
    format: str,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def packed_rows(
    data: torch.Tensor | None,
    format: str,
    in_features: typing.SupportsInt | typing.SupportsIndex,
    out_features: typing.SupportsInt | typing.SupportsIndex,
    ids: torch.Tensor | None,
    out: torch.Tensor | None,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def read_memory(
    x: torch.Tensor | None, sums: torch.Tensor | None, threads: typing.SupportsInt | typing.SupportsIndex
) -> None: ...
def rms_norm_backward(
    dout: torch.Tensor | None,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    rstd: torch.Tensor | None,
    dsum: torch.Tensor | None,
    dx: torch.Tensor | None,
    dweight_parts: torch.Tensor | None,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def rms_norm_forward(
    x: torch.Tensor | None,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    out: torch.Tensor | None,
    sum: torch.Tensor | None,
    rstd: torch.Tensor | None,
    eps: typing.SupportsFloat | typing.SupportsIndex,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def rotary(
    x: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out: torch.Tensor | None,
    interleaved: bool,
    inverse: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def set_dlpack_exchange(enabled: bool) -> None: ...
def softmax_backward(
    dout: torch.Tensor | None,
    out: torch.Tensor | None,
    dx: torch.Tensor | None,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    log: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def softmax_columns_backward(
    dout: torch.Tensor | None,
    out: torch.Tensor | None,
    dx: torch.Tensor | None,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    log: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def softmax_columns_forward(
    x: torch.Tensor | None,
    out: torch.Tensor | None,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    log: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def softmax_forward(
    x: torch.Tensor | None,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    out: torch.Tensor | None,
    scale: typing.SupportsFloat | typing.SupportsIndex,
    causal: bool,
    log: bool,
    threads: typing.SupportsInt | typing.SupportsIndex,
) -> None: ...
def uses_dlpack_exchange() -> bool: ...

cuda_emulated: bool = False
