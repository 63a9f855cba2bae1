"""A model card from results: what was measured, on how many items, how certain it is, and what was not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate.evaluate.results import Results

_SECTIONS = {
    "Quality": ("choices", "generation", "qa", "classification", "perplexity", "code"),
    "Bias": ("pairs", "stereotypes", "pronouns", "counterfactual"),
    "Safety": ("toxicity", "secrets", "personal", "refusals"),
    "Robustness": ("robustness",),
}


def model_card(results: Results, *, title: str | None = None, uses: Sequence[str] = ()) -> str:
    """Markdown with a section for each of quality, bias, safety and robustness. uses: what the model is meant for, in sentences."""
    lines = [f"# {title or results.model}", "", "## Intended use", ""]
    lines += [f"- {use}" for use in uses] or ["Not stated."]
    for section, kinds in _SECTIONS.items():
        found = [task for task in results.tasks if task.kind in kinds]
        lines += ["", f"## {section}", ""]
        if not found:
            lines.append("Not measured.")
            continue
        lines += [
            f"| data | figure | value | {100 * results.confidence:g} % interval | items |",
            "|---|---|---|---|---|",
        ]
        for task in found:
            for name, one in task.figures(results.confidence).items():
                interval = f"{one.low:.3f} to {one.high:.3f}" if math.isfinite(one.low) else "none"
                lines.append(f"| {task.name} | {name.replace('_', ' ')} | {one.value:.3f} | {interval} | {one.n} |")
        lines += ["", *(f"{task.name}: {task.note}." for task in found if task.note)]
    fewest = min((one.n for task in results.tasks for one in task.figures(results.confidence).values()), default=0)
    lines += [
        "", "## Limits", "",
        f"The smallest figure rests on {fewest} items. The intervals are about the items, not about how well they stand for what the model "
        "will meet. Bias was looked for in the forms of the data above only; that none is shown does not say that there is none.",
    ]  # fmt: skip
    settings = ", ".join(f"{name} {value}" for name, value in results.settings.items() if value not in (None, False))
    return "\n".join([*lines, "", f"Measured with foveate{f' ({settings})' if settings else ''}.", ""])
