"""How the ops run on torch.distributed.tensor's DTensors: the dimensions over which each may be sharded without communication.

Batch and heads of attention, so that tensor parallelism works, and every dimension that an op over rows does not reduce. Whatever else a
DTensor is sharded by, torch first gathers. Gradients of what all shards share (norm weights, a broadcast bias, tables) are partial sums.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from foveate.backend.registry import UnsupportedError
from foveate.ops.attention.operands import AXES, DIFFERENTIABLE, Operands

Labels = Sequence[Any] | None  # of the dimensions of a tensor, None for one that is not divided

_registered = False


def notice(x: Any) -> None:
    """Registers the strategies with torch when the first DTensor comes: the import of torch.distributed.tensor takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and not _registered and isinstance(x, getattr(module, "DTensor", ())):
        _register()


def refuse(op: str, cure: str, *tensors: Any) -> None:
    """UnsupportedError where one of the tensors is a DTensor, for an op that has no strategy: torch's own error names only its parts."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and any(isinstance(x, module.DTensor) for x in tensors):
        raise UnsupportedError(f"{op} takes no DTensors: {cure}")


notice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _strategies(inputs: Sequence[tuple[Any, Labels]], outputs: Sequence[tuple[Labels, bool]], count: int) -> Any:
    """For register_sharding: all replicated, or divided by one label that every labelled dimension is sharded over.

    inputs: specs with their labels; outputs: labels, and whether what lacks the label is a sum over the shards; count: of arguments.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    def place(spec: Any, labels: Labels, label: Any) -> Any:
        if spec is None:
            return None
        return Shard(labels.index(label)) if labels and label in labels else Replicate()

    rest = [None] * (count - len(inputs))
    strategies: list[Any] = [
        ([Replicate() for _ in outputs], [None if spec is None else Replicate() for spec, _ in inputs] + rest)
    ]
    labels = dict.fromkeys(x for spec, names in inputs if spec is not None for x in names or () if x is not None)
    for label in labels:
        sizes = [
            (spec.shape[names.index(label)], spec.mesh.size())
            for spec, names in inputs
            if spec is not None and names and label in names
        ]
        if any(size % shards for size, shards in sizes):
            continue  # shards of different sizes would pair query heads with other KV heads
        strategies.append(
            (
                [place(True, names, label) if names and label in names else Partial() if summed else Replicate()
                 for names, summed in outputs],
                [place(spec, names, label) for spec, names in inputs] + rest,
            )
        )  # fmt: skip
    return strategies


def _broadcast(spec: Any, names: Sequence[Any]) -> Labels:
    """names without those of dimensions of size 1, aligned at the last dimension."""
    if spec is None:
        return None
    own = list(names)[len(names) - len(spec.shape) :]
    return [name if size != 1 else None for name, size in zip(own, spec.shape)]


def _operands(c: Operands) -> list[tuple[Any, Labels]]:
    """Each tensor of a call with the labels that `AXES` gives it, "B" and "H"."""
    packed = c.cu_q is not None
    labelled: list[tuple[Any, Labels]] = []
    for name, axes in AXES.items():
        spec, divided = getattr(c, name), {"B", "B?", "H", "H?"}
        if packed:  # no dimension is the batch, and that of all tokens is none of its own
            divided, axes = {"H", "H?"}, axes[1:] if axes[:2] == ("B", "S") else axes
        labels = [axis[0] if axis in divided else None for axis in axes]
        labelled.append((spec, _broadcast(spec, labels) if "B?" in axes else labels))
    return labelled


def _without_labels(inputs: list[tuple[Any, Labels]], condition: bool) -> list[tuple[Any, Labels]]:
    return [(spec, None) for spec, _ in inputs] if condition else inputs


def _attention_forward(*args: Any) -> Any:
    c = Operands(*args)
    inputs = _operands(c)
    row, rows = inputs[0][1], ["B", "H", None] if c.cu_q is None else ["H", None]
    # The mask of dropout counts batch rows and heads, which a shard counts from 0.
    inputs = _without_labels(inputs, c.philox is not None)
    return _strategies(inputs, [(row, False), (rows, False)], len(args))


def _attention_backward(*args: Any) -> Any:
    dout, dlse, out, lse, *rest, wanted = args
    c = Operands(*rest)
    operands = _operands(c)
    row, rows = operands[0][1], ["B", "H", None] if c.cu_q is None else ["H", None]
    inputs = [(dout, row), (dlse, rows), (out, row), (lse, rows), *operands]
    outputs = [(operands[i][1], True) if want else (None, False) for i, want in zip(DIFFERENTIABLE, wanted)]
    return _strategies(_without_labels(inputs, c.philox is not None), outputs, len(args))


def _dims(spec: Any, *, but: int = 1) -> list[Any]:
    """A label for each dimension of spec, none for the last `but`."""
    n = len(spec.shape)
    return [i if i < n - but else None for i in range(n)]


def _softmax(x: Any, bias: Any, mask: Any, scale: Any, causal: bool, *rest: Any) -> Any:
    names = _dims(x, but=2 if causal else 1)
    inputs = [(x, names), (bias, _broadcast(bias, names)), (mask, _broadcast(mask, names))]
    return _strategies(inputs, [(names, False)], 5 + len(rest))


def _rowwise(*args: Any) -> Any:
    """log_softmax and softmax_backward: all tensors have one shape."""
    names = _dims(args[0])
    tensors = [a for a in args if hasattr(a, "placements")]
    return _strategies([(t, names) for t in tensors], [(names, False)], len(args))


def _rms_norm(x: Any, weight: Any, *rest: Any) -> Any:
    names = _dims(x)
    return _strategies([(x, names), (weight, None)], [(names, False), (names[:-1], False)], 2 + len(rest))


def _add_rms_norm(x: Any, residual: Any, weight: Any, *rest: Any) -> Any:
    names = _dims(x)
    inputs, outputs = (
        [(x, names), (residual, names), (weight, None)],
        [(names, False), (names, False), (names[:-1], False)],
    )
    return _strategies(inputs, outputs, 3 + len(rest))


def _rms_norm_backward(dout: Any, x: Any, weight: Any, rstd: Any, dsum: Any, need: bool, *rest: Any) -> Any:
    names = _dims(x)
    inputs = [(dout, names), (x, names), (weight, None), (rstd, names[:-1]), (dsum, names)]
    return _strategies(inputs, [(names, False), (None, bool(need))], 6 + len(rest))


def _cross_entropy(logits: Any, target: Any, *rest: Any) -> Any:
    names = _dims(logits)
    outputs = [(names[:-1], False), ([*names[:-1], None], False)]
    return _strategies([(logits, names), (target, names[:-1])], outputs, 2 + len(rest))


def _cross_entropy_backward(dloss: Any, logits: Any, target: Any, stats: Any, *rest: Any) -> Any:
    names = _dims(logits)
    inputs = [(dloss, names[:-1]), (logits, names), (target, names[:-1]), (stats, [*names[:-1], None])]
    return _strategies(inputs, [(names, False)], 4 + len(rest))


def _apply_rotary(q: Any, k: Any, cos: Any, sin: Any, *rest: Any) -> Any:
    row = ["B", "S", "H", None]
    table = ["S", None] if len(cos.shape) == 2 else ["B", "S", None]
    return _strategies([(q, row), (k, row), (cos, table), (sin, table)], [(row, False), (row, False)], 4 + len(rest))


def _glu(gate: Any, up: Any, *rest: Any) -> Any:
    names = _dims(gate, but=0)
    return _strategies([(gate, names), (up, names)], [(names, False)], 2 + len(rest))


def _glu_backward(dout: Any, gate: Any, up: Any, *rest: Any) -> Any:
    names = _dims(gate, but=0)
    inputs = [(dout, names), (gate, names), (up, names)]
    return _strategies(inputs, [(names, False), (names, False)], 3 + len(rest))


_RULES: dict[str, Callable[..., Any]] = {
    "attention_forward": _attention_forward,
    "attention_backward": _attention_backward,
    "softmax": _softmax,
    "log_softmax": _rowwise,
    "softmax_backward": _rowwise,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "cross_entropy": _cross_entropy,
    "cross_entropy_backward": _cross_entropy_backward,
    "apply_rotary": _apply_rotary,
    "glu": _glu,
    "glu_backward": _glu_backward,
}


def _register() -> None:
    global _registered
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in _RULES.items():
        op = getattr(torch.ops.foveate, name).default
        register_sharding(op)(rule)
        # torch caches a strategy by the arguments from the first int on; ours depend on flags before it.
        first = next(i for i, a in enumerate(op._schema.arguments) if "Tensor" not in str(a.type))
        propagator.op_to_schema_info[op] = RuntimeSchemaInfo(first, needs_pytree=True)
    _registered = True
