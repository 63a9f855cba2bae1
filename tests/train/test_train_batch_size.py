"""The batch that is chosen where none is given: steps enough for few data, 8 rows for many."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.train.batch_size import ROWS, choose
from foveate.train.data.plan import BatchPlan
from train_toys import run, sentences, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")


def steps(lengths, max_length, *, packing=True, spread=1):
    rows, room = choose(lengths, max_length, packing=packing, spread=spread)
    assert 1 <= rows <= ROWS and room <= max_length and (not packing or room >= lengths.max())
    plan = BatchPlan(lengths, room, packing=packing, seed=0)
    return -(-len(plan) // (rows * spread)), rows, room


@pytest.mark.parametrize("spread", [1, 2, 8])
@pytest.mark.parametrize("count", [3, 10, 95, 400, 2000, 20000])
def test_a_pass_has_steps_and_a_step_sequences(count, spread):
    lengths = np.random.default_rng(count).integers(20, 90, count)
    found, rows, room = steps(lengths, 1024, spread=spread)
    assert count / found >= 3 or count < 4  # a step is no single sequence
    if count >= 100 * spread:
        assert found >= 15
    if len(BatchPlan(lengths, 1024, packing=True, seed=0)) >= 160 * spread:
        assert (rows, room) == (8, 1024)


def test_long_texts_and_padding():
    whole = np.full(30, 1024)
    assert steps(whole, 1024) == (30, 1, 1024)  # a step cannot read less than a sequence
    assert steps(np.full(3000, 1024), 1024) == (375, 8, 1024)
    assert steps(np.full(100, 50), 1024, packing=False) == (13, 8, 1024)
    assert steps(np.full(3, 50), 1024, packing=False) == (1, 3, 1024)


def test_what_is_chosen_is_said_and_goes_on(tmp_path, capsys):
    data = [write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in sentences(60)])]
    changes = {"train_data": data, "batch_size": None, "max_steps": None, "eval_fraction": 0.0, "progress": None}
    result = run(tmp_path / "run", **changes, epochs=1.0)
    said = capsys.readouterr().err
    assert result.steps >= 10 and "60 sequences of" in said and f"which makes {result.steps} steps a pass" in said
    more = run(tmp_path / "run", **changes, epochs=2.0, resume=True)
    assert more.steps == 2 * result.steps
    capsys.readouterr()
    run(tmp_path / "own", **changes | {"batch_size": 4}, epochs=1.0)
    assert "sequences of" not in capsys.readouterr().err.splitlines()[0]
