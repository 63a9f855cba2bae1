"""What "right" means: at most a small factor worse than PyTorch at the same precision, measured against fp64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cases import AttentionCase, AttentionInputs, VarlenCase, repro
from foveate.backend.reference import attention as reference
from foveate.bench.tolerance import FORWARD_FACTOR, GRADIENT_FACTOR, Measure, accumulation_eps, attention_bound, largest


def assert_as_good_as_torch(
    out: Tensor,
    exact: Tensor,
    torch_same_dtype: Tensor,
    factor: float = FORWARD_FACTOR,
    name: str = "out",
    *,
    floor: float,
) -> None:
    """The rule of foveate/bench/tolerance.py, whose functions give the floor of each op.

    A NaN anywhere fails. Elements that are infinite in `exact` (lse of empty rows) must be the same infinity in `out`.
    """
    assert_within(out, exact, factor, Measure(torch_error(exact, torch_same_dtype), floor), name)


def torch_error(exact: Tensor, torch_same_dtype: Tensor) -> float:
    return largest(torch.where(exact.isinf(), 0, torch_same_dtype.double() - exact.double()))


def assert_within(out: Tensor, exact: Tensor, factor: float, measure: Measure, name: str) -> None:
    """`assert_as_good_as_torch` with the measure known."""
    assert out.shape == exact.shape, f"{name} has shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    assert not exact.isnan().any(), f"{name}: the exact result has NaN, so this comparison says nothing"
    assert not out.isnan().any(), f"{name} has NaN at {_first(out.isnan())}"
    exact = exact.double()
    infinite = exact.isinf()
    assert torch.equal(torch.where(infinite, exact, 0), torch.where(out.isinf(), out.double(), 0)), (
        f"{name} has infinities elsewhere than the exact result, first at {_first(infinite ^ out.isinf())}"
    )
    if out.numel() == 0:
        return
    exact = torch.where(infinite, 0, exact)
    error = (torch.where(infinite, 0, out.double()) - exact).abs()
    limit = measure.limit(factor, float(exact.abs().max()), out.dtype)
    assert error.max() <= limit, (
        f"{name}: max error {error.max():.3e} at {_first(error == error.max())}, limit {limit:.3e} "
        f"({factor:g} x PyTorch's {measure.torch_error:.3e} in {out.dtype}, at least {measure.floor:.3e}; "
        f"max|exact| {exact.abs().max():.3e})"
    )


def _first(where: Tensor) -> tuple[int, ...] | None:
    places = where.nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def torch_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal,
    window,
    scale,
    softcap,
    bias,
    mask,
    alibi_slopes,
    rel_table,
    rel_bidirectional,
    rel_max_distance,
    sinks,
    kv_lens,
    dropout_p,
    philox,
    first_batch=0,
) -> tuple[Tensor, Tensor]:
    """Attention as one writes it with torch's operators in the dtype of q: the peer whose error sets the tolerance."""
    b, sq, hq, _ = q.shape
    skv = k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(hq // x.shape[1], dim=1) for x in (k, v))
    lens = torch.full((1,), skv, device=q.device) if kv_lens is None else kv_lens.long()
    positions = torch.arange(skv, device=q.device)
    distance = positions - (torch.arange(sq, device=q.device)[:, None] + lens.view(-1, 1, 1, 1) - sq)
    keep = (positions < lens.view(-1, 1, 1, 1)).expand(-1, hq, sq, -1)
    s = (q * scale) @ k.mT
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes[..., None, None] * distance.abs()
    if bias is not None:
        s = s + bias
    if rel_table is not None:
        buckets = reference.relative_buckets(distance[:, 0], rel_table.shape[0], rel_bidirectional, rel_max_distance)
        s = s + rel_table[buckets].movedim(-1, 1)
    if causal:
        keep = keep & (distance <= 0)
    if window[0] >= 0:
        keep = keep & (distance >= -window[0])
    if window[1] >= 0:
        keep = keep & (distance <= window[1])
    if mask is not None:
        keep = keep & mask
    empty = ~keep.any(-1, keepdim=True)
    # torch's softmax of a row of -inf is NaN, so empty rows keep their scores here and are zeroed after.
    s = torch.where(keep | empty, s, float("-inf"))
    lse = torch.where(empty[..., 0], float("-inf"), torch.logsumexp(s, -1)) if skv else s.sum(-1) + float("-inf")
    columns = s if sinks is None else torch.cat([s, sinks[None, :, None, None].expand(b, -1, sq, 1)], -1)
    p = torch.where(empty, 0, torch.softmax(columns, -1)[..., :skv])
    if dropout_p:
        p = torch.where(reference.philox_keep(philox, dropout_p, b, hq, sq, skv, first_batch), p, 0) / (1 - dropout_p)
    return (p.to(v.dtype) @ v).transpose(1, 2), lse


def torch_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options):
    """`torch_attention` for each packed sequence."""
    outs, lses = [], []
    slopes = options.pop("alibi_slopes")
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1]), slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        none = {"bias": None, "mask": None, "kv_lens": None}
        out, lse = torch_attention(
            q[None, rows], k[None, keys], v[None, keys], alibi_slopes=own, first_batch=b, **none, **options
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


def results(inputs: AttentionInputs, call, grads: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """out and lse of call(inputs) and, with grads (of out and lse), d<leaf> of each differentiable input."""
    if grads is None:
        out, lse = call(inputs)
        return {"out": out, "lse": lse}
    inputs = inputs.requires_grad()
    out, lse = call(inputs)
    upstream = tuple(g.to(x.dtype) for g, x in zip(grads, (out, lse)))
    leaf_grads = torch.autograd.grad((out, lse), list(inputs.leaves.values()), upstream)
    return {"out": out.detach(), "lse": lse.detach()} | {f"d{name}": g for name, g in zip(inputs.leaves, leaf_grads)}


def _exact(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    function = reference.attention if inputs.cu_seqlens is None else reference.attention_varlen
    return function(inputs.q, inputs.k, inputs.v, *(inputs.cu_seqlens or ()), **inputs.reference_options())


def _peer(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    function = torch_attention if inputs.cu_seqlens is None else torch_attention_varlen
    return function(inputs.q, inputs.k, inputs.v, *(inputs.cu_seqlens or ()), **inputs.reference_options())


# The largest error is a noisy measure, and the fewer elements the noisier: PyTorch hits a single sum exactly by chance.
# So its error is the largest over a few seeds.
_MORE_SEEDS = 3


@functools.lru_cache(maxsize=1000)
def expected(
    case: AttentionCase | VarlenCase, seed: int, device: str, backward: bool
) -> tuple[dict[str, Tensor], dict[str, Measure]]:
    """Exact results by name (out, lse, and d<leaf> with backward), and what an error in each is measured by."""
    exact, errors = {}, {}
    for i in range(1 + _MORE_SEEDS):
        inputs = (case.neighbour if i else case).make_inputs(seed + i, device)
        grads = upstream(inputs, seed) if backward else None
        double, peer = results(inputs.to(torch.float64), _exact, grads), results(inputs, _peer, grads)
        exact = exact or double
        for name, value in double.items():
            assert torch.equal(value.isinf(), peer[name].isinf()), "fp64 and PyTorch disagree on which rows are empty"
            errors[name] = max(errors.get(name, 0.0), torch_error(value, peer[name]))
    inputs = case.make_inputs(seed, device)
    if inputs.case.dropout:
        # The words that the library draws from a generator are its own affair, so the exact result is the reference
        # backend's in fp64. PyTorch's error was taken with other words.
        grads = upstream(inputs, seed) if backward else None
        exact = results(inputs.to(torch.float64), lambda x: x.run("reference"), grads)
    limits = floors(inputs, upstream(inputs, seed) if backward else None)
    return exact, {name: Measure(error, limits[name]) for name, error in errors.items()}


def floors(inputs: AttentionInputs, grads: tuple[Tensor, Tensor] | None) -> dict[str, float]:
    """The floors of all results of a case."""
    case, double = inputs.case, inputs.to(torch.float64)
    added = [largest(x) for x in (inputs.bias, inputs.table) if x is not None]
    if inputs.alibi_slopes is not None:
        added.append(largest(inputs.alibi_slopes) * (inputs.q.shape[-3] + inputs.k.shape[-3]))
    batched = [x if inputs.cu_seqlens is None else x[None] for x in (double.q, double.k, double.v)]
    options = {"dtype": inputs.q.dtype, "scale": case.scale, "bias": sum(added), "dropout_p": case.dropout}
    weights = exact_weights(double)
    if grads is None:
        bound = attention_bound(*batched, weights, **options)
        return {"out": bound.out, "lse": bound.lse}
    dout, dlse = (x.double() if inputs.cu_seqlens is None else x.double()[None] for x in grads)
    bound = attention_bound(*batched, weights, dout=dout, dlse=dlse, **options)
    found = {name: getattr(bound, name) for name in ("out", "lse", "dq", "dk", "dv")}
    eps = accumulation_eps(inputs.q.dtype)

    def summed(parts: tuple[Tensor, Tensor] | None, add: Callable[[Tensor], Tensor], terms: int) -> float:
        error, size = parts
        return largest(add(error)) + eps * terms * largest(add(size))

    if inputs.bias is not None:
        shape = (1,) * (4 - inputs.bias.dim()) + tuple(inputs.bias.shape)
        terms = weights.numel() // max(1, inputs.bias.numel())
        found["dbias"] = summed(bound.dscore, lambda x: x.sum_to_size(shape), terms)
    if inputs.table is not None:
        buckets = exact_buckets(double)  # [B, Sq, Skv]
        add = partial(_sum_of_buckets, buckets=buckets, count=len(inputs.table))
        found["dtable"] = summed(bound.dscore, add, weights.shape[0] * weights.shape[2])
    if inputs.sinks is not None:
        found["dsinks"] = summed(bound.dsink, lambda x: x.sum((0, 2)), weights.shape[0] * weights.shape[2])
    return found


def exact_weights(double: AttentionInputs) -> Tensor:
    """The probabilities [B, Hq, Sq, Skv] before dropout: attention to the rows of a unit matrix. Packed sequences are one batch."""
    keys, heads = double.k.shape[-3:-1]
    unit = torch.eye(keys, dtype=torch.float64, device=double.k.device)[:, None].expand(keys, heads, keys)
    plain = double.replace(
        case=dataclasses.replace(double.case, dropout=0.0), v=unit.expand(*double.k.shape[:-1], keys)
    )
    if double.cu_seqlens is None:
        return _exact(plain)[0].transpose(1, 2)
    weights = double.q.new_zeros(1, double.q.shape[1], len(double.q), keys)
    return weights + _exact(plain)[0].transpose(0, 1)[None]


def exact_buckets(double: AttentionInputs) -> Tensor:
    """The bucket of each pair of a query and a key, [B, Sq, Skv]."""
    sq, skv, lens = double.q.shape[-3], double.k.shape[-3], double.kv_lens
    first = torch.zeros(1, dtype=torch.long) if lens is None else lens.long() - skv
    distance = torch.arange(skv) - torch.arange(sq)[:, None] - (skv - sq) - first.view(-1, 1, 1).cpu()
    if double.cu_seqlens is not None:
        distance = torch.zeros(1, sq, skv, dtype=torch.long)
        cu_q, cu_k = (cu.tolist() for cu in double.cu_seqlens)
        for q0, q1, k0, k1 in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
            own = torch.arange(k1 - k0) - torch.arange(q1 - q0)[:, None] - ((k1 - k0) - (q1 - q0))
            distance[0, q0:q1, k0:k1] = own
    options = double.reference_options()
    return reference.relative_buckets(
        distance, len(double.table), options["rel_bidirectional"], options["rel_max_distance"]
    ).to(double.q.device)


def _sum_of_buckets(x: Tensor, buckets: Tensor, count: int) -> Tensor:
    """[B, Hq, Sq, Skv] -> [Hq, count]: the sum over the pairs of each bucket."""
    sums = x.new_zeros(x.shape[1], count)
    buckets = buckets.expand(x.shape[0], *buckets.shape[1:]).reshape(-1)
    return sums.index_add_(1, buckets, x.transpose(0, 1).reshape(x.shape[1], -1))


def assert_case_as_good_as_torch(
    case: AttentionCase | VarlenCase, seed: int, backend: str, device: str, check: str, backward: bool, **options: Any
) -> None:
    """The public function against fp64 for one case; a failure says how to run `check` ("module.function") again.

    options: further arguments of the function, which do not change its meaning.
    """
    exact, errors = expected(case, seed, device, backward)
    inputs = case.make_inputs(seed, device)
    ours = results(inputs, lambda x: x.run(backend, **options), upstream(inputs, seed) if backward else None)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        dtype = lse_dtype(inputs.q) if name == "lse" else inputs.q.dtype
        assert value.dtype == dtype, f"{name} has dtype {value.dtype}, expected {dtype}"
        factor = GRADIENT_FACTOR if name.startswith("d") else FORWARD_FACTOR
        assert_within(value, exact[name], factor, errors[name], f"{repro(case, check, seed, backend)}\n{name}")


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def upstream(inputs: AttentionInputs, seed: int) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse. lse of an empty row gets one too: it must not reach anything."""
    generator = torch.Generator().manual_seed(seed + 1)
    q, dv = inputs.q, inputs.v.shape[-1]
    dout = torch.randn(*q.shape[:-1], dv, generator=generator).to(q)
    shape = q.transpose(-3, -2).shape[:-1]  # [B, Hq, Sq] or [Hq, total_q]
    return dout, torch.randn(shape, generator=generator).to(q.device)
