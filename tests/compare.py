"""What "right" means: at most a small factor worse than PyTorch at the same precision, measured against fp64."""

from __future__ import annotations

import torch
from foveate import _reference
from torch import Tensor

from cases import AttentionCase, AttentionInputs, VarlenCase, repro

FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0
_ORDER_OF_INPUTS = 0.3


def assert_as_good_as_torch(
    out: Tensor,
    exact: Tensor,
    torch_same_dtype: Tensor,
    factor: float = FORWARD_FACTOR,
    name: str = "out",
    torch_error: float = 0.0,
) -> None:
    """max|out - exact| <= factor * max|torch_same_dtype - exact| + eps(out.dtype) * (max|exact| + 0.3).

    The last term is FlashAttention's rounding floor: inputs of order one leave errors of that order's eps also where the
    result cancels to nothing, as the gradients of a row with one key do.
    torch_error is PyTorch's error as measured elsewhere, where this one is too small a sample.

    A NaN anywhere fails. Elements that are infinite in `exact` (lse of empty rows) must be the same infinity in `out`.
    """
    assert out.shape == exact.shape, f"{name} has shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    assert not exact.isnan().any(), f"{name}: the exact result has NaN, so this comparison says nothing"
    assert not out.isnan().any(), f"{name} has NaN at {_first(out.isnan())}"
    exact = exact.to(torch.float64)
    ours, theirs = out.to(exact), torch_same_dtype.to(exact)
    infinite = exact.isinf()
    assert torch.equal(torch.where(infinite, exact, 0), torch.where(ours.isinf(), ours, 0)), (
        f"{name} has infinities elsewhere than the exact result, first at {_first(infinite ^ ours.isinf())}"
    )
    if out.numel() == 0 or infinite.all():
        return
    exact, ours, theirs = (torch.where(infinite, 0, x) for x in (exact, ours, theirs))
    error, allowed = (ours - exact).abs(), max(float((theirs - exact).abs().max()), torch_error)
    limit = factor * allowed + torch.finfo(out.dtype).eps * (exact.abs().max() + _ORDER_OF_INPUTS)
    assert error.max() <= limit, (
        f"{name}: max error {error.max():.3e} at {_first(error == error.max())}, limit {limit:.3e} "
        f"({factor:g} x PyTorch's {allowed:.3e} in {torch_same_dtype.dtype}, max|exact| {exact.abs().max():.3e})"
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
        buckets = _reference.relative_buckets(distance[:, 0], rel_table.shape[0], rel_bidirectional, rel_max_distance)
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
        p = torch.where(_reference.philox_keep(philox, dropout_p, b, hq, sq, skv), p, 0) / (1 - dropout_p)
    return (p.to(v.dtype) @ v).transpose(1, 2), lse


def torch_attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options):
    """`torch_attention` for each packed sequence."""
    outs, lses = [], []
    slopes = options.pop("alibi_slopes")
    for b in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(cu_seqlens_q[b], cu_seqlens_q[b + 1]), slice(cu_seqlens_k[b], cu_seqlens_k[b + 1])
        own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        none = {"bias": None, "mask": None, "kv_lens": None}
        out, lse = torch_attention(q[None, rows], k[None, keys], v[None, keys], alibi_slopes=own, **none, **options)
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
    function = _reference.attention if inputs.cu_seqlens is None else _reference.attention_varlen
    return function(inputs.q, inputs.k, inputs.v, *(inputs.cu_seqlens or ()), **inputs.reference_options())


def _peer(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    function = torch_attention if inputs.cu_seqlens is None else torch_attention_varlen
    return function(inputs.q, inputs.k, inputs.v, *(inputs.cu_seqlens or ()), **inputs.reference_options())


# The gradient of sinks or of a bias that is broadcast has few elements, so that PyTorch may hit them exactly by chance.
# Its error is then the largest over some more seeds.
_FEW_ELEMENTS = 1000
_MORE_SEEDS = 4


def assert_case_as_good_as_torch(
    case: AttentionCase | VarlenCase, seed: int, backend: str, device: str, check: str, backward: bool
) -> None:
    """The public function against fp64 for one case. A failure names `check` ("module.function") to run it again."""
    inputs = case.make_inputs(seed, device)
    grads = upstream(inputs, seed) if backward else None
    ours = results(inputs, lambda x: x.run(backend), grads)
    exact = results(inputs.to(torch.float64), _exact, grads)
    peer = results(inputs, _peer, grads)
    if inputs.case.dropout:
        # The words that the library draws from a generator are its own affair, so the exact result is the reference
        # backend's in fp64. PyTorch's error was taken with other words.
        drawn = results(inputs.to(torch.float64), lambda x: x.run("reference"), grads)
        peer = {name: drawn[name] + (peer[name].double() - exact[name]).nan_to_num(0) for name in drawn}
        exact = drawn
    few = [name for name in exact if 0 < exact[name].numel() < _FEW_ELEMENTS]
    more = [case.make_inputs(seed + 1 + i, device) for i in range(_MORE_SEEDS if few else 0)]
    errors = dict.fromkeys(exact, 0.0)
    for other in more:
        a, b = results(other.to(torch.float64), _exact, grads), results(other, _peer, grads)
        errors |= {
            name: max(errors[name], float((b[name].double() - a[name]).nan_to_num(0).abs().max())) for name in few
        }
    for name in exact if not backward else [name for name in exact if name.startswith("d")]:
        assert ours[name].dtype == (case_dtype := inputs.q.dtype if name != "lse" else lse_dtype(inputs.q)), (
            f"{name} has dtype {ours[name].dtype}, expected {case_dtype}"
        )
        assert_as_good_as_torch(
            ours[name],
            exact[name],
            peer[name],
            GRADIENT_FACTOR if backward else FORWARD_FACTOR,
            name=f"{repro(case, check, seed, backend)}\n{name}",
            torch_error=errors[name],
        )


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def upstream(inputs: AttentionInputs, seed: int) -> tuple[Tensor, Tensor]:
    """Random gradients of out and lse. lse of an empty row gets one too: it must not reach anything."""
    generator = torch.Generator().manual_seed(seed + 1)
    q, dv = inputs.q, inputs.v.shape[-1]
    dout = torch.randn(*q.shape[:-1], dv, generator=generator).to(q)
    shape = q.transpose(-3, -2).shape[:-1]  # [B, Hq, Sq] or [Hq, total_q]
    return dout, torch.randn(shape, generator=generator).to(q.device)
