"""An inspection as a picture, by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.inspect.results import Attribution, Inspection, Lens
from foveate.inspect.wanted import places

_MOST = 80  # tokens whose texts stand at an axis


def draw(inspection: Inspection, file: str | Path, layer: int = -1, head: int | None = None) -> None:
    """See `Inspection.to_png`. ValueError where there is nothing to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a PNG needs matplotlib: pip install 'foveate[inspect]'") from None

    parts: list[Any] = []
    if inspection.attention is not None:
        (place,) = places("layer", "recorded layers", layer, len(inspection.layers))
        weights = inspection.attention[place]
        if head is None:
            title, rows = f"layer {inspection.layers[place]}, mean of {len(inspection.heads)} heads", weights.mean(0)
        else:
            (chosen,) = places("head", "recorded heads", head, len(inspection.heads))
            title, rows = f"layer {inspection.layers[place]}, head {inspection.heads[chosen]}", weights[chosen]
        parts.append((f"attention: {title}", lambda axes, rows=rows: _map(axes, rows, inspection)))
    if inspection.rollout is not None:
        parts.append(("rollout over all layers", lambda axes: _map(axes, inspection.rollout, inspection)))
    if inspection.lens is not None:
        lens = inspection.lens
        parts.append((f"logit lens at token {inspection.rows[-1]}", lambda axes: _lens(axes, lens)))
    for one in inspection.attributions:
        parts.append((f"{one.method}: {one.target}", lambda axes, one=one: _bars(axes, one, inspection)))
    if not parts:
        raise ValueError(
            "there is nothing to draw: neither attention nor rollout, logit lens or attributions were asked for"
        )
    figure = Figure(figsize=(12, 4.5 * len(parts)), layout="constrained")
    for axes, (title, paint) in zip(figure.subplots(len(parts), squeeze=False)[:, 0], parts):
        axes.set_title(_plain(title), fontsize=10)
        paint(axes)
    figure.savefig(file, dpi=110, format="png")


def _plain(text: str) -> str:
    """Without what matplotlib reads as mathematics, and line ends as a sign."""
    return text.replace("$", r"\$").replace("\n", "\u21b5").replace("\t", "\u21e5")


def _named(axis: Any, tokens: list[str], at: list[int] | None = None) -> None:
    names = tokens if at is None else [tokens[i] for i in at]
    if len(names) <= _MOST:
        axis.set_ticks(range(len(names)), [_plain(name) for name in names], fontsize=7)


def _map(axes: Any, rows: Any, inspection: Inspection) -> None:
    axes.imshow(rows.sqrt().numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    _named(axes.xaxis, inspection.tokens)
    axes.tick_params("x", rotation=90)
    _named(axes.yaxis, inspection.tokens, list(inspection.rows))
    axes.set_xlabel("keys (colour: square root of the weight)")


def _lens(axes: Any, lens: Lens) -> None:
    best, texts = lens.probabilities[:, -1, 0], [rows[-1][0] for rows in lens.texts]
    axes.barh(range(len(best)), best.numpy())
    names = ["embedding", *(f"layer {i}" for i in range(len(best) - 1))]
    axes.set_yticks(range(len(best)), [f"{name}: {_plain(text)}" for name, text in zip(names, texts)], fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of the most probable token")


def _bars(axes: Any, one: Attribution, inspection: Inspection) -> None:
    values = one.values.numpy()
    axes.bar(range(len(values)), values, color=["tab:blue" if value >= 0 else "tab:red" for value in values])
    _named(axes.xaxis, inspection.tokens)
    axes.tick_params("x", rotation=90)
    axes.axhline(0, linewidth=0.5, color="gray")
