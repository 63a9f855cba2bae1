"""What cross_entropy and linear_cross_entropy do beyond a plain loss of class numbers: class weights, class probabilities, scaling by the
target's probability, further results. The row losses come from the same ops where those can give them; else from `definition`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.backend.reference.rows import safe_softmax
from foveate.backend.registry import Query, Supports
from foveate.ops.checks import check_dtype_or_compute, check_floating, check_same_device, compute_dtype
from foveate.ops.cross_entropy_ops import Options


class CrossEntropyOutput(NamedTuple):
    """The results that were asked for, None for the others. The names are Liger-Kernel's; only loss is differentiable."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class Extras(NamedTuple):
    weight: Tensor | None  # [V]
    token_scaling: bool
    z_loss: bool  # the three further results
    accuracy: bool
    predictions: bool
    dtype: torch.dtype | None

    @property
    def results(self) -> bool:
        return self.z_loss or self.accuracy or self.predictions


_REASONS = {
    "class probabilities": "its kernels take class numbers; class probabilities as target run on the reference backend",
    "weights": "class weights together with label_smoothing or z_loss need another sum over the classes than its kernels take",
    "results": "z_loss, token accuracy and predicted tokens of linear_cross_entropy need what its kernels keep to themselves",
    "scaling": "use_token_scaling together with label_smoothing or z_loss needs the target's logit, which its kernels keep to themselves",
}


def kernels(shared: Supports) -> Supports:
    """supports() of a backend whose kernels know the plain loss: `shared`, and a sentence for each option beyond that."""

    def supports(query: Query) -> str | None:
        for feature in query.features:
            if feature in _REASONS:
                return _REASONS[feature]  # type: ignore[index]
        return shared(query)

    return supports


def features(op: str, options: Options, extras: Extras, soft: bool) -> tuple[str, ...]:
    """What of _REASONS the call has."""
    beyond = options.label_smoothing != 0 or options.z_loss != 0
    linear = op == "linear_cross_entropy"
    found = {
        "class probabilities": soft,
        "weights": extras.weight is not None and beyond,
        "results": extras.results and linear,
        "scaling": extras.token_scaling and beyond and linear,
    }
    return tuple(name for name, used in found.items() if used)


def check(name: str, extras: Extras, x: Tensor, classes: int, soft: bool) -> None:
    if extras.weight is not None:
        check_dtype_or_compute(name, extras.weight, "the logits", x)
        if tuple(extras.weight.shape) != (classes,):
            raise ValueError(f"{name} has shape {tuple(extras.weight.shape)}; {classes} classes need ({classes},)")
    if extras.dtype is not None and (not isinstance(extras.dtype, torch.dtype) or not extras.dtype.is_floating_point):
        raise TypeError(
            f"dtype={extras.dtype} must be a floating torch.dtype, or None for the dtype that the loss is computed in"
        )
    if soft and (extras.token_scaling or extras.accuracy):
        what = "use_token_scaling" if extras.token_scaling else "return_token_accuracy"
        raise ValueError(f"{what}=True needs class numbers as target, int64; the target holds class probabilities")


def check_probabilities(target: Tensor, x: Tensor, x_name: str, shape: tuple[int, ...], ignore_index: int) -> None:
    check_floating("target", target)
    check_same_device("target", target, x_name, x)
    if tuple(target.shape) != shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; with class_probabilities=True it must have the shape of the logits, {shape}"
        )
    if ignore_index >= 0:
        raise ValueError(f"ignore_index={ignore_index} is for class numbers; the target holds class probabilities")


def definition(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses without the z term, and lse and the target's logit (0 for probabilities) of each row; 0 in ignored rows.

    With -log p = lse - x: w[t] * (1 - eps) * -log p[t] + eps / V * sum(w * -log p); for probabilities q, sum(w * q' * -log p) with
    q' = (1 - eps) * q + eps / V. That is torch's cross_entropy.
    """
    x = logits.to(compute_dtype(logits))
    soft = target.is_floating_point()
    used = None if soft else target != options.ignore_index
    if used is not None:
        x = torch.where(used[..., None], x, 0.0)
    if options.softcap > 0:
        x = options.softcap * torch.tanh(x / options.softcap)
    lse = safe_softmax(x)[1]
    eps, classes = options.label_smoothing, x.shape[-1]
    shares = (1 - eps) * target.to(x.dtype) + eps / classes if soft else None
    if used is not None:
        index = torch.where(used, target, 0)
        at_target = x.gather(-1, index[..., None]).squeeze(-1)
        loss = (1 - eps) * (lse - at_target)
        if weight is not None:
            loss = loss * weight.to(x.dtype)[index]
        shares = torch.full_like(x, eps / classes) if eps > 0 else None
    else:
        loss, at_target = torch.zeros_like(lse), torch.zeros_like(lse)
    if shares is not None:
        if weight is not None:
            shares = shares * weight.to(x.dtype)
        surprise = lse[..., None] - x
        surprise = torch.where(surprise.isinf() & (shares == 0), 0.0, surprise)  # 0 * inf
        loss = loss + (shares * surprise).sum(-1)
    if used is not None:
        loss, lse, at_target = (torch.where(used, t, 0.0) for t in (loss, lse, at_target))
    return loss, lse, at_target


def combine(
    loss: Tensor,
    z_rows: Tensor | None,
    probability: Tensor | None,
    predicted: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    z_is_inside: bool,
    reduction: str,
    options: Options,
    extras: Extras,
) -> Any:
    """The loss, or CrossEntropyOutput, of row losses. weight: of each row, to be applied and divided by; probability of the target:
    scales. z_rows: z_loss * lse**2, in `loss` already if z_is_inside."""
    soft = target.is_floating_point()
    used = torch.ones_like(loss, dtype=torch.bool) if soft else target != options.ignore_index
    if probability is not None:
        loss = loss * probability
        z_rows = None if z_rows is None else z_rows * probability
    if weight is not None:
        loss = loss * weight

    def reduced(rows: Tensor, total: Tensor | None = None) -> Tensor:
        if reduction == "none":
            return rows
        return rows.sum() if reduction == "sum" else rows.sum() / (used.sum() if total is None else total)

    result = reduced(loss, weight.sum() if weight is not None else None)
    z = None if z_rows is None else reduced(z_rows)
    if z is not None and not z_is_inside:
        result = result + z
    dtype = extras.dtype or result.dtype
    if not extras.results:
        return result.to(dtype)
    accuracy = None
    if extras.accuracy and predicted is not None:
        hits = ((predicted == target) & used).to(torch.float32)
        accuracy = hits if reduction == "none" else hits.sum() / used.sum()
    if z is None and extras.z_loss:
        z = torch.zeros_like(result)
    return CrossEntropyOutput(
        result.to(dtype),
        z.detach().to(dtype) if extras.z_loss and z is not None else None,
        accuracy,
        torch.where(used, predicted, -1) if extras.predictions and predicted is not None else None,
    )


def from_definition(logits: Tensor, target: Tensor, reduction: str, options: Options, extras: Extras) -> Any:
    """Everything from the logits in plain torch."""
    loss, lse, at_target = definition(logits, target, extras.weight, options)
    probability = (at_target - lse).detach().exp() if extras.token_scaling else None
    row_weights = None
    if (
        extras.weight is not None and not target.is_floating_point()
    ):  # applied in `definition`: only the mean divides by them
        used = target != options.ignore_index
        row_weights = torch.where(used, extras.weight.to(loss.dtype)[torch.where(used, target, 0)], 0.0)
    z_rows = options.z_loss * lse * lse if options.z_loss != 0 else None
    predicted = logits.detach().argmax(-1) if extras.accuracy or extras.predictions else None
    if row_weights is not None and reduction == "mean":
        count = row_weights.sum() / torch.ones_like(loss).where(used, 0.0).sum()
        loss = loss / count
    return combine(loss, z_rows, probability, predicted, target, None, False, reduction, options, extras)


def from_rows(
    loss: Tensor,
    lse: Tensor | None,
    logits: Tensor | None,
    target: Tensor,
    reduction: str,
    options: Options,
    extras: Extras,
) -> Any:
    """From the row losses of a kernel, the z term inside; lse and logits where the call has them."""
    used = target != options.ignore_index
    index = torch.where(used, target, 0)
    probability = None
    if extras.token_scaling and logits is not None and lse is not None:
        x = logits.detach().gather(-1, index[..., None]).squeeze(-1).to(loss.dtype)
        if options.softcap > 0:
            x = options.softcap * torch.tanh(x / options.softcap)
        probability = torch.where(used, (x - lse).exp(), 0.0)
    elif extras.token_scaling:
        probability = torch.where(used, (-loss.detach()).exp(), 0.0)
    row_weights = None
    if extras.weight is not None:
        row_weights = torch.where(used, extras.weight.to(loss.dtype)[index], 0.0)
    z_rows = None
    if extras.z_loss and lse is not None:
        z_rows = torch.where(used, options.z_loss * lse * lse, 0.0)
    predicted = None
    if (extras.accuracy or extras.predictions) and logits is not None:
        predicted = logits.detach().argmax(-1)
    return combine(loss, z_rows, probability, predicted, target, row_weights, True, reduction, options, extras)
