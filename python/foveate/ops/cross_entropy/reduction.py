"""From the losses of rows to the result: class weights and probabilities, scaling by the target's probability, further results, the mean.

The losses of rows come from the kernels where those can give them (`from_rows`), else from the logits in plain torch (`from_definition`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from foveate.backend.reference.rows import safe_softmax
from foveate.ops.checks import compute_dtype
from foveate.ops.cross_entropy.options import Extras, Options


class CrossEntropyOutput(NamedTuple):
    """The results that were asked for, None for the others. The names are Liger-Kernel's; only loss is differentiable."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def reduced(loss: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


def from_definition(
    logits: Tensor, target: Tensor, reduction: str, options: Options, extras: Extras
) -> Tensor | CrossEntropyOutput:
    """Everything from the logits in plain torch."""
    loss, lse, at_target = _definition(logits, target, extras.weight, options)
    probability = (at_target - lse).detach().exp() if extras.token_scaling else None
    row_weights = None
    if (
        extras.weight is not None and not target.is_floating_point()
    ):  # applied in `_definition`: only the mean divides by them
        used = target != options.ignore_index
        row_weights = torch.where(used, extras.weight.to(loss.dtype)[torch.where(used, target, 0)], 0.0)
    z_rows = options.z_loss * lse * lse if options.z_loss != 0 else None
    predicted = logits.detach().argmax(-1) if extras.accuracy or extras.predictions else None
    if row_weights is not None and reduction == "mean":
        count = row_weights.sum() / torch.ones_like(loss).where(used, 0.0).sum()
        loss = loss / count
    return _combine(loss, z_rows, probability, predicted, target, None, False, reduction, options, extras)


def from_rows(
    loss: Tensor,
    lse: Tensor | None,
    logits: Tensor | None,
    target: Tensor,
    reduction: str,
    options: Options,
    extras: Extras,
) -> Tensor | CrossEntropyOutput:
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
    return _combine(loss, z_rows, probability, predicted, target, row_weights, True, reduction, options, extras)


def _definition(
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


def _combine(
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
) -> Tensor | CrossEntropyOutput:
    """The loss, or CrossEntropyOutput, of row losses. weight: of each row, to be applied and divided by; probability of the target:
    scales. z_rows: z_loss * lse**2, in `loss` already if z_is_inside."""
    soft = target.is_floating_point()
    used = torch.ones_like(loss, dtype=torch.bool) if soft else target != options.ignore_index
    if probability is not None:
        loss = loss * probability
        z_rows = None if z_rows is None else z_rows * probability
    if weight is not None:
        loss = loss * weight

    def over_rows(rows: Tensor, total: Tensor | None = None) -> Tensor:
        if reduction == "none":
            return rows
        return rows.sum() if reduction == "sum" else rows.sum() / (used.sum() if total is None else total)

    result = over_rows(loss, weight.sum() if weight is not None else None)
    z = None if z_rows is None else over_rows(z_rows)
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
