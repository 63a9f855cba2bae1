"""torch.ops.foveate.attention_forward and attention_backward: schemas, the backends below them, fake kernels, autograd.

`attention.py` and `attention_varlen.py` check what a call means and normalise it to these schemas: masks and biases have four
dimensions, tables and sinks are in the accumulation dtype (fp32, for fp64 inputs fp64), lengths have one dimension, and a window or a
softcap that is not used is -1 or 0. With cu_q, q is packed [total_q, Hq, D] and lse [Hq, total_q]. vmap: `vmap.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.native import _C, num_sms, runs_cuda_kernels
from foveate.backend.reference import attention as reference
from foveate.backend.registry import Query, choose, register
from foveate.ops import autograd, dtensor, flops, library
from foveate.ops.attention.plan import CPU_HEAD_DIM, GPU_HEAD_DIM, cuda_few_queries, cuda_thresholds

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Operands(NamedTuple):
    """The arguments of the forward op, in its order."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None  # [B or 1, Hq or 1, Sq or 1, Skv or 1]
    mask: Tensor | None  # the same, bool
    alibi: Tensor | None  # fp32 [B or 1, Hq]
    rel_table: Tensor | None  # [buckets, Hq]
    sinks: Tensor | None  # [Hq]
    kv_lens: Tensor | None  # int32 or int64 [B]
    cu_q: Tensor | None  # int32 or int64 [B + 1]
    cu_k: Tensor | None
    philox: Tensor | None  # int64 [2]
    max_q: int
    max_k: int
    causal: bool
    window_left: int
    window_right: int
    scale: float
    softcap: float
    rel_bidirectional: bool
    rel_max_distance: int
    dropout_p: float
    deterministic: bool  # of the backward: equal calls give equal bits
    backend: str  # "" for the best


# scale is a Scalar, not a float: one that is computed from a dynamic shape stays symbolic in a compiled graph.
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? alibi, Tensor? rel_table, Tensor? sinks, "
    "Tensor? kv_lens, Tensor? cu_q, Tensor? cu_k, Tensor? philox, "
    "SymInt max_q, SymInt max_k, bool causal, SymInt window_left, SymInt window_right, Scalar scale, float softcap, "
    "bool rel_bidirectional, int rel_max_distance, float dropout_p, bool deterministic, str backend"
)
_NUM_TENSORS, _SCALE = 12, Operands._fields.index("scale")
# What has a gradient, by its place among the tensors: q, k, v, bias, rel_table, sinks.
_DIFFERENTIABLE = (0, 1, 2, 3, 6, 7)
_OPTION_NAMES = ("bias", "mask", "alibi_slopes", "relative_bias", "sinks", "kv_lens", "varlen", "causal", "window",
                 "softcap", "dropout_p", "score_mod")  # fmt: skip
_NO_SCORE_MOD = "score_mod is a Triton function, which only the triton backend can run"


@functools.lru_cache(maxsize=4096)
def query(device: str, dtype: torch.dtype, D: int, Dv: int, used: tuple[bool, ...]) -> Query:
    """What the choice of the backend depends on: `used` says of each of _OPTION_NAMES whether the call has it."""
    return Query(device, dtype, (D, Dv, *(name for name, use in zip(_OPTION_NAMES, used) if use)))


_native_shared = native.supports()


def _too_wide(query: Query, most: int) -> str | None:
    D, Dv = cast(tuple[int, int], query.features[:2])
    return f"its kernels take head dims up to {most}, these are {D} and {Dv}" if max(D, Dv) > most else None


def _native_supports(query: Query) -> str | None:
    if "score_mod" in query.features:
        return _NO_SCORE_MOD
    reason = _native_shared(query)
    if reason is None and query.dtype not in DTYPES:
        return f"the kernels take {', '.join(map(str, DTYPES))}, the tensors are {query.dtype}"
    return reason or _too_wide(query, GPU_HEAD_DIM if runs_cuda_kernels(query.device) else CPU_HEAD_DIM)


def _triton_supports(query: Query) -> str | None:
    return triton_backend.serves(query) or _too_wide(query, GPU_HEAD_DIM)


def _triton_backward_supports(query: Query) -> str | None:
    if "no score_mod_bwd" in query.features:
        return "score_mod comes without its derivative; give score_mod_bwd"
    return _triton_supports(query)


for _name in ("attention", "attention_backward"):
    register(_name, "native", _native_supports)
    register(_name, "triton", _triton_supports)
    register(_name, "reference", lambda query: _NO_SCORE_MOD if "score_mod" in query.features else None)
register("attention_backward", "triton", _triton_backward_supports)

_runs = 0


def runs() -> int:
    """Forward passes on real tensors since the import, those of compiled graphs included."""
    return _runs


def forward(*args: Any, need_lse: bool = True) -> tuple[Any, ...]:
    """`Operands` -> out, lse: chooses the backend, allocates the outputs, runs."""
    global _runs
    _runs += 1
    (q, k, v, bias, mask, alibi, table, sinks, kv_lens, cu_q, cu_k, philox, max_q, max_k, causal, left, right,
     scale, softcap, bidirectional, max_distance, dropout_p, _, _) = args  # fmt: skip
    if cu_q is None and (max_q != q.shape[1] or max_k != k.shape[1]):
        # A graph of torch.jit.trace keeps the lengths that it was traced with.
        max_q, max_k = q.shape[1], k.shape[1]
        args = (*args[:_NUM_TENSORS], max_q, max_k, *args[_NUM_TENSORS + 2 :])
    chosen = _chosen("attention", *args)
    if chosen == "reference":
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return tuple(x.contiguous() for x in _reference_forward(Operands(*args)))
    out, lse, buckets = _empty_out(q, v), _empty_lse(q, cu_q) if need_lse else None, None
    if chosen == "triton":
        from foveate.backend.triton.attention_launch import forward as triton_forward

        triton_forward(_ready(Operands(*args)), out, lse)
        return out, lse
    if table is not None:
        buckets = _buckets(max_q, max_k, table.shape[0], bidirectional, max_distance, q.device)
    if runs_cuda_kernels(q.device.type):
        kv_lens, cu_q, cu_k = _int32(kv_lens), _int32(cu_q), _int32(cu_k)
        if cu_q is None and bias is None and mask is None and table is None and dropout_p == 0 and _few_queries(q, k):
            return _few_query_attention(q, k, v, alibi, sinks, kv_lens, causal, left, right, scale, softcap)
    _C.attention_forward(  # type: ignore[union-attr]
        _rows(q), _rows(k), _rows(v), out, lse, bias, mask, alibi, table, buckets, sinks, kv_lens, cu_q, cu_k, philox,
        max_q, max_k, causal, left, right, scale, softcap, dropout_p, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def _few_queries(q: Tensor, k: Tensor) -> bool:
    (B, Sq, Hq, _), (_, Skv, Hkv, _) = q.shape, k.shape
    return Hkv > 0 and cuda_few_queries(B, Sq, Hq, Hkv, Skv, num_sms(q.device), cuda_thresholds())


def _few_query_attention(
    q: Tensor, k: Tensor, v: Tensor, alibi: Tensor | None, sinks: Tensor | None, kv_lens: Tensor | None,
    causal: bool, left: int, right: int, scale: float, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """k and v as a cache that holds all keys, for the CUDA kernel that divides them among its blocks."""
    from foveate.ops.attention import with_kv_cache_op as kv_cache_op

    if kv_lens is None:
        kv_lens = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device=q.device)
    return kv_cache_op.run(
        q, _rows(k), _rows(v), None, None, kv_lens, None, None, None, False, causal, left, right, scale, softcap,
        alibi, sinks, None, None, 0, False, "native",
    )  # fmt: skip


def backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, bias, rel_table and sinks; an empty tensor for those that `wanted`, the last argument, leaves out."""
    *operands, wanted = args
    c = Operands(*operands)
    if c.cu_q is None:
        c = c._replace(max_q=c.q.shape[1], max_k=c.k.shape[1])
    chosen = _chosen("attention_backward", *c)
    if chosen == "reference":
        return _reference_backward(dout, dlse, c, wanted)
    if chosen == "triton":
        from foveate.backend.triton.attention_launch import backward as triton_backward

        return triton_backward(_rows(dout), dlse, out, lse, _ready(c), wanted, _empty_grads(c, wanted))
    grads = _empty_grads(c, wanted)
    dq, dk, dv, _, drel_table, dsinks = (grad if want else None for grad, want in zip(grads, wanted))
    # The kernel sums the gradient of bias in the accumulation dtype, in the shape that bias has itself.
    dbias = torch.empty(c.bias.shape, dtype=lse.dtype, device=c.q.device) if wanted[3] else None  # type: ignore[union-attr]
    buckets = None
    if c.rel_table is not None:
        buckets = _buckets(c.max_q, c.max_k, c.rel_table.shape[0], c.rel_bidirectional, c.rel_max_distance, c.q.device)
    if runs_cuda_kernels(c.q.device.type):
        c = c._replace(kv_lens=_int32(c.kv_lens), cu_q=_int32(c.cu_q), cu_k=_int32(c.cu_k))
    workspace = functools.partial(torch.empty, dtype=torch.int8, device=c.q.device)
    _C.attention_backward(  # type: ignore[union-attr]
        _rows(dout), None if dlse is None else _like_new(dlse), _rows(c.q), _rows(c.k), _rows(c.v), out, _like_new(lse), dq, dk,
        dv, dbias, drel_table, dsinks, workspace, c.deterministic, c.bias, c.mask, c.alibi, c.rel_table, buckets,
        c.sinks, c.kv_lens, c.cu_q, c.cu_k, c.philox, c.max_q, c.max_k, c.causal, c.window_left, c.window_right, c.scale,
        c.softcap, c.dropout_p, torch.get_num_threads(),
    )  # fmt: skip
    if dbias is not None:
        grads = (*grads[:3], dbias.to(c.bias.dtype), *grads[4:])  # type: ignore[union-attr]
    return grads


def _chosen(op: str, q: Tensor, k: Tensor, v: Tensor, bias: Any, mask: Any, alibi: Any, rel_table: Any, sinks: Any,
            kv_lens: Any, cu_q: Any, cu_k: Any, philox: Any, max_q: int, max_k: int, causal: bool, left: int,
            right: int, scale: float, softcap: float, bidirectional: bool, max_distance: int, dropout_p: float,
            deterministic: bool, backend: str) -> str:  # fmt: skip
    used = (bias is not None, mask is not None, alibi is not None, rel_table is not None, sinks is not None,
            kv_lens is not None, cu_q is not None, causal, left >= 0 or right >= 0, softcap > 0, dropout_p > 0)  # fmt: skip
    device = "cpu" if q.is_cpu else q.device.type
    return choose(op, query(device, q.dtype, q.shape[-1], v.shape[-1], used), backend or None)


def _rows(x: Tensor) -> Tensor:
    """x with a contiguous last dimension, copied if it has none."""
    return x if x.is_contiguous() or x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _like_new(x: Tensor) -> Tensor:
    """x with the strides that torch.empty would give it; contiguous() leaves odd ones in dimensions of size 1."""
    return x.reshape(-1).view(x.shape) if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _int32(lengths: Tensor | None) -> Tensor | None:
    """What the CUDA kernels read: a conversion there, where a check of the values would wait for the device."""
    return lengths if lengths is None else lengths.to(torch.int32)


def _ready(c: Operands) -> Operands:
    """For the Triton kernels, which cannot raise: lengths are checked where that needs no wait for the device."""
    if c.q.is_cpu:
        _check_lengths(c)
    return c._replace(q=_rows(c.q), k=_rows(c.k), v=_rows(c.v))


@functools.lru_cache(maxsize=64)
def _buckets(max_q: int, max_k: int, buckets: int, bidirectional: bool, max_distance: int, device: Any) -> Tensor:
    """int32 [max_q + max_k - 1]; entry t is the bucket of distance t - (max_k - 1), key position minus query position."""
    distances = torch.arange(1 - max_k, max(max_q, 1 - max_k), device=device)
    return reference.relative_buckets(distances, buckets, bidirectional, max_distance).to(torch.int32)


# Shapes and strides of the results: of the allocations above and of the fake kernels.


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    shape, Dv = q.shape, v.shape[-1]
    if shape[-1] == Dv and q.is_contiguous():
        return torch.empty_like(q)
    return torch.empty((*shape[:-1], Dv), dtype=q.dtype, device=q.device)


def _empty_lse(q: Tensor, cu_q: Tensor | None) -> Tensor:
    shape = q.shape
    rows = (shape[0], shape[2], shape[1]) if cu_q is None else (shape[1], shape[0])
    return torch.empty(rows, dtype=torch.float64 if q.dtype is torch.float64 else torch.float32, device=q.device)


def _empty_grads(c: Operands, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    operands: list[Any] = [c[i] for i in _DIFFERENTIABLE]
    return tuple(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want else c.q.new_empty(0)
        for x, want in zip(operands, wanted)
    )


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor]:
    c = Operands(*args)
    return _empty_out(c.q, c.v), _empty_lse(c.q, c.cu_q)


def _fake_backward(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *operands, wanted = args
    return _empty_grads(Operands(*operands), wanted)


# The reference backend: the definition itself, forward and through autograd.


def _reference_forward(c: Operands) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {
        "causal": c.causal,
        "window": (c.window_left, c.window_right),
        "scale": c.scale,
        "softcap": c.softcap,
        "alibi_slopes": c.alibi if c.alibi is None or c.alibi.shape[0] > 1 else c.alibi[0],
        "rel_table": c.rel_table,
        "rel_bidirectional": c.rel_bidirectional,
        "rel_max_distance": c.rel_max_distance,
        "sinks": c.sinks,
        "dropout_p": c.dropout_p,
        "philox": c.philox,
    }
    if not torch.compiler.is_compiling() and not any(x is not None and autograd.is_wrapped(x) for x in c[8:11]):
        _check_lengths(c)  # values that a compiler and vmap do not show
    if c.cu_q is not None and c.cu_k is not None:
        return reference.attention_varlen(c.q, c.k, c.v, c.cu_q, c.cu_k, **options)
    return reference.attention(c.q, c.k, c.v, bias=c.bias, mask=c.mask, kv_lens=c.kv_lens, **options)


def _check_lengths(c: Operands) -> None:
    if c.cu_q is not None and c.cu_k is not None:
        _check_cu_seqlens("q", c.cu_q, c.q.shape[0], c.max_q)
        _check_cu_seqlens("k", c.cu_k, c.k.shape[0], c.max_k)
    if c.kv_lens is not None:
        _check_kv_lens(c.kv_lens, c.k.shape[1])


def _check_kv_lens(kv_lens: Tensor, Skv: int) -> None:
    for b, length in enumerate(kv_lens.tolist()):
        if not 0 <= length <= Skv:
            raise ValueError(f"kv_lens[{b}] = {length} is outside 0..{Skv}, the number of keys in k")


def _check_cu_seqlens(which: str, cu_seqlens: Tensor, total: int, longest: int) -> None:
    values = cu_seqlens.tolist()
    for i, value in enumerate(values):
        wrong = value != 0 if i == 0 else value < values[i - 1]
        if wrong or (i == len(values) - 1 and value != total):
            raise ValueError(
                f"cu_seqlens_{which} must start at 0, never decrease and end at {total}; entry {i} is {value}"
            )
        if i > 0 and value - values[i - 1] > longest:
            raise ValueError(
                f"cu_seqlens_{which} has a sequence of length {value - values[i - 1]} at {i - 1}, longer than "
                f"max_seqlen_{which} = {longest}"
            )


def _reference_backward(dout: Tensor, dlse: Tensor | None, c: Operands, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    leaves: list[Any] = list(c)
    for i, want in zip(_DIFFERENTIABLE, wanted):
        if want:
            leaves[i] = leaves[i].detach().requires_grad_()
    inputs = [leaves[i] for i, want in zip(_DIFFERENTIABLE, wanted) if want]
    # A dispatch mode (a FLOP counter, selective checkpointing) calls this with autograd excluded, whatever grad mode says.
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with recording, torch.enable_grad(), torch.autocast(c.q.device.type, enabled=False):
        out, lse = _reference_forward(Operands(*leaves))
        outputs, seeds = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
        found = iter(torch.autograd.grad(outputs, inputs, seeds, allow_unused=True, materialize_grads=True))
    return tuple(next(found).contiguous() if want else c.q.new_empty(0) for want in wanted)


attention_forward = library.define(
    f"attention_forward({_SCHEMA}) -> (Tensor, Tensor)", impl=forward, fake=_fake_forward
)
attention_backward = library.define(
    f"attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_SCHEMA}, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    impl=backward,
    fake=_fake_backward,
)


class Attention(torch.autograd.Function):
    """out, lse of `Operands`, differentiable in q, k, v, bias, rel_table and sinks through both outputs."""

    generate_vmap_rule = True  # the ops below have their own vmap rules

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return attention_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:_NUM_TENSORS], *output)
        ctx.options = inputs[_NUM_TENSORS:]
        # Zeros for an output that the loss does not use are left out, but for vmap: torch 2.6 does not map what is not there.
        ctx.set_materialize_grads(_vmapped())

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
        if dout is None:
            dout = torch.zeros_like(out)
        args = (dout, dlse, out, lse, *tensors, *ctx.options, wanted)
        found = autograd.differentiable(attention_backward, _backward_definition, *args)
        grads: list[Tensor | None] = [None] * (_NUM_TENSORS + len(ctx.options))
        for i, want, grad in zip(_DIFFERENTIABLE, wanted, found):
            grads[i] = grad if want else None
        return tuple(grads)


def _backward_definition(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """attention_backward in plain torch, O(Sq * Skv) memory: for second derivatives."""
    *operands, wanted = args
    grads = (dout,) if dlse is None else (dout, dlse)

    def results(*operands: Any) -> tuple[Tensor, ...]:
        return definition(operands)[: len(grads)]

    places = [i for i, want in zip(_DIFFERENTIABLE, wanted) if want]
    found = iter(autograd.pull_back(results, operands, places, grads))
    return tuple(next(found) if want else dout.new_empty(0) for want in wanted)


def definition(operands: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """out, lse of `Operands` in plain torch, differentiable in every mode and as often as anyone likes."""
    c = Operands(*operands)
    with torch.autocast(c.q.device.type, enabled=False):
        return _reference_forward(c)


# Function.apply inspects the signature of forward on every call (20 us) for functorch's sake; below it is the part that autograd needs.
_apply = super(torch.autograd.Function, Attention).apply

# What may stand between a call and the CPU or CUDA kernel. A torch without one of these takes the long way.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", None)
_tracing = getattr(torch._C, "_get_tracing_state", None)
_long_way = _dispatch_modes is None or _transforms is None or _tracing is None
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def _leads_straight_to_forward(operands: tuple[Tensor | None, ...]) -> bool:
    """True if dispatcher and autograd would add nothing: real tensors, no gradient, no mode, transform, tracer or profiler."""
    if torch.compiler.is_compiling() or _long_way:
        return False
    if _dispatch_modes() or _transforms() is not None or _tracing() is not None:  # type: ignore[misc]
        return False
    if torch.autograd.forward_ad._current_level >= 0 or torch.autograd._profiler_enabled():
        return False
    q = operands[0]
    if not (q.is_cpu or q.is_cuda):  # type: ignore[union-attr]
        return False
    recording = torch.is_grad_enabled()
    for x in operands:  # not all(...): a generator costs as much again
        if x is not None and (type(x) not in _PLAIN_TYPES or (recording and x.requires_grad) or x.is_neg()):
            return False
    return True


def run(operands: tuple[Any, ...], need_lse: bool) -> tuple[Any, ...]:
    """out, lse of `Operands` by the shortest way that is right: dispatch and autograd cost as much as a decode step."""
    if _leads_straight_to_forward(operands[:_NUM_TENSORS]):
        return forward(*operands, need_lse=need_lse)
    flops.register()
    if type(operands[0]) not in _PLAIN_TYPES:
        dtensor.notice(operands[0])
    how = autograd.way(*operands[:_NUM_TENSORS])
    if how == "definition":
        return definition(operands)
    # A graph without gradients has the op alone: torch.jit cannot save the autograd.Function, nor does a compiler gain from it.
    if is_traced():  # where sizes are tensors, and so is the default D**-0.5
        operands = tuple(float(x) if i == _SCALE else x for i, x in enumerate(operands))
    if (torch.compiler.is_compiling() or is_traced()) and how == "op":
        return attention_forward(*operands)
    if torch.compiler.is_compiling():
        operands = autograd.distinct(operands)
    if torch.compiler.is_compiling() or _long_way or _transforms() is not None:  # type: ignore[misc]
        return Attention.apply(*operands)
    return _apply(*operands)


def is_traced() -> bool:
    """Inside torch.jit.trace."""
    return _tracing is not None and _tracing() is not None


def _vmapped() -> bool:
    """True right below torch.vmap."""
    if torch.compiler.is_compiling() or _transforms is None:
        return False
    level = _transforms()
    return level is not None and level.key() == torch._C._functorch.TransformType.Vmap
