"""Plain torch definitions of softmax, losses, norm and rotary embedding: what every faster backend must compute.

Differentiable by autograd on any device. Half-precision inputs are computed in fp32, fp64 stays fp64; results are
rounded once at the end. Nothing here is fast, and nothing here checks its arguments: the public functions do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that an op on `x` accumulates in: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def safe_softmax(s: Tensor, dim: int = -1) -> tuple[Tensor, Tensor]:
    """softmax(s) and logsumexp(s) over `dim`; where every score is -inf (or `dim` is empty) they are 0 and -inf.

    Gradients are finite there too: the branch that is not taken is replaced before `log` and `/` see it.
    """
    # One column of -inf lets amax accept an empty dim. The maximum cancels out, so it needs no gradient.
    peak = torch.cat([s.detach(), torch.full_like(s.detach().sum(dim, keepdim=True), float("-inf"))], dim).amax(
        dim, True
    )
    peak = torch.where(peak == float("-inf"), 0.0, peak)
    e = torch.exp(s - peak)
    total = e.sum(dim, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), peak + torch.log(total))
    return e / total, lse.squeeze(dim)


def bottom_right_causal(rows: int, cols: int, device: torch.device) -> Tensor:
    """bool [rows, cols], True where row i may see column j: j <= i + cols - rows."""
    i = torch.arange(rows, device=device)[:, None]
    j = torch.arange(cols, device=device)[None, :]
    return j <= i + cols - rows


def softmax(
    x: Tensor,
    dim: int = -1,
    scale: float | Tensor = 1.0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale * x + bias) over `dim`; mask False and, with causal, columns j > i + cols - rows count as -inf.

    x: [..., rows, cols], any shape without causal. mask (bool, True = keep) and bias broadcast to x. A fully masked
    line gives 0.
    """
    s = scale * x.to(compute_dtype(x))
    if bias is not None:
        s = s + bias.to(s.dtype)
    if mask is not None:
        s = torch.where(mask, s, float("-inf"))
    if causal:
        s = torch.where(bottom_right_causal(x.shape[-2], x.shape[-1], x.device), s, float("-inf"))
    return safe_softmax(s, dim)[0].to(x.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """x - logsumexp(x) over `dim`; a line of nothing but -inf stays -inf (torch gives NaN)."""
    s = x.to(compute_dtype(x))
    lse = safe_softmax(s, dim)[1].unsqueeze(dim)
    return (s - torch.where(lse == float("-inf"), 0.0, lse)).to(x.dtype)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    label_smoothing: float | Tensor = 0.0,
    z_loss: float | Tensor = 0.0,
    softcap: float | Tensor = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Per row: lse - (1 - eps) * x[target] - eps * mean(x) + z_loss * lse**2, x = softcap * tanh(logits / softcap).

    logits: [..., V]; target: int64 [...]. eps is label_smoothing, lse = logsumexp(x), softcap 0 means none. The eps
    term is torch's label smoothing, the lse**2 term PaLM's z-loss (Chowdhery et al. 2022). Rows with target ==
    ignore_index give 0 and gradient 0 whatever their logits are, NaN included. reduction "mean" divides by the number
    of other rows, so it is NaN when there are none, as in torch. The loss is fp32 (fp64 for fp64 logits), also for
    half-precision logits.
    """
    loss, _ = cross_entropy_rows(logits, target, ignore_index, label_smoothing, z_loss, softcap)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()


def cross_entropy_rows(
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float | Tensor,
    z_loss: float | Tensor,
    softcap: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss of each row [...], and [..., 2], the maximum of x and lse minus it."""
    used = target != ignore_index
    x = torch.where(used[..., None], logits.to(compute_dtype(logits)), 0.0)
    if isinstance(softcap, Tensor) or softcap > 0:
        x = softcap * torch.tanh(x / softcap)
    lse = safe_softmax(x)[1]
    x_target = x.gather(-1, torch.where(used, target, 0)[..., None]).squeeze(-1)
    loss = lse - (1 - label_smoothing) * x_target
    if isinstance(label_smoothing, Tensor) or label_smoothing > 0:
        loss = loss - label_smoothing * x.mean(-1)
    if isinstance(z_loss, Tensor) or z_loss != 0:
        loss = loss + z_loss * lse * lse
    peak = x.detach().amax(-1)
    return torch.where(used, loss, 0.0), torch.stack([peak, lse - peak], -1)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias in the compute dtype. used: bool [...], without it all rows."""
    hidden, weight = hidden.to(compute_dtype(hidden)), weight.to(compute_dtype(hidden))
    if used is not None:  # NaN in an ignored row would reach the gradient of `weight` through the product
        hidden = torch.where(used[..., None], hidden, 0.0)
    logits = hidden @ weight.mT
    return logits if bias is None else logits + bias.to(logits.dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(hidden @ weight.T + bias, target, ...), the logits kept in the compute dtype.

    hidden: [..., K]; weight: [V, K]; bias: [V]; target: int64 [...].
    """
    logits = linear_logits(hidden, weight, bias, target != ignore_index)
    return cross_entropy(logits, target, ignore_index, label_smoothing, z_loss, softcap, reduction)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """out = x * rstd * weight with rstd = 1 / sqrt(mean(x**2) + eps) over the last dim (Zhang and Sennrich 2019), and rstd.

    x: [..., N], weight: [N], rstd: [...] in the compute dtype.
    """
    y = x.to(compute_dtype(x))
    rstd = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * rstd
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype), rstd.squeeze(-1)


def glu(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """silu(gate) * up for "swiglu", gelu(gate) * up in the tanh form for "geglu" and with the error function for "gelu"."""
    g = gate.to(compute_dtype(gate))
    if kind == "swiglu":
        g = torch.nn.functional.silu(g)
    else:
        g = torch.nn.functional.gelu(g, approximate="tanh" if kind == "geglu" else "none")
    return (g * up.to(g.dtype)).to(gate.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates pairs of the first `rot` elements of each head by the angles in cos, sin (RoFormer, Su et al. 2021).

    x: [B, S, H, D]; cos, sin: [S, rot / 2] or [B, S, rot / 2], rot <= D. A pair is (x[c], x[c + rot / 2]), or
    (x[2c], x[2c + 1]) with interleaved. (a, b) becomes (a cos - b sin, b cos + a sin). Elements from `rot` on stay.
    Returned in the compute dtype.
    """
    x = x.to(compute_dtype(x))
    half = cos.shape[-1]
    cos, sin = (t.to(x.dtype).unsqueeze(-2) for t in (cos, sin))  # [(B,) S, 1, rot / 2]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else (rotated[..., :half], rotated[..., half:])
    a, b = a * cos - b * sin, b * cos + a * sin
    rotated = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([rotated, rest], -1)


def apply_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """`rotate` for q [B, S, Hq, D] and k [B, S, Hkv, D], rounded to their dtypes."""
    return rotate(q, cos, sin, interleaved).to(q.dtype), rotate(k, cos, sin, interleaved).to(k.dtype)
