"""The bar of what takes long."""

from __future__ import annotations

import contextlib
import subprocess
import sys

from foveate.progress import ProgressBar


def test_it_shows_what_is_reached(capsys):
    with ProgressBar("loading [x]", "bar", "count", "note", total=10) as bar:
        bar.advance(4, "loss 2")
        bar.print("a [/path] is read")
    shown = capsys.readouterr().err
    assert "loading [x]" in shown and "a [/path] is read" in shown and "10/10" in shown and "loss 2" in shown
    with contextlib.suppress(KeyError), ProgressBar("reading", "count", total=10) as bar:
        bar.reach(3)
        raise KeyError
    assert "3/10" in capsys.readouterr().err
    with ProgressBar("counting", "{task.completed:,} rows", "elapsed") as bar:
        bar.advance(1200)
    assert "1,200 rows" in capsys.readouterr().err


def test_hidden_it_needs_nothing():
    code = """
import sys
sys.modules["rich"] = None
from foveate.progress import ProgressBar
with ProgressBar("x", "bar", total=3, shown=False) as bar:
    bar.advance(1, "note")
try:
    ProgressBar("x", "bar", total=3)
except ImportError as error:
    assert str(error) == 'rich is not installed: pip install "foveate[models]"', error
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True)
