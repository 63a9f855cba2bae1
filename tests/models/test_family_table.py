"""The table of families in the guide: a row for each, with what the registry says of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from foveate.backend import native

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_guide_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.missing_reason is not None:
        pytest.skip("this build has no native decoder")
    monkeypatch.setattr(sys, "path", [str(ROOT / "tools"), *sys.path])
    import family_table

    text = family_table.PAGE.read_text()
    assert family_table.stale(text) == [], "run `python tools/family_table.py`"
    row = next(line for line in text.splitlines() if line.startswith("| `phi3` |"))
    assert family_table.stale(text.replace(row + "\n", "")) == ["phi3"]
    assert all(float(cells[0]) < 1e-4 for cells in family_table._rows(text).values())
