"""What cross_entropy and linear_cross_entropy take beside their tensors, checked, and which of it the kernels know."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from foveate.backend.registry import Query, Supports
from foveate.ops.checks import (
    check_dtype_or_compute,
    check_flag,
    check_floating,
    check_integer,
    check_number,
    check_same_device,
    chosen_backend,
)

if TYPE_CHECKING:

    class SharedOptions(TypedDict, total=False):
        """The options that both losses share, for the overloads of return_..."""

        ignore_index: int
        reduction: str
        class_probabilities: bool
        use_token_scaling: bool
        dtype: torch.dtype | None
        backend: str | None

    class LogitsOptions(SharedOptions, total=False):
        label_smoothing: float | Tensor
        z_loss: float | Tensor
        softcap: float | Tensor | None
        dim: int
        weight: Tensor | None

    class LinearOptions(SharedOptions, total=False):
        bias: Tensor | None
        label_smoothing: float
        z_loss: float
        softcap: float | None
        ce_weight: Tensor | None


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none


SCHEMA = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def check_options(
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
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index={ignore_index} is no int64, as target is")
    return Options(ignore_index, label_smoothing, z_loss, softcap)  # type: ignore[arg-type]  # tensors go to the definition alone


def check_target(target: Tensor, x: Tensor, x_name: str, shape: torch.Size) -> None:
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


def check_probabilities(target: Tensor, x: Tensor, x_name: str, shape: tuple[int, ...], ignore_index: int) -> None:
    check_floating("target", target)
    check_same_device("target", target, x_name, x)
    if tuple(target.shape) != shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; with class_probabilities=True it must have the shape of the logits, {shape}"
        )
    if ignore_index >= 0:
        raise ValueError(f"ignore_index={ignore_index} is for class numbers; the target holds class probabilities")


class Extras(NamedTuple):
    """The options beyond `Options`, which the kernels do not know: they weigh the losses of rows, or ask for more than the loss."""

    weight: Tensor | None  # [V]
    token_scaling: bool
    z_loss: bool  # the three further results
    accuracy: bool
    predictions: bool
    dtype: torch.dtype | None

    @property
    def results(self) -> bool:
        return self.z_loss or self.accuracy or self.predictions


NO_EXTRAS = Extras(None, False, False, False, False, None)


def extras_of(
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


def check_extras(name: str, extras: Extras, x: Tensor, classes: int, soft: bool) -> None:
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


# Why a kernel cannot serve a call that has this.
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


def beyond_kernels(op: str, options: Options, extras: Extras, soft: bool, x: Tensor, backend: str) -> bool:
    """Whether the call has what only the definition knows; then any other backend by name raises the reason."""
    beyond = _features(op, options, extras, soft)
    return bool(beyond) and chosen_backend(op, x, backend, beyond) == "reference"


def _features(op: str, options: Options, extras: Extras, soft: bool) -> tuple[str, ...]:
    """What of _REASONS the call has."""
    beyond = options.label_smoothing != 0 or options.z_loss != 0
    linear = op == "linear_cross_entropy"
    used_by_name = {
        "class probabilities": soft,
        "weights": extras.weight is not None and beyond,
        "results": extras.results and linear,
        "scaling": extras.token_scaling and beyond and linear,
    }
    return tuple(name for name, used in used_by_name.items() if used)
