"""linear_cross_entropy: public function, ops that take the tokens in chunks, fakes and gradients. The kernels are cross_entropy's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import register
from foveate.ops import autograd, dtensor, flops, library
from foveate.ops.autograd import (
    batch_first,
    differentiable,
    each_slice,
    graph_is_freed,
    in_plain_torch,
    no_second_derivative,
    nobody_keeps_saved_tensors,
)
from foveate.ops.checks import (
    check_backend_name,
    check_flag,
    check_floating,
    check_same_dtype,
    chosen_backend,
    compute_dtype,
)
from foveate.ops.cross_entropy import options as checks
from foveate.ops.cross_entropy import reduction as results
from foveate.ops.cross_entropy.logits import backward_into, forward
from foveate.ops.cross_entropy.options import NO_EXTRAS, SCHEMA, Options
from foveate.ops.cross_entropy.reduction import CrossEntropyOutput
from foveate.ops.onednn_linear import product

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foveate.ops.cross_entropy.options import LinearOptions

register("linear_cross_entropy", "native", checks.kernels(native.supports()))
register("linear_cross_entropy", "triton", checks.kernels(triton_backend.serves))
register("linear_cross_entropy", "reference", lambda query: None)

# Bytes of the logits of one chunk of tokens: far more than a core's cache, since the matrix products want many tokens, and far less
# than all logits.
_CHUNK_BYTES = 32 << 20
_GPU_CHUNK_BYTES = 512 << 20  # there each chunk costs a pass over the gradient of the weight in fp32
_MIN_CHUNK_TOKENS = 64
_TERM_BYTES = 16 << 20  # of a chunk's part of the gradient of the weight, on the CPU


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, return_z_loss: Literal[False] = False, return_token_accuracy: Literal[False] = False,
    return_predicted_tokens: Literal[False] = False, **options: Unpack[LinearOptions],
) -> Tensor: ...  # fmt: skip
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, return_z_loss: bool = False, return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False, **options: Unpack[LinearOptions],
) -> Tensor | CrossEntropyOutput: ...  # fmt: skip
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    ce_weight: Tensor | None = None,
    class_probabilities: bool = False,
    use_token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor | CrossEntropyOutput:
    """cross_entropy(hidden @ weight.T + bias, target, ...) that never stores the [tokens, V] logits.

    hidden: [..., K]; weight: [V, K]; bias: [V] or None; one dtype, cast to autocast's under autocast; target: int64 [...].
    Options, result and errors as `cross_entropy`. Rows with target == ignore_index cost nothing, and hidden may be NaN there.

    The tokens are taken in chunks: the logits of one chunk (at most 32 MiB, on a GPU 512 MiB, or 64 tokens' worth) exist at a time,
    rounded to hidden's dtype (float16 on the CPU: fp32); they come from torch's matrix product and become their own gradient in
    place. With "mean" and "sum" the gradients of hidden, weight and bias are computed along with the loss and kept until the
    backward pass, so nothing is computed twice; with "none" the backward pass computes the logits again. Gradients add up in fp32
    over the chunks, and those of float16 wait there in fp32 for the gradient of the loss: with a loss scale (torch.amp.GradScaler)
    none is lost on the way.
    Differentiable once with "mean" and "sum", whose second derivative raises, and any number of times with "none". Forward mode and
    second derivatives are computed in plain torch, where the logits do exist.

    ce_weight (the class weights, as weight is the layer's), use_token_scaling, return_z_loss, return_token_accuracy,
    return_predicted_tokens, dtype and class_probabilities (target [..., V]) as in `cross_entropy`, with Liger-Kernel's names. Class
    weights and token scaling take the way of "none", whose backward pass computes the logits again. Further results, class
    probabilities, and weights or scaling together with label_smoothing or z_loss run on the reference backend, which stores the logits.
    """
    check_floating("hidden", hidden)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    check_same_dtype("weight", weight, "hidden", hidden)
    if type(hidden) not in autograd.PLAIN_TYPES or type(weight) not in autograd.PLAIN_TYPES:
        cure = "call it on hidden.to_local() with the whole weight, or cross_entropy on logits that are gathered over the classes"
        dtensor.refuse("linear_cross_entropy", cure, hidden, weight)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] == 0:
        raise ValueError(
            f"hidden must be [..., K] and weight [V, K] with V > 0; got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        check_same_dtype("bias", bias, "hidden", hidden)
        if tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; weight of shape {tuple(weight.shape)} needs ({weight.shape[0]},)"
            )
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("softcap", softcap)):
        if isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a Python number, got a tensor; {name}.item() has no gradient, cross_entropy(hidden @ weight.T, target, "
                f"{name}={name}) has one but stores the logits"
            )
    options = checks.check_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    extras = checks.extras_of(
        ce_weight, use_token_scaling, return_z_loss, return_token_accuracy, return_predicted_tokens, dtype
    )
    soft = check_flag("class_probabilities", class_probabilities)
    if soft:
        shape = (*hidden.shape[:-1], weight.shape[0])
        checks.check_probabilities(target, hidden, "hidden", shape, options.ignore_index)
    else:
        checks.check_target(target, hidden, "hidden", hidden.shape[:-1])
    preferred, how = check_backend_name(backend), autograd.way(hidden, weight, bias, target)
    if soft or extras is not None:
        extras = extras or NO_EXTRAS
        checks.check_extras("ce_weight", extras, hidden, weight.shape[0], soft)
        beyond = checks.beyond_kernels("linear_cross_entropy", options, extras, soft, hidden, preferred)
        if beyond or how == "definition":
            logits = reference_rows.linear_logits(hidden, weight, bias, None if soft else target != ignore_index)
            return results.from_definition(logits, target, reduction, options, extras)
        loss = linear_cross_entropy(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, reduction="none", backend=backend,
        )  # fmt: skip
        return results.from_rows(loss, None, None, target, reduction, options, extras)
    if how == "definition":
        with torch.autocast("cpu" if hidden.is_meta else hidden.device.type, enabled=False):
            return reference_rows.linear_cross_entropy(hidden, weight, target, bias, *options, reduction)
    flops.register()
    rows, labels = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    needed = [t is not None and autograd.is_tracked(t) for t in (hidden, weight, bias)]
    if how == "function" and any(needed) and reduction != "none" and preferred != "reference":
        link = _link(rows, weight, bias)
        return autograd.apply(
            _LinearCrossEntropy, rows, weight, bias, labels, link, options, reduction, preferred, *needed
        )[0]
    if how == "function" and not any(needed):
        how = "op"
    ways = (_linear, linear_cross_entropy_rows, _LinearCrossEntropyRows)
    loss = autograd.run(how, *ways, rows, weight, bias, labels, *options, preferred)
    return results.reduced(loss.view(target.shape), target, ignore_index, reduction)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


# hidden [T, K], weight [V, K], bias [V] or None, target [T]


def _chunks(
    target: Tensor, vocab: int, itemsize: int, ignore_index: int, backend: str = "native"
) -> Iterator[Tensor | slice]:
    """The rows of the tokens that are not ignored, chunk by chunk; those of all tokens for triton and on a GPU, where reading the
    target would force a device sync."""
    tokens = max(_MIN_CHUNK_TOKENS, (_CHUNK_BYTES if target.is_cpu else _GPU_CHUNK_BYTES) // (vocab * itemsize))
    outside = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if target.is_cpu and outside.any():
        i = int(outside.nonzero()[0])
        raise ValueError(
            f"target[{i}] = {int(target[i])} is outside 0..{vocab - 1} and is not ignore_index = {ignore_index}"
        )
    if backend == "triton" or not target.is_cpu:
        return iter([slice(first, first + tokens) for first in range(0, len(target), tokens)])
    rows = (target != ignore_index).nonzero().squeeze(1)
    return iter(rows.split(tokens))


# What float16 gradients of the logits are multiplied by on a GPU: a probability below 2**-24 would be 0, and a loss scale comes later.
_FLOAT16_SHIFT = 256.0


def _wide_products(x: Tensor) -> bool:
    """Whether torch.mm gives products of such tensors in fp32 (from 2.8 on)."""
    return x.is_cuda and torch.version.hip is None and hasattr(torch.ops.aten.mm, "dtype")


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What the products take: float16 becomes fp32 on the CPU, which keeps small gradients."""
    return torch.float32 if hidden.is_cpu and hidden.dtype is torch.float16 else hidden.dtype


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """What the gradients wait in for the loss's: after a division by the number of tokens, not in float16."""
    return torch.float32 if hidden.dtype is torch.float16 else hidden.dtype


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, smoothing: float, z_loss: float,
    softcap: float, backend: str = "native",
) -> Tensor:  # fmt: skip
    backend = chosen_backend("linear_cross_entropy", hidden, backend)
    if backend == "reference":
        return in_plain_torch(_definition, hidden, weight, bias, target, ignore, smoothing, z_loss, softcap)
    loss, dtype = hidden.new_zeros(target.shape, dtype=compute_dtype(hidden)), _product_dtype(hidden)
    weight, bias = _cast(weight, bias, dtype)
    for rows in _chunks(target, weight.shape[0], dtype.itemsize, ignore, backend):
        logits = product(hidden[rows].to(dtype), weight, bias)
        loss[rows] = forward(logits, target[rows], ignore, smoothing, z_loss, softcap, backend)[0]
        del logits  # before the next chunk's come to be
    return loss


def _definition(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, smoothing: float, z_loss: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    """The loss of each row in plain torch."""
    return reference_rows.linear_cross_entropy(
        hidden, weight, target, bias, ignore, smoothing, z_loss, softcap, reduction="none"
    )


def _linear_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(target.shape, dtype=compute_dtype(hidden))


class _Sum:
    """factor * (the sum of tensors of one shape), in the compute dtype if there are two; zeros of `shape` if there is none."""

    def __init__(self, like: Tensor, shape: tuple[int, ...]) -> None:
        self.zeros = like.new_zeros
        self.shape, self.dtype, self.compute = shape, gradient_dtype(like), compute_dtype(like)
        self.total: Tensor | None = None

    def add(self, term: Tensor) -> None:
        self.total = term if self.total is None else self.total.to(self.compute).add_(term)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """a @ b; from a GPU in fp32 where torch can (2.8), so that it is not rounded before it is added."""
        if not a.is_cpu:
            wide = a.dtype != self.compute and _wide_products(a)
            self.add(torch.mm(a, b, out_dtype=self.compute) if wide else product(a, b.t()))
            return
        if self.total is None:
            self.total = self.zeros(self.shape, dtype=self.compute)
        rows = max(1, _TERM_BYTES // (b.shape[1] * b.element_size()))
        for first in range(0, len(a), rows):
            self.total[first : first + rows].add_(product(a[first : first + rows], b.t()))

    def times(self, factor: Tensor) -> Tensor:
        return (
            self.zeros(self.shape, dtype=self.dtype) if self.total is None else self.total.mul_(factor).to(self.dtype)
        )


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dloss: Tensor,
    factor: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    ignore: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str = "native",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (ignore, smoothing, z_loss, softcap)
    backend = chosen_backend("linear_cross_entropy", hidden, backend)
    if backend == "reference":
        needed = (need_hidden, need_weight, need_bias)
        return in_plain_torch(_gradients_definition, hidden, weight, bias, target, dloss, factor, *needed, *options)
    compute, dtype = compute_dtype(hidden), _product_dtype(hidden)
    loss = hidden.new_zeros(target.shape, dtype=compute)
    dhidden = hidden.new_zeros(hidden.shape if need_hidden else 0, dtype=gradient_dtype(hidden))
    if dtype is torch.float16 and _wide_products(hidden):
        dloss, factor = dloss * _FLOAT16_SHIFT, factor / _FLOAT16_SHIFT
    dweight = _Sum(weight, tuple(weight.shape) if need_weight else (0,))
    dbias = _Sum(weight, (weight.shape[0] if need_bias else 0,))
    weight, bias = _cast(weight, bias, dtype)
    for rows in _chunks(target, weight.shape[0], dtype.itemsize, ignore, backend):
        h, t = hidden[rows].to(dtype), target[rows]
        logits = product(h, weight, bias)
        loss[rows], stats = forward(logits, t, *options, backend)
        dlogits = backward_into(logits, dloss[rows], logits, t, stats, *options, backend)
        if isinstance(rows, slice) and need_weight:
            h = torch.where((t != ignore)[:, None], h, 0)  # ignored tokens are among the rows, and may be NaN
        if need_hidden:
            dhidden[rows] = (product(dlogits, weight.t()).to(compute) * factor).to(dhidden.dtype)
        if need_weight:
            dweight.add_product(dlogits.t(), h)
        if need_bias:
            dbias.add(dlogits.sum(0, dtype=compute))
        del logits, dlogits  # before the next chunk's come to be
    return loss, dhidden, dweight.times(factor), dbias.times(factor)


def _gradients_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    dloss: Tensor,
    factor: Tensor,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = gradient_dtype(hidden)
    return (
        _linear_fake(hidden, weight, bias, target),
        hidden.new_empty(hidden.shape if need_hidden else (0,), dtype=dtype),
        hidden.new_empty(weight.shape if need_weight else (0,), dtype=dtype),
        hidden.new_empty((weight.shape[0] if need_bias else 0,), dtype=dtype),
    )


linear_cross_entropy_rows = library.define(
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {SCHEMA}, "
    "str backend='native') -> Tensor",
    impl=_linear,
    fake=_linear_fake,
)
# The losses, and factor times the gradients of sum(dloss * loss), fp32 for float16; those not needed are empty. factor comes last, in
# the compute dtype, so that 1 / tokens does not push float16 gradients of the logits below its range.
linear_cross_entropy_gradients = library.define(
    "linear_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor dloss, Tensor factor, "
    f"bool need_hidden, bool need_weight, bool need_bias, {SCHEMA}, str backend='native') "
    "-> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    impl=_gradients,
    fake=_gradients_fake,
)


def _linear_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    hidden, weight, bias, target, *options = args
    if in_dims[1] is not None or in_dims[2] is not None:
        return each_slice(linear_cross_entropy_rows, info.batch_size, args, in_dims)
    hidden, target = (batch_first(t, d, info.batch_size) for t, d in ((hidden, in_dims[0]), (target, in_dims[3])))
    loss = linear_cross_entropy_rows(hidden.flatten(0, 1), weight, bias, target.flatten(), *options)
    return loss.view(target.shape), 0


def _gradients_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    # Each slice has gradients of the weight of its own.
    return each_slice(linear_cross_entropy_gradients, info.batch_size, args, in_dims)


library.vmap("linear_cross_entropy", _linear_vmap)
library.vmap("linear_cross_entropy_gradients", _gradients_vmap)


_ONCE = (
    "linear_cross_entropy computes its gradients with the loss, and they have no derivative of their own; for second derivatives "
    "pass reduction='none' and reduce the losses, or backend='reference'"
)


class _LinearCrossEntropy(torch.autograd.Function):
    """The reduced loss, its gradients computed along the way: the loss of every used row has the same weight."""

    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        link: Tensor | None,
        options: Options,
        reduction: str,
        backend: str,
        *needed: bool,
    ) -> tuple[Tensor, ...]:
        factor = torch.ones((), dtype=compute_dtype(hidden), device=hidden.device)
        if reduction == "mean":
            factor = factor / (target != options.ignore_index).sum()
        ones = torch.ones((), dtype=factor.dtype, device=hidden.device).expand(target.shape)
        args = (hidden, weight, bias, target, ones, factor, *needed, *options, backend)
        loss, *grads = linear_cross_entropy_gradients(*args)
        return results.reduced(loss, target, options.ignore_index, reduction), *grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[4], *output[1:])
        ctx.dtype = inputs[0].dtype
        ctx.mark_non_differentiable(*output[1:])
        ctx.overwrites = nobody_keeps_saved_tensors()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        link, *grads = ctx.saved_tensors
        # The gradient of the weight is large: no copy without need.
        in_place = (
            ctx.overwrites and graph_is_freed() and not torch.is_grad_enabled() and not autograd.is_batched(dloss)
        )
        times = Tensor.mul_ if in_place else Tensor.mul
        scaled = no_second_derivative(_scale, _ONCE, times, ctx.dtype, dloss, link, *grads)
        return (*(g if need else None for g, need in zip(scaled, ctx.needs_input_grad)), *(None,) * 8)


def _scale(times: Any, dtype: torch.dtype, dloss: Tensor, link: Tensor | None, *grads: Tensor) -> tuple[Tensor, ...]:
    return tuple(times(g, dloss).to(dtype) for g in grads)


def _link(*tensors: Tensor | None) -> Tensor | None:
    """A zero that depends on the tensors without keeping their memory: with it the gradients of `_LinearCrossEntropy`, which are
    saved as constants, know whose they are, and a second derivative raises rather than vanish."""
    if torch.compiler.is_compiling():  # has no second derivatives
        return None
    return torch.stack([t[:0].sum(dtype=compute_dtype(t)) for t in tensors if t is not None]).sum()


class _LinearCrossEntropyRows(torch.autograd.Function):
    """The loss of every row. Their weights in the gradient are known only in the backward pass, which computes the logits again."""

    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return linear_cross_entropy_rows(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.options = inputs[4:]
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        factor = torch.ones((), dtype=dloss.dtype, device=dloss.device)
        saved = ctx.saved_tensors  # once: under checkpointing they are computed again for it
        args = (*saved, dloss, factor, *needed, *ctx.options)
        _, *grads = differentiable(linear_cross_entropy_gradients, _gradients_definition, *args)
        dtype = saved[0].dtype
        return (*(g.to(dtype) if need else None for g, need in zip(grads, needed)), *(None,) * 6)


def _gradients_definition(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dloss: Tensor, factor: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """linear_cross_entropy_gradients in plain torch."""
    needed, others = options[:3], options[3 : 3 + len(Options._fields)]

    def rows(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _definition(h, w, b, target, *others)

    wanted = [i for i, need in enumerate(needed) if need]
    pulled = dict(zip(wanted, autograd.pull_back(rows, (hidden, weight, bias), wanted, (dloss,))))
    grads = (pulled[i] * factor if i in pulled else hidden.new_empty(0) for i in range(3))
    return rows(hidden, weight, bias), *(g.to(gradient_dtype(hidden)) for g in grads)
