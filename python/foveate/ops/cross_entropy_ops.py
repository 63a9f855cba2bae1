"""The ops under loss.py: schemas, implementations, fakes and vmap rules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.backend import native
from foveate.ops import library
from foveate.ops.autograd import batch_first, each_slice
from foveate.ops.checks import compute_dtype
from foveate.ops.onednn_linear import product

_C = native._C

# Of the logits of one chunk of tokens. Far more than a core's cache, since the matrix products want many tokens, and far less
# than all logits.
_CHUNK_BYTES = 32 << 20
_GPU_CHUNK_BYTES = 512 << 20  # there each chunk costs a pass over the gradient of the weight in fp32
_MIN_CHUNK_TOKENS = 64
_TERM_BYTES = 16 << 20  # of a chunk's part of the gradient of the weight, on the CPU


class Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float  # 0: none


_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap"


def _matrix(logits: Tensor) -> Tensor:
    """[rows, V] with contiguous rows."""
    logits = logits.reshape(logits.shape[:-1].numel(), logits.shape[-1])
    return logits if logits.shape[-1] <= 1 or logits.stride(-1) == 1 else logits.contiguous()


# ---- cross_entropy: logits [..., V], target [...] -> loss [...], stats [..., 2] (max and log of the sum of exp(x - max)) ----


def _forward(
    logits: Tensor,
    target: Tensor,
    ignore: int,
    smoothing: float,
    z_loss: float,
    softcap: float,
    backend: str = "native",
) -> tuple[Tensor, Tensor]:
    loss, stats = _forward_fake(logits, target)
    target = target.contiguous().view(-1)
    options = (ignore, smoothing, z_loss, softcap)
    if backend == "triton":
        from foveate.backend.triton.cross_entropy import cross_entropy

        cross_entropy(_matrix(logits), target, loss.view(-1), stats.view(-1, 2), *options)
        return loss, stats
    _C.cross_entropy_forward(
        _matrix(logits), target, loss.view(-1), stats.view(-1, 2), *options, torch.get_num_threads()
    )
    return loss, stats


def _forward_fake(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return logits.new_empty(target.shape, dtype=dtype), logits.new_empty((*target.shape, 2), dtype=dtype)


def _backward(
    dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, ignore: int, smoothing: float, z_loss: float,
    softcap: float, backend: str = "native",
) -> Tensor:  # fmt: skip
    options = (ignore, smoothing, z_loss, softcap)
    return _backward_into(_backward_fake(dloss, logits), dloss, logits, target, stats, *options, backend)


def _backward_into(
    dlogits: Tensor, dloss: Tensor, logits: Tensor, target: Tensor, stats: Tensor, ignore: int, smoothing: float, z_loss: float,
    softcap: float, backend: str,
) -> Tensor:  # fmt: skip
    """dlogits may be logits itself."""
    dloss, target, stats = dloss.reshape(-1), target.contiguous().view(-1), stats.contiguous().view(-1, 2)
    options = (ignore, smoothing, z_loss, softcap)
    if backend == "triton":
        from foveate.backend.triton.cross_entropy import cross_entropy_backward

        cross_entropy_backward(dloss.contiguous(), _matrix(logits), target, stats, _matrix(dlogits), *options)
        return dlogits
    _C.cross_entropy_backward(
        dloss, _matrix(logits), target, stats, _matrix(dlogits), *options, torch.get_num_threads()
    )
    return dlogits


def _backward_fake(dloss: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


cross_entropy_rows = library.define(
    f"cross_entropy(Tensor logits, Tensor target, {_OPTIONS}, str backend='native') -> (Tensor loss, Tensor stats)",
    impl=_forward,
    fake=_forward_fake,
)
cross_entropy_backward = library.define(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor stats, {_OPTIONS}, "
    "str backend='native') -> Tensor",
    impl=_backward,
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


# ---- linear_cross_entropy: hidden [T, K], weight [V, K], bias [V] or None, target [T] ----------------------------------------


def _chunks(
    target: Tensor, vocab: int, itemsize: int, ignore_index: int, backend: str = "native"
) -> Iterator[Tensor | slice]:
    """The rows of the tokens that are not ignored, chunk by chunk; but of all tokens for triton and on a GPU, where to know them
    is to wait for the device."""
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
    loss, dtype = hidden.new_zeros(target.shape, dtype=compute_dtype(hidden)), _product_dtype(hidden)
    weight, bias = _cast(weight, bias, dtype)
    for rows in _chunks(target, weight.shape[0], dtype.itemsize, ignore, backend):
        logits = product(hidden[rows].to(dtype), weight, bias)
        loss[rows] = _forward(logits, target[rows], ignore, smoothing, z_loss, softcap, backend)[0]
        del logits  # before the next chunk's come to be
    return loss


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
    options = (ignore, smoothing, z_loss, softcap, backend)
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
        loss[rows], stats = _forward(logits, t, *options)
        dlogits = _backward_into(logits, dloss[rows], logits, t, stats, *options)
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
    f"linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, {_OPTIONS}, "
    "str backend='native') -> Tensor",
    impl=_linear,
    fake=_linear_fake,
)
# The losses, and factor times the gradients of sum(dloss * loss), fp32 for float16; those not needed are empty. factor comes last, in
# the compute dtype, so that 1 / tokens does not push float16 gradients of the logits below its range.
linear_cross_entropy_gradients = library.define(
    "linear_cross_entropy_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor dloss, Tensor factor, "
    f"bool need_hidden, bool need_weight, bool need_bias, {_OPTIONS}, str backend='native') "
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
