"""The page that transformers_survey.py writes."""

from __future__ import annotations

from collections import Counter

import torch
import transformers

HEAD = """# What of transformers runs on foveate

Written by `tests/support/transformers_survey.py` with transformers {version} and torch {torch}: every model class whose module
calls the attention interface, in a tiny random config, `attn_implementation="foveate"` beside eager attention, on the CPU in fp32.
`tests/integrations/test_transformers_models.py` repeats some of them in CI.

{classes} classes of {families} families. {same} give eager's results in every way that was tried, {partly} where eager itself or the survey
could not go on in some way, {refused} are refused with a sentence, {wrong} are wrong, {not_judged} were not judged.

A number is the largest difference over eager's largest value; in these networks rounding gives 1e-8 to 1e-4. Ways: `plain`, padding on the
`left` and `right`, a prompt in pieces on a `dynamic` and a `static` cache, greedy `generate`. "-" where the class has no such way.

| family | class | plain | left | right | dynamic | static | generate |
|---|---|---|---|---|---|---|---|
"""

NOT_JUDGED = """
## Not judged

The survey builds configs by the names of their fields and makes inputs by the names of `forward`'s parameters. Where that is not
enough, it says why.

| family | class | why |
|---|---|---|
"""

WAYS = ("plain", "left padding", "right padding", "pieces, DynamicCache", "pieces, StaticCache", "generate")


def page(rows: list[tuple[str, str, dict[str, str]]]) -> str:
    """Markdown of (family, class, {way: result})."""
    judged = [row for row in rows if _is_judged(row[2])]
    others = [row for row in rows if not _is_judged(row[2])]
    counts = Counter(_verdict(results) for _, _, results in judged)
    text = HEAD.format(
        version=transformers.__version__,
        torch=torch.__version__.split("+")[0],
        classes=len(rows),
        families=len({family for family, _, _ in rows}),
        not_judged=len(others),
        **{name: counts[name] for name in ("same", "partly", "refused", "wrong")},
    )
    for family, name, results in judged:
        text += f"| {family} | {name} | {' | '.join(_cell(results.get(way)) for way in WAYS)} |\n"
    text += NOT_JUDGED
    for family, name, results in others:
        text += f"| {family} | {name} | {_plain(results['plain'])} |\n"
    return text


def _is_judged(results: dict[str, str]) -> bool:
    return results["plain"][:1].isdigit() or results["plain"].startswith(("WRONG", "refused"))


def _verdict(results: dict[str, str]) -> str:
    values = list(results.values())
    if any("WRONG" in value for value in values):
        return "wrong"
    if any(value.startswith("refused") for value in values):
        return "refused"
    return "same" if all(value[:1].isdigit() for value in values) else "partly"


def _cell(result: str | None) -> str:
    if result is None:
        return "-"
    if result[:1].isdigit() or result.startswith("WRONG"):
        return result
    return _plain(result)


def _plain(text: str) -> str:
    text = text.replace("|", "/").replace("`", "").replace("<", "(").replace(">", ")").strip()
    return text if len(text) <= 150 else text[:147] + "..."
