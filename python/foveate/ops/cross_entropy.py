"""cross_entropy and linear_cross_entropy: public functions and gradients. Ops: `cross_entropy_ops.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import register
from foveate.ops import autograd, cross_entropy_extras, flops
from foveate.ops.autograd import differentiable, graph_is_freed, no_second_derivative, nobody_keeps_saved_tensors
from foveate.ops.checks import (
    check_flag,
    check_floating,
    check_integer,
    check_learned,
    check_number,
    check_same_device,
    check_same_dtype,
    chosen_backend,
    compute_dtype,
)
from foveate.ops.cross_entropy_extras import Extras
from foveate.ops.cross_entropy_ops import (
    Options,
    cross_entropy_backward,
    cross_entropy_rows,
    gradient_dtype,
    linear_cross_entropy_gradients,
    linear_cross_entropy_rows,
)

for _op in ("cross_entropy", "linear_cross_entropy"):
    register(_op, "native", cross_entropy_extras.kernels(native.supports()))
    register(_op, "triton", cross_entropy_extras.kernels(triton_backend.serves))
    register(_op, "reference", lambda query: None)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    weight: Tensor | None = None,
    class_probabilities: bool = False,
    use_token_scaling: bool = False,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Any:  # the loss, or with one of return_... CrossEntropyOutput
    """Per row lse - (1 - eps) * x[target] - eps * mean(x) + z_loss * lse**2, with x = softcap * tanh(logits / softcap), lse =
    logsumexp(x) and eps = label_smoothing. The classes are the last dimension, or `dim` (1 for torch's [N, C, d1, ...]).

    logits: [..., V], float32, bfloat16, float16 (computed in fp32) or float64, V > 0; target: int64 [...]. label_smoothing: in
    [0, 1]. z_loss (PaLM, Chowdhery et al. 2022): finite, not negative. softcap: positive; None or 0 for none.
    reduction: "mean" over the rows whose target is not ignore_index (NaN when there are none, as in torch), "sum", or "none" for
    [...]. Ignored rows give loss 0 and gradient 0 whatever their logits. The loss is fp32 (fp64 for fp64 logits).
    Differentiable in logits, in both modes and any number of times; for the first reverse pass nothing of the size of logits is kept
    but logits. Rows that are not contiguous or not evenly spaced are copied, those of another `dim` too. label_smoothing, z_loss and
    softcap may be tensors of one number, differentiable, whose range is not checked; they and forward mode are computed in plain torch.

    class_probabilities: target holds these instead, floating, of logits' shape; then the loss is sum(-q * log p) of each row with
    q = (1 - eps) * target + eps / V, and "mean" is over all rows. weight [V] multiplies the loss of a row by that of its target (of
    each class with probabilities and in the eps term), and "mean" divides by the sum of the targets' weights; the z term stays as it
    is. Both are torch's. use_token_scaling multiplies each row's loss by the probability of its target, without a gradient through it.

    With return_z_loss, return_token_accuracy or return_predicted_tokens the result is CrossEntropyOutput(loss, z_loss, token_accuracy,
    predicted_tokens), None where not asked for: the z term that is inside loss; the share of rows whose largest logit is the target's
    (0 or 1 for each row with "none"); the class of the largest logit, int64, -1 in ignored rows. The last two read the logits once
    more. The names are Liger-Kernel's; these results have no gradient. dtype: of loss and z_loss, such as logits.dtype for torch's.
    Class probabilities, and weight with label_smoothing or z_loss, run on the reference backend; a named other one refuses them.

    Raises ValueError for a target outside 0..V-1 that is not ignore_index (checked when the op runs), and for shapes and
    options; TypeError for dtypes; UnsupportedError for a named backend that cannot serve the call.
    """
    check_floating("logits", logits)
    if dim != -1:
        if not -logits.dim() <= check_integer("dim", dim) < logits.dim():
            raise ValueError(f"dim={dim} is out of range for logits with {logits.dim()} dimensions")
        logits = logits.movedim(dim, -1)
        if class_probabilities is True and isinstance(target, Tensor) and target.dim() == logits.dim():
            target = target.movedim(dim, -1)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no classes; they must be [..., V] with V > 0")
    learned = False
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("softcap", softcap)):
        if isinstance(value, Tensor):
            check_learned(name, value, "logits", logits, backend)
            learned = True
    options = _check_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    extras = _extras(weight, use_token_scaling, return_z_loss, return_token_accuracy, return_predicted_tokens, dtype)
    soft = check_flag("class_probabilities", class_probabilities)
    if soft:
        cross_entropy_extras.check_probabilities(target, logits, "logits", tuple(logits.shape), options.ignore_index)
    else:
        _check_target(target, logits, "logits", logits.shape[:-1])
    if soft or extras is not None:
        if learned:
            raise TypeError(
                "label_smoothing, z_loss and softcap must be Python numbers beside class probabilities, class weights and further results"
            )
        extras = extras or _NO_EXTRAS
        cross_entropy_extras.check("weight", extras, logits, logits.shape[-1], soft)
        beyond = cross_entropy_extras.features("cross_entropy", options, extras, soft)
        chosen = chosen_backend("cross_entropy", logits.device.type, logits.dtype, backend, beyond)
        if chosen == "reference" or autograd.way(logits) == "definition":
            return cross_entropy_extras.from_definition(logits, target, reduction, options, extras)
        loss, stats = _rows(logits, target, options, chosen)
        return cross_entropy_extras.from_rows(loss, stats.sum(-1), logits, target, reduction, options, extras)
    chosen = chosen_backend("cross_entropy", logits.device.type, logits.dtype, backend)
    how = autograd.way(logits)
    if chosen == "reference" or learned or how == "definition":
        return reference_rows.cross_entropy(logits, target, *options, reduction)
    return _reduce(_rows(logits, target, options, chosen)[0], target, ignore_index, reduction)


def _rows(logits: Tensor, target: Tensor, options: Options, chosen: str) -> tuple[Tensor, Tensor]:
    """The losses, and the statistics of which the sum is lse."""
    if autograd.way(logits) == "function":
        return _CrossEntropy.apply(logits, target, options, chosen)
    return cross_entropy_rows(logits, target, *options, chosen)


_NO_EXTRAS = Extras(None, False, False, False, False, None)


def _extras(
    weight: Tensor | None, scaling: bool, z_loss: bool, accuracy: bool, predictions: bool, dtype: torch.dtype | None
) -> Extras | None:
    """None without any, which is the usual call."""
    if weight is None and dtype is None and scaling is z_loss is accuracy is predictions is False:
        return None
    return Extras(
        weight,
        check_flag("use_token_scaling", scaling),
        check_flag("return_z_loss", z_loss),
        check_flag("return_token_accuracy", accuracy),
        check_flag("return_predicted_tokens", predictions),
        dtype,
    )


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
) -> Any:  # the loss, or with one of return_... CrossEntropyOutput
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
    options = _check_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    how = autograd.way(hidden, weight, bias)
    extras = _extras(ce_weight, use_token_scaling, return_z_loss, return_token_accuracy, return_predicted_tokens, dtype)
    soft = check_flag("class_probabilities", class_probabilities)
    if soft:
        shape = (*hidden.shape[:-1], weight.shape[0])
        cross_entropy_extras.check_probabilities(target, hidden, "hidden", shape, options.ignore_index)
    else:
        _check_target(target, hidden, "hidden", hidden.shape[:-1])
    if soft or extras is not None:
        extras = extras or _NO_EXTRAS
        cross_entropy_extras.check("ce_weight", extras, hidden, weight.shape[0], soft)
        beyond = cross_entropy_extras.features("linear_cross_entropy", options, extras, soft)
        chosen = chosen_backend("linear_cross_entropy", hidden.device.type, hidden.dtype, backend, beyond)
        if chosen == "reference" or how == "definition":
            logits = reference_rows.linear_logits(hidden, weight, bias, None if soft else target != ignore_index)
            return cross_entropy_extras.from_definition(logits, target, reduction, options, extras)
        loss = linear_cross_entropy(
            hidden, weight, target, bias=bias, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, reduction="none", backend=chosen,
        )  # fmt: skip
        return cross_entropy_extras.from_rows(loss, None, None, target, reduction, options, extras)
    chosen = chosen_backend("linear_cross_entropy", hidden.device.type, hidden.dtype, backend)
    if chosen == "reference" or how == "definition":
        with torch.autocast(hidden.device.type, enabled=False):
            return reference_rows.linear_cross_entropy(hidden, weight, target, bias, *options, reduction)
    flops.register()
    rows, labels = hidden.reshape(target.numel(), hidden.shape[-1]), target.reshape(-1)
    needed = [t is not None and autograd.is_tracked(t) for t in (hidden, weight, bias)]
    if how == "op" or not any(needed):
        loss = linear_cross_entropy_rows(rows, weight, bias, labels, *options, chosen)
    elif reduction == "none":
        loss = autograd.apply(_LinearCrossEntropyRows, rows, weight, bias, labels, options, chosen)
    else:
        args = (rows, weight, bias, labels, _link(rows, weight, bias), options, reduction, chosen, *needed)
        return autograd.apply(_LinearCrossEntropy, *args)[0]
    return _reduce(loss.view(target.shape), target, ignore_index, reduction)


def _reduce(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _check_target(target: Tensor, x: Tensor, x_name: str, shape: torch.Size) -> None:
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
        cure = "convert it with target.long()"
        if isinstance(target, Tensor) and target.is_floating_point():
            cure += ", or pass class_probabilities=True if that is what it holds"
        raise TypeError(f"target must be an int64 tensor of class numbers, got {kind}; {cure}")
    check_same_device("target", target, x_name, x)
    if target.shape != shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; {x_name} of shape {tuple(x.shape)} needs {tuple(shape)}"
            + (
                "; classes in dimension 1, as torch has them, need dim=1"
                if target.shape == x.shape[:1] + x.shape[2:]
                else ""
            )
        )


def _check_options(
    ignore_index: int,
    label_smoothing: float | Tensor,
    z_loss: float | Tensor,
    softcap: float | Tensor | None,
    reduction: str,
) -> Options:
    """Tensors pass as they are: their values may be on a device."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction={reduction!r} is unknown; choose "mean", "sum" or "none"')
    if not isinstance(label_smoothing, Tensor):
        label_smoothing = check_number("label_smoothing", label_smoothing, "a number in [0, 1]")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1]")
    if not isinstance(z_loss, Tensor):
        z_loss = check_number("z_loss", z_loss)
        if z_loss < 0:
            raise ValueError(f"z_loss={z_loss} must not be negative")
    if not isinstance(softcap, Tensor):
        softcap = 0.0 if softcap is None else check_number("softcap", softcap)
        if softcap < 0:
            raise ValueError(f"softcap={softcap} must be positive, or None for none")
    ignore_index = check_integer("ignore_index", ignore_index, "the class number that is ignored, an integer")
    return Options(ignore_index, label_smoothing, z_loss, softcap)  # type: ignore[arg-type]  # tensors go to the definition alone


def _backward_definition(dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *options: Any) -> Tensor:
    """cross_entropy_backward in plain torch."""
    named = dict(zip(Options._fields, options))

    def rows(x: Tensor) -> Tensor:
        return reference_rows.cross_entropy(x, target, **named, reduction="none")

    return autograd.pull_back(rows, (logits,), (0,), (dloss,))[0]


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(logits: Tensor, target: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
        return cross_entropy_rows(logits, target, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(logits, target, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        args = (dloss, *ctx.saved_tensors, *ctx.options, ctx.backend)
        dlogits = differentiable(cross_entropy_backward, _backward_definition, *args)
        return dlogits, None, None, None


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
        return _reduce(loss, target, options.ignore_index, reduction), *grads

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


def _gradients_definition(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, dloss: Tensor, factor: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """linear_cross_entropy_gradients in plain torch."""
    needed, named = options[:3], dict(zip(Options._fields, options[3:]))

    def rows(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return reference_rows.linear_cross_entropy(h, w, target, b, **named, reduction="none")

    wanted = [i for i, need in enumerate(needed) if need]
    found = dict(zip(wanted, autograd.pull_back(rows, (hidden, weight, bias), wanted, (dloss,))))
    grads = (found[i] * factor if i in found else hidden.new_empty(0) for i in range(3))
    return rows(hidden, weight, bias), *(g.to(gradient_dtype(hidden)) for g in grads)


class _LinearCrossEntropyRows(torch.autograd.Function):
    """The loss of every row. Their weights in the gradient are known only in the backward pass, which computes the logits again."""

    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, options: Options, backend: str
    ) -> Tensor:
        return linear_cross_entropy_rows(hidden, weight, bias, target, *options, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.options, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        factor = torch.ones((), dtype=dloss.dtype, device=dloss.device)
        saved = ctx.saved_tensors  # once: under checkpointing they are computed again for it
        args = (*saved, dloss, factor, *needed, *ctx.options, ctx.backend)
        _, *grads = differentiable(linear_cross_entropy_gradients, _gradients_definition, *args)
        dtype = saved[0].dtype
        return (*(g.to(dtype) if need else None for g, need in zip(grads, needed)), None, None, None)
