"""The table of README.md that sets foveate beside other attention libraries: features from their sources, speed from committed results.

What another library has was read in its sources on the date given here, not measured. What foveate has is asked of its backends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import support_matrix

BOTH, FORWARD, NONE = "✓", "f", "–"


class Peer(NamedTuple):
    name: str
    read_at: str  # the version or commit whose sources were read


PEERS = (
    Peer("FlashAttention-2", "0251105, 2026-08-15"),
    Peer("FlashAttention-3", "0251105, 2026-08-15"),
    Peer("cuDNN SDPA", "cudnn-frontend 3929da2, 2026-05-08"),
    Peer("torch SDPA", "2.13"),
    Peer("FlexAttention", "torch 2.13"),
    Peer("FlashInfer", "fb28d72, 2026-08-22"),
    Peer("xFormers", "0.0.35"),
)


class Feature(NamedTuple):
    title: str
    ours: str | None  # an option to ask the backends for, or None: `cell`
    cell: str
    peers: tuple[str, ...]  # in the order of PEERS


FEATURES = (
    Feature("window (left, right)", "window", "", (BOTH, BOTH, BOTH, NONE, BOTH, "f, left", BOTH)),
    Feature("softcap", "softcap", "", (BOTH, BOTH, "score_mod", NONE, BOTH, FORWARD, NONE)),
    Feature("ALiBi", "alibi_slopes", "", (BOTH, NONE, BOTH, "as mask", BOTH, FORWARD, "as bias")),
    Feature("bias with its gradient", "bias", "", (NONE, NONE, BOTH, BOTH, "score_mod", NONE, BOTH)),
    Feature("T5's bias, never stored", "relative_bias", "", (NONE, NONE, NONE, NONE, "score_mod", NONE, NONE)),
    Feature("any mask", "mask", "", (NONE, NONE, BOTH, BOTH, "✓, block-sparse", FORWARD, BOTH)),
    Feature("sinks with their gradient", "sinks", "", (NONE, NONE, BOTH, NONE, "by lse", FORWARD, NONE)),
    Feature("dropout", "dropout_p", "", (BOTH, NONE, BOTH, BOTH, NONE, NONE, BOTH)),
    Feature("packed sequences", "varlen", "", (BOTH, BOTH, BOTH, BOTH, "as mask", FORWARD, BOTH)),
    Feature("deterministic backward", None, BOTH, (BOTH, "D < 256", BOTH, "flag", BOTH, NONE, "some ops")),
    Feature("paged KV cache", None, FORWARD, ("f, pages of 256", FORWARD, FORWARD, FORWARD, NONE, FORWARD, FORWARD)),
    Feature("append and rotary in the call", None, FORWARD, (FORWARD, FORWARD, NONE, NONE, NONE, "apart", "apart")),
    Feature("CPU", None, BOTH, (NONE, NONE, NONE, BOTH, FORWARD, NONE, NONE)),
    Feature("GPU", None, "not run yet", ("✓", "sm_90", "✓", "✓", "✓", "✓", "✓")),
)


def ours(feature: Feature) -> str:
    """foveate's cell: an option has to be served by the kernels of the CPU, of CUDA and of Triton alike."""
    if feature.ours is None:
        return feature.cell
    answers = set()
    for backend, device in (("native", "cpu"), ("native", "cuda"), ("triton", "cuda")):
        forward, backward = support_matrix.served(backend, device, feature.ours)
        answers.add(BOTH if forward and backward else FORWARD if forward else NONE)
    return answers.pop() if len(answers) == 1 else "differs"


def table(ratios: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown. ratios: {what was timed on the CPU: {a peer's name: its time over foveate's}}."""
    lines = [
        "| | foveate | " + " | ".join(peer.name for peer in PEERS) + " |",
        "|---" * (len(PEERS) + 2) + "|",
    ]
    lines += [f"| {feature.title} | {ours(feature)} | {' | '.join(feature.peers)} |" for feature in FEATURES]
    for title, times in ratios.items():
        cells = [f"{times[peer.name]:.2g}x" if peer.name in times else "" for peer in PEERS]
        lines.append(f"| {title} | 1x | {' | '.join(cells)} |")
    sources = "; ".join(f"{peer.name} {peer.read_at}" for peer in PEERS)
    lines += [
        "",
        f"✓ forward and backward, f forward only, – neither; an empty cell was not measured. Sources read: {sources}.",
    ]
    return "\n".join(lines)
