"""Nothing is timed before it is right, by the rule of `tolerance`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from foveate.bench.tolerance import FORWARD_FACTOR, Measure, largest


class Checked(NamedTuple):
    """What is compared: our result, torch's in the same dtype, and the exact one in fp64."""

    name: str
    ours: Tensor
    torch_same_dtype: Tensor
    exact: Tensor
    floor: float  # of the op, from `tolerance`
    factor: float = FORWARD_FACTOR


class WrongResult(RuntimeError):
    """A result beyond the tolerance; the message has the numbers."""


def check(case: str, results: list[Checked]) -> float:
    """The largest share of its limit that an error takes; raises WrongResult above 1.

    No result may have NaN or infinity.
    """
    worst = 0.0
    for r in results:
        if r.ours.shape != r.exact.shape:
            raise WrongResult(f"{case}: {r.name} has shape {tuple(r.ours.shape)}, expected {tuple(r.exact.shape)}")
        exact = r.exact.double()
        error = float((r.ours.double() - exact).abs().max())
        theirs = float((r.torch_same_dtype.double() - exact).abs().max())
        limit = Measure(theirs, r.floor).limit(r.factor, largest(exact), r.ours.dtype)
        if not error <= limit:  # also for NaN
            raise WrongResult(
                f"{case}: {r.name} is off by {error:.3e}, allowed are {limit:.3e} ({r.factor:g} x torch's {theirs:.3e}, at least "
                f"{r.floor:.3e}, and a rounding)"
            )
        worst = max(worst, error / limit if limit > 0 else 0.0)
    return worst
