"""linear_distillation: the divergence of two models' next-token distributions from their hidden states, in chunks of tokens.

Plain torch on every device. What is kept of a token is its part of the gradients of hidden and weight, as `linear_cross_entropy` does it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from foveate.ops.checks import check_floating, check_same_dtype, compute_dtype
from foveate.ops.onednn_linear import product

KINDS = ("forward-kl", "reverse-kl", "jsd")
_CHUNK_BYTES = 32 << 20  # of the logits of one model and one chunk, of which about five exist at a time
_GPU_CHUNK_BYTES = 256 << 20
_MIN_CHUNK_TOKENS = 16


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    kind: str = "forward-kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    top_k: int = 0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """The sum over tokens of a divergence of p = softmax(z / temperature), z = hidden @ weight.T + bias, the student's, and q, the same of
    the teacher. The [tokens, V] logits are never stored.

    hidden [tokens, K], weight [V, K], bias [V]; teacher_hidden [tokens, L], teacher_weight [V, L], teacher_bias [V]; the student's of one
    dtype, the teacher's of one (float32, bfloat16, float16, float64), cast to autocast's under autocast; computed in fp32, or fp64 for a
    student in it. softcap: z becomes softcap * tanh(z / softcap).
    kind: "forward-kl" sum q log(q / p) (Hinton et al. 2015, without their factor temperature**2), "reverse-kl" sum p log(p / q) (Gu et
    al. 2023, arXiv 2306.08543), "jsd" beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p (Agarwal et al. 2023, arXiv
    2306.13649). top_k: forward-kl over the teacher's so many most probable tokens, q normalised over these; 0 for all.

    Memory is O(chunk x V) beside the gradients, a chunk being 32 MiB of fp32 logits (256 on a GPU; 16 tokens at least). The gradients of
    hidden, weight and bias are computed with the loss; the teacher gets none. Differentiable once; not in forward mode, torch.func or
    torch.compile's graphs. ValueError for shapes, kinds and numbers that cannot be.
    """
    for name, x in (("hidden", hidden), ("teacher_hidden", teacher_hidden)):
        check_floating(name, x)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    teacher_hidden, teacher_weight, teacher_bias = _autocast(teacher_hidden, teacher_weight, teacher_bias)
    check_same_dtype("weight", weight, "hidden", hidden)
    check_same_dtype("teacher_weight", teacher_weight, "teacher_hidden", teacher_hidden)
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be more than 0, and finite")
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta={beta} must be between 0 and 1; 0 is kind='forward-kl' and 1 'reverse-kl'")
    if top_k < 0 or (top_k and kind != "forward-kl"):
        raise ValueError(f"top_k={top_k} must be 0, or 1 or more with kind='forward-kl'")
    shapes = [tuple(x.shape) for x in (hidden, weight, teacher_hidden, teacher_weight)]
    if any(len(shape) != 2 for shape in shapes) or not (
        shapes[0][0] == shapes[2][0]
        and shapes[0][1] == shapes[1][1]
        and shapes[2][1] == shapes[3][1]
        and shapes[1][0] == shapes[3][0] > 0
    ):
        raise ValueError(
            "hidden must be [tokens, K], weight [V, K], teacher_hidden [tokens, L] and teacher_weight [V, L]; got "
            + ", ".join(map(str, shapes))
        )
    settings = (kind, float(beta), float(temperature), min(top_k, shapes[1][0]), softcap or 0.0, teacher_softcap or 0.0)
    teacher = tuple(None if x is None else x.detach() for x in (teacher_hidden, teacher_weight, teacher_bias))
    return _LinearDistillation.apply(hidden, weight, bias, *teacher, settings, torch.is_grad_enabled())


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
        teacher_bias: Tensor | None, settings: tuple[Any, ...], recording: bool,
    ) -> Tensor:  # fmt: skip
        need_hidden, need_weight, need_bias = (need and recording for need in ctx.needs_input_grad[:3])
        kind, beta, temperature, top_k, softcap, teacher_softcap = settings
        compute, vocab = compute_dtype(hidden), weight.shape[0]
        budget = _CHUNK_BYTES if hidden.is_cpu else _GPU_CHUNK_BYTES
        tokens = max(_MIN_CHUNK_TOKENS, budget // (vocab * compute.itemsize))
        loss = hidden.new_zeros((), dtype=compute)
        dhidden = torch.empty_like(hidden) if need_hidden else None
        dweight = torch.zeros_like(weight, dtype=compute) if need_weight else None
        dbias = torch.zeros_like(bias, dtype=compute) if need_bias and bias is not None else None
        for first in range(0, len(hidden), tokens):
            rows = slice(first, first + tokens)
            log_p, slope = _log_probs(product(hidden[rows], weight, bias).to(compute), temperature, softcap)
            theirs = product(teacher_hidden[rows], teacher_weight, teacher_bias).to(compute)
            if top_k:
                term, dz = _top_k_divergence(log_p, theirs, temperature, teacher_softcap, top_k)
            else:
                term, dz = _divergence(log_p, _log_probs(theirs, temperature, teacher_softcap)[0], kind, beta)
            loss += term
            if need_hidden or need_weight or need_bias:
                dz = dz.div_(temperature)
                dz = (dz if slope is None else dz.mul_(slope)).to(hidden.dtype)
                if dhidden is not None:
                    dhidden[rows] = product(dz, weight.t())
                if dweight is not None:
                    dweight += product(dz.t(), hidden[rows].t())
                if dbias is not None:
                    dbias += dz.sum(0, dtype=compute)
            del log_p, theirs, dz, slope  # before the next chunk's come to be
        ctx.save_for_backward(dhidden, dweight, dbias)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else (g * dloss).to(ctx.dtype) for g in ctx.saved_tensors)
        return (*grads, *(None,) * 5)


def _log_probs(logits: Tensor, temperature: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """log_softmax(capped / temperature), and the derivative of the cap; logits are overwritten."""
    slope = None
    if softcap:
        bent = logits.div_(softcap).tanh_()
        slope = 1 - bent.square()
        logits = bent.mul_(softcap)
    return torch.log_softmax(logits.div_(temperature), -1), slope


def _divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """The sum over the rows, and its gradient in the student's logits / temperature. With p = softmax(z): dz = p (g - sum p g), g the
    gradient in p."""
    p = log_p.exp()
    if kind == "forward-kl":
        q = log_q.exp()
        return _times(q, log_q - log_p).sum(), p.sub_(q)
    if kind == "reverse-kl":
        g = log_p - log_q
        return _times(p, g).sum(), _pulled(p, g)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    g = log_p.sub(log_m)
    loss = (1 - beta) * _times(p, g).sum() + beta * _times(log_q.exp(), log_q - log_m).sum()
    return loss, _pulled(p, g).mul_(1 - beta)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """p * x, 0 where p is: an impossible token adds nothing, though its logarithm is infinite."""
    return torch.where(p > 0, p * x, 0.0)


def _pulled(p: Tensor, g: Tensor) -> Tensor:
    weighted = _times(p, g)
    return weighted - p * weighted.sum(-1, keepdim=True)


def _top_k_divergence(
    log_p: Tensor, logits: Tensor, temperature: float, softcap: float, top_k: int
) -> tuple[Tensor, Tensor]:
    values, places = logits.topk(top_k, -1)
    log_q, _ = _log_probs(values, temperature, softcap)
    q = log_q.exp()
    loss = _times(q, log_q - log_p.gather(-1, places)).sum()
    return loss, log_p.exp().scatter_add_(-1, places, -q)
