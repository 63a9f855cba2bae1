"""What the gradients of several ops share: which way a call has to go, and derivatives beyond the first reverse pass.

The kernels know an op and its first reverse-mode gradient. Everything else (forward mode, second derivatives, transforms inside
torch.compile, a learned number) comes from the op's plain torch definition, which torch differentiates as often as anyone likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.ops.torch_internals import (
    dispatch_modes,
    forward_ad,
    graph_is_kept,
    is_batched_tensor,
    is_legacy_batched_tensor,
    is_wrapped,
    profiler_is_on,
    recordable,
    saved_tensors_hooks,
    tracing_state,
    transforms_are_active,
    unwrapped,
)

PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter))


def way(*tensors: Tensor | None) -> str:
    """How a call on these tensors has to run; the first is there, and its device is that of all.

    "kernel": straight to the op's implementation, where dispatcher and autograd would add nothing but their time: real tensors, no
    gradient, no mode, tracer or profiler. "op": nobody wants a derivative. "function": through the op's autograd.Function, which
    knows the reverse pass and torch.func's levels of it. "definition": as plain torch, because a tangent goes through, or because
    torch.compile traces a transform of torch.func: there it takes an autograd.Function for its forward pass alone, and the gradient
    would be zero without a word.
    """
    if torch.compiler.is_compiling():
        return _way_in_a_graph(tensors)
    forward_mode = forward_ad._current_level >= 0
    if transforms_are_active():
        return "definition" if forward_mode else "function"
    if forward_mode and any(x is not None and has_tangent(x) for x in tensors):
        return "definition"
    recording, plain = torch.is_grad_enabled(), not forward_mode
    for x in tensors:  # not any(...): a generator costs as much again
        if x is None:
            continue
        if recording and x.requires_grad:
            return "function"
        if type(x) not in PLAIN_TYPES or x.is_neg():
            plain = False
    first: Any = tensors[0]
    if not plain or not (first.is_cpu or first.is_cuda) or dispatch_modes is None or tracing_state is None:
        return "op"
    return "op" if dispatch_modes() or tracing_state() is not None or profiler_is_on() else "kernel"


def _way_in_a_graph(tensors: Sequence[Tensor | None]) -> str:
    if transforms_are_active() or forward_ad._current_level >= 0:
        return "definition"
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return "function"
    return "op"


def is_traced() -> bool:
    """Inside torch.jit.trace."""
    return tracing_state is not None and tracing_state() is not None


def run(how: str, kernel: Callable[..., Any], op: Callable[..., Any], function: Any, *args: Any) -> Any:
    """A call by its `way`, but for "definition". kernel: the implementation that is registered for op. All three take the same
    arguments, of which the last is the backend's name, "" for the best: each implementation chooses by `checks.chosen_backend`."""
    if how == "kernel":
        return kernel(*args)
    return apply(function, *args) if how == "function" else op(*args)


def in_plain_torch(definition: Callable[..., Any], *args: Any) -> Any:
    """The reference backend inside an op: definition(*args), contiguous, without autocast and without a graph of its own."""
    x = next(x for x in args if isinstance(x, Tensor))
    with (
        recordable(),
        torch.no_grad(),
        torch.autocast(x.device.type, enabled=False),
    ):  # recordable, as pull_back records
        results = definition(*args)
    if isinstance(results, Tensor):
        return results.contiguous()
    return tuple(result.contiguous() for result in results)


def has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None


def is_tracked(x: Tensor) -> bool:
    """True if x has a gradient or a tangent at any level of torch.func's transforms, where x.requires_grad shows the innermost alone."""
    if not transforms_are_active():
        tangent = forward_ad._current_level >= 0 and not torch.compiler.is_compiling() and has_tangent(x)
        return tangent or (x.requires_grad and torch.is_grad_enabled())
    if torch.compiler.is_compiling():
        return x.requires_grad  # the levels cannot be seen there
    while True:
        # The tangent of a mapped tensor is below its wrapper.
        tangent = forward_ad._current_level >= 0 and not is_batched_tensor(x) and has_tangent(x)
        if x.requires_grad or tangent:
            return True
        if not is_wrapped(x):
            return False
        x = unwrapped(x)


def differentiable(fast: Callable[..., Any], definition: Callable[..., Any], *args: Any) -> Any:
    """fast(*args) inside a backward pass. Where that pass is itself recorded (create_graph, torch.func), its derivative is that of
    definition(*args): the same results in plain torch. It is computed when someone asks for it, and costs nothing until then."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return fast(*args)
    return _Differentiable.apply(fast, definition, *args)


class _Differentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(fast: Any, definition: Any, *args: Any) -> Any:
        return fast(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.definition, args = inputs[1], inputs[2:]
        ctx.places = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in args]
        ctx.save_for_backward(*(args[i] for i in ctx.places))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        args = list(ctx.others)
        for i, x in zip(ctx.places, ctx.saved_tensors):
            args[i] = x
        wanted = [i for i in ctx.places if ctx.needs_input_grad[2 + i]]
        pulled = pull_back(ctx.definition, args, wanted, grads)
        gradients = dict(zip(wanted, pulled))
        return (None, None, *(gradients.get(i) for i in range(len(args))))


def pull_back(
    f: Callable[..., Any], args: Sequence[Any], wanted: Sequence[int], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients of f(*args) in args[i] for i in wanted, differentiable themselves, given those of its results."""

    def of_wanted(*xs: Tensor) -> tuple[Tensor, ...]:
        filled = list(args)
        for i, x in zip(wanted, xs):
            filled[i] = x
        with torch.autocast("cpu" if xs[0].is_meta else xs[0].device.type, enabled=False):
            results = f(*filled)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    pulled: Any = torch.func.vjp(of_wanted, *(args[i] for i in wanted))
    outputs, pull = pulled
    return pull(tuple(g.to(out.dtype) for g, out in zip(grads, outputs)))


def no_second_derivative(op: Any, cure: str, *args: Any) -> Any:
    """op(*args) inside a backward pass whose result cannot be differentiated again, which then raises rather than be dropped."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    return _Once.apply(op, cure, *args)


class _Once(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(op: Any, cure: str, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.cure = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(ctx.cure)


def distinct(args: Sequence[Any]) -> tuple[Any, ...]:
    """For an autograd.Function inside torch.compile, which takes no tensor twice: the second one becomes a view."""
    seen: list[Tensor] = []
    result = []
    for x in args:
        if isinstance(x, Tensor):
            if any(x is y for y in seen):
                x = x.view_as(x)
            else:
                seen.append(x)
        result.append(x)
    return tuple(result)


def apply(function: Any, *args: Any) -> Any:
    """function.apply(*args), also where torch.compile traces it."""
    return function.apply(*(distinct(args) if torch.compiler.is_compiling() else args))


def batch_first(t: Tensor, dim: int | None, size: int) -> Tensor:
    """For vmap rules: t with the mapped dimension in front, expanded (as a view) where t is not mapped."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def each_slice(op: Callable[..., Any], size: int, args: Sequence[Any], dims: Sequence[int | None]) -> tuple[Any, Any]:
    """The vmap rule of an op whose slices are calls of their own."""
    slices = [op(*(x if d is None else x.select(d, i) for x, d in zip(args, dims))) for i in range(size)]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    return tuple(torch.stack(results) for results in zip(*slices)), (0,) * len(slices[0])


def nobody_keeps_saved_tensors() -> bool:
    """Where tensors are saved for a backward pass: whether no hook (torch.autograd.graph.saved_tensors_hooks, save_on_cpu) can keep
    them beyond it. False where this torch cannot say."""
    return not torch.compiler.is_compiling() and saved_tensors_hooks is not None and saved_tensors_hooks(False) is None


def is_batched(x: Tensor) -> bool:
    """Under torch.func.vmap, or the older vmap of autograd.grad(is_grads_batched=True)."""
    return is_wrapped(x) or is_legacy_batched_tensor(x)


def graph_is_freed() -> bool:
    """Inside a backward pass: whether it is the last one through its graph, so that what is saved there may be overwritten."""
    if torch.compiler.is_compiling() or transforms_are_active():
        return False
    return graph_is_kept is not None and not graph_is_kept()
