"""cross_entropy: public function, op, fake and gradient. Kernels: csrc/cpu/rows/cross_entropy.cpp, csrc/cuda/rows/cross_entropy.cu,
backend/triton/cross_entropy.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from foveate.backend import native
from foveate.backend import triton as triton_backend
from foveate.backend.reference import rows as reference_rows
from foveate.backend.registry import register
from foveate.ops import autograd, library
from foveate.ops.autograd import batch_first, differentiable, in_plain_torch
from foveate.ops.checks import (
    check_backend_name,
    check_flag,
    check_floating,
    check_integer,
    check_learned,
    chosen_backend,
    compute_dtype,
)
from foveate.ops.cross_entropy import options as checks
from foveate.ops.cross_entropy import reduction as results
from foveate.ops.cross_entropy.options import NO_EXTRAS, SCHEMA, Options
from foveate.ops.cross_entropy.reduction import CrossEntropyOutput
from foveate.ops.layout import matrix

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from foveate.ops.cross_entropy.options import LogitsOptions

_C = native._C

register("cross_entropy", "native", checks.kernels(native.supports()))
register("cross_entropy", "triton", checks.kernels(triton_backend.serves))
register("cross_entropy", "reference", lambda query: None)


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_z_loss: Literal[False] = False, return_token_accuracy: Literal[False] = False,
    return_predicted_tokens: Literal[False] = False, **options: Unpack[LogitsOptions],
) -> Tensor: ...  # fmt: skip
@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_z_loss: bool = False, return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False, **options: Unpack[LogitsOptions],
) -> Tensor | CrossEntropyOutput: ...  # fmt: skip
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
) -> Tensor | CrossEntropyOutput:
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
    if type(dim) is not int or dim != -1:
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
    options = checks.check_options(ignore_index, label_smoothing, z_loss, softcap, reduction)
    extras = checks.extras_of(
        weight, use_token_scaling, return_z_loss, return_token_accuracy, return_predicted_tokens, dtype
    )
    soft = check_flag("class_probabilities", class_probabilities)
    if soft:
        checks.check_probabilities(target, logits, "logits", tuple(logits.shape), options.ignore_index)
    else:
        checks.check_target(target, logits, "logits", logits.shape[:-1])
    preferred, how = check_backend_name(backend), autograd.way(logits, target)
    if soft or extras is not None:
        if learned:
            raise TypeError(
                "label_smoothing, z_loss and softcap must be Python numbers beside class probabilities, class weights and further results"
            )
        extras = extras or NO_EXTRAS
        checks.check_extras("weight", extras, logits, logits.shape[-1], soft)
        beyond = checks.beyond_kernels("cross_entropy", options, extras, soft, logits, preferred)
        if beyond or how == "definition":
            return results.from_definition(logits, target, reduction, options, extras)
        loss, stats = _rows(how, logits, target, options, preferred)
        return results.from_rows(loss, stats.sum(-1), logits, target, reduction, options, extras)
    if learned or how == "definition":
        return reference_rows.cross_entropy(logits, target, *options, reduction)
    return results.reduced(_rows(how, logits, target, options, preferred)[0], target, ignore_index, reduction)


def _rows(how: str, logits: Tensor, target: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """The losses, and the statistics of which the sum is lse."""
    return autograd.run(how, forward, cross_entropy_rows, _CrossEntropy, logits, target, *options, backend)


# logits [..., V], target [...] -> loss [...], stats [..., 2] (max and log of the sum of exp(x - max))


def forward(
    logits: Tensor,
    target: Tensor,
    ignore: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str = "native",
) -> tuple[Tensor, Tensor]:
    options = (ignore, smoothing, z_loss, softcap)
    backend = chosen_backend("cross_entropy", logits, backend)
    if backend == "reference":
        return in_plain_torch(reference_rows.cross_entropy_rows, logits, target, *options)
    loss, stats = _forward_fake(logits, target)
    target = target.contiguous().view(-1)
    if backend == "triton":
        from foveate.backend.triton.cross_entropy import cross_entropy

        cross_entropy(matrix(logits), target, loss.view(-1), stats.view(-1, 2), *options)
        return loss, stats
    _C.cross_entropy_forward(
        matrix(logits), target, loss.view(-1), stats.view(-1, 2), *options, torch.get_num_threads()
    )
    return loss, stats


def _forward_fake(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty((*target.shape, 2), dtype=dtype)


def backward(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, ignore: int, smoothing: float, z_loss: float,
    softcap: float, backend: str = "native",
) -> Tensor:  # fmt: skip
    options = (ignore, smoothing, z_loss, softcap)
    return backward_into(_backward_fake(dloss, logits), dloss, logits, target, stats, *options, backend)


def backward_into(
    dlogits: Tensor, dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, ignore: int, smoothing: float, z_loss: float,
    softcap: float, backend: str,
) -> Tensor:  # fmt: skip
    """dlogits may be logits itself."""
    options = (ignore, smoothing, z_loss, softcap)
    backend = chosen_backend("cross_entropy", logits, backend)
    if backend == "reference":
        return dlogits.copy_(in_plain_torch(_backward_definition, dloss, logits, target, stats, *options))
    dloss, target, stats = dloss.reshape(-1), target.contiguous().view(-1), stats.contiguous().view(-1, 2)
    if backend == "triton":
        from foveate.backend.triton.cross_entropy import cross_entropy_backward

        cross_entropy_backward(dloss.contiguous(), matrix(logits), target, stats, matrix(dlogits), *options)
        return dlogits
    _C.cross_entropy_backward(dloss, matrix(logits), target, stats, matrix(dlogits), *options, torch.get_num_threads())
    return dlogits


def _backward_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


cross_entropy_rows = library.define(
    f"cross_entropy(Tensor logits, Tensor target, {SCHEMA}, str backend='native') -> (Tensor loss, Tensor stats)",
    impl=forward,
    fake=_forward_fake,
)
cross_entropy_backward = library.define(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor stats, {SCHEMA}, "
    "str backend='native') -> Tensor",
    impl=backward,
    fake=_backward_fake,
)


def _forward_vmap(info: Any, in_dims: Any, logits: Tensor, target: Tensor, *options: Any) -> tuple[Any, Any]:
    logits, target = (batch_first(t, dim, info.batch_size) for t, dim in zip((logits, target), in_dims))
    return cross_entropy_rows(logits, target, *options), (0, 0)


def _backward_vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    tensors = (batch_first(t, dim, info.batch_size) for t, dim in zip(args[:4], in_dims))
    return cross_entropy_backward(*tensors, *args[4:]), 0


library.vmap("cross_entropy", _forward_vmap)
library.vmap("cross_entropy_backward", _backward_vmap)


def _backward_definition(dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, *options: Any) -> Tensor:
    """cross_entropy_backward in plain torch."""
    named = dict(zip(Options._fields, options))

    def rows(x: Tensor) -> Tensor:
        return reference_rows.cross_entropy(x, target, **named, reduction="none")

    return autograd.pull_back(rows, (logits,), (0,), (dloss,))[0]


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True  # the ops have their own rules

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return cross_entropy_rows(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        logits, target, *ctx.options = inputs
        ctx.save_for_backward(logits, target, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        args = (dloss, *ctx.saved_tensors, *ctx.options)
        dlogits = differentiable(cross_entropy_backward, _backward_definition, *args)
        return dlogits, *(None,) * 6
