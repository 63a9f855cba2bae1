"""What an inspection found, and its forms: JSON, a page of HTML, a picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass
class TokenChoice:
    """A token and the distribution that it was one choice of: natural logarithms, rank 1 the most probable, entropy in nats.

    alternatives: (id, text, log-probability) of the most probable tokens.
    """

    token_id: int | None  # None where nothing follows yet
    text: str
    logprob: float | None
    rank: int | None
    entropy: float
    alternatives: list[tuple[int, str, float]]


@dataclass
class Lens:
    """Logit lens: the stream before the first layer and after each one, read by the final norm and the head, for each row.

    ids: int64 [layers + 1, rows, top]; probabilities: fp32, the same shape; entropy: fp32 [layers + 1, rows], in nats.
    texts: of the ids, nested in the same way.
    """

    ids: Tensor
    probabilities: Tensor
    entropy: Tensor
    texts: list[list[list[str]]]


@dataclass
class Attribution:
    """How much each token added to a score.

    method: "gradient x input" or "integrated gradients"; target: what the score is, in words; values: fp32 [tokens], signed.
    baseline_score: of the baseline, for integrated gradients; gap: their sum minus (score - baseline_score), 0 of infinitely many steps.
    """

    method: str
    target: str
    score: float
    values: Tensor
    baseline_score: float | None = None
    gap: float | None = None


@dataclass
class Inspection:
    """attention: fp32 [layers, heads, rows, tokens], the numbers of these layers and heads and the places of these rows beside it.

    rollout: fp32 [rows, tokens]. choices: one for each token and, of a causal model, one more for what comes next; None for a causal
    model's first token, which nothing has predicted. notes: what a reader has to know, such as which part of a long text this is.
    """

    model: str
    token_ids: list[int]
    tokens: list[str]
    layers: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    attention: Tensor | None = None
    rollout: Tensor | None = None
    choices: list[TokenChoice | None] = field(default_factory=list)
    lens: Lens | None = None
    attributions: list[Attribution] = field(default_factory=list)
    result: dict[str, Any] | None = None  # of the pipeline, where one was asked
    notes: list[str] = field(default_factory=list)

    def to_dict(self, digits: int = 6) -> dict[str, Any]:
        """Lists, numbers of `digits` significant digits and texts; what was not recorded is left out."""
        fields: dict[str, Any] = {
            "model": self.model, "token_ids": self.token_ids, "tokens": self.tokens, "rows": list(self.rows), "notes": self.notes,
        }  # fmt: skip
        if self.attention is not None:
            fields["attention"] = {
                "layers": list(self.layers), "heads": list(self.heads), "weights": _numbers(self.attention, digits),
            }  # fmt: skip
        if self.rollout is not None:
            fields["rollout"] = _numbers(self.rollout, digits)
        if self.choices:
            fields["choices"] = [None if choice is None else _rounded(vars(choice), digits) for choice in self.choices]
        if self.lens is not None:
            fields["logit_lens"] = {
                "ids": self.lens.ids.tolist(), "texts": self.lens.texts,
                "probabilities": _numbers(self.lens.probabilities, digits), "entropy": _numbers(self.lens.entropy, digits),
            }  # fmt: skip
        if self.attributions:
            fields["attributions"] = [
                _rounded(vars(one) | {"values": one.values.tolist()}, digits) for one in self.attributions
            ]
        if self.result is not None:
            fields["result"] = self.result
        return fields

    def to_json(self, digits: int = 6, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(digits), indent=indent, ensure_ascii=False)

    def to_html(self, file: str | Path | None = None, title: str = "foveate inspect") -> str:
        """One page that needs nothing else, written to `file` too if one is given. docs/guide/inspect.md says what is on it."""
        from foveate.inspect.page import page

        text = page(self, title)
        if file is not None:
            Path(file).write_text(text, encoding="utf-8")
        return text

    def to_png(self, file: str | Path, layer: int = -1, head: int | None = None) -> None:
        """A picture of what there is: attention of one recorded layer (place in `layers`) and head (None: the mean over all), logit
        lens, attributions. ImportError without matplotlib (the extra "inspect")."""
        from foveate.inspect.picture import draw

        draw(self, file, layer, head)


def _numbers(x: Tensor, digits: int) -> Any:
    return _rounded(x.tolist(), digits)


def _rounded(value: Any, digits: int) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item, digits) for item in value]
    return value
