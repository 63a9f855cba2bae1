"""The table of configs: read by the pure functions of config.py, written by `foveate bench tune`, here with a fake timer."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

import foveate
from foveate.backend.triton import config
from foveate.backend.triton.config import SPECIALIZED, Config
from foveate.bench import tune
from foveate.cli import main

pytestmark = [pytest.mark.interpreted, pytest.mark.triton, pytest.mark.gpu]

HALF = torch.bfloat16


def test_the_committed_table_is_well_formed():
    for name, entry in config.read_table().items():
        chip, *kind, width, dtype, length = name.split()
        assert " ".join(kind) in ("forward", "forward masked", "dq", "dkv") and length in ("short", "long")
        assert chip.startswith("sm_") and int(width) >= 16 and dtype in ("half", "fp32")
        assert all(size >= 16 and size & (size - 1) == 0 for size in entry[:2]) and entry.warps in (4, 8)
        assert entry.variant == config.PLAIN or (chip == "sm_90" and kind[0] == "forward")


def test_an_entry_overrules_the_rules_for_its_own_calls_only():
    rule = config.forward(128, 128, HALF, 8192, 90)
    entry = Config(128, 128, 4, 2, SPECIALIZED)
    with config.table_is({config.key("forward", 128, HALF, 8192, 90): entry}):
        assert config.forward(128, 128, HALF, 8192, 90) == entry
        assert config.forward(128, 80, HALF, 2048, 90) == entry
        others = [(64, HALF, 8192, 90), (128, HALF, 1024, 90), (128, torch.float32, 8192, 90), (128, HALF, 8192, 100)]
        assert all(config.forward(D, D, dtype, rows, arch) != entry for D, dtype, rows, arch in others)
        assert config.forward(128, 128, HALF, 8192, 90, True) == rule
        assert config.forward(128, 128, HALF, 8192, 90, False, False) == rule, "a call that the variant cannot serve"
    assert config.forward(128, 128, HALF, 8192, 90) == rule
    dq, dkv = config.backward(64, 64, HALF, 100, 90)
    with config.table_is({config.key("dkv", 64, HALF, 100, 90): Config(64, 64, 4, 2)}):
        assert config.backward(64, 64, HALF, 100, 90) == (dq, Config(64, 64, 4, 2))


def test_few_rows_shrink_an_entry_too():
    with config.table_is({config.key("forward", 128, HALF, 5, 90): Config(128, 128, 4, 2, SPECIALIZED)}):
        assert config.forward(128, 128, HALF, 5, 90) == Config(16, 64, 4, 2)


def test_a_table_written_is_the_table_read(tmp_path):
    path = tmp_path / "configs.json"
    for table in (
        {},
        {"sm_90 dq 64 half long": Config(64, 64, 4, 2), "sm_80 forward 64 half short": Config(128, 64, 8, 3, 0)},
    ):
        config.write_table(table, path)
        assert config.read_table(path) == table and path.read_text().endswith("\n")
    assert list(json.loads(path.read_text())) == sorted(table)


FAST, WRONG = Config(128, 128, 4, 2, SPECIALIZED), Config(64, 64, 4, 3)


@pytest.fixture
def fake(monkeypatch):
    """Kernels that compute nothing: the config FAST takes half of the time, the others three quarters or as long as the rules', and
    WRONG is the fastest with another result."""
    case = {}

    def current(of: tune.Case) -> Config:
        if of.kind.startswith("forward"):
            return config.forward(of.D, of.D, HALF, of.S, 90, of.kind != "forward")
        return config.backward(of.D, of.D, HALF, of.S, 90)[of.kind == "dkv"]

    def time(of: tune.Case, inputs: list[torch.Tensor]) -> float:
        case.setdefault(of, []).append(current(of))
        return {FAST: 0.5, WRONG: 0.1, Config(128, 32, 8, 3): 0.99}.get(current(of), 1.0)

    monkeypatch.setattr(tune, "tensors", lambda *_: [])
    monkeypatch.setattr(tune, "run", lambda of, inputs: lambda: torch.tensor(2.0 if current(of) == WRONG else 1.0))
    return time, case


def test_tune_writes_what_is_faster_and_right(fake, tmp_path):
    time, measured = fake
    path = tmp_path / "configs.json"
    kept = {"sm_80 dq 64 half long": Config(64, 64, 4, 2)}
    config.write_table(kept | {"sm_90 dq 64 half long": Config(16, 16, 4, 1)}, path)
    lines: list[str] = []
    table = tune.tune(90, "cpu", time=time, path=path, log=lines.append)
    assert len(lines) == len(list(tune.cases())) == 24
    forward = {name: entry for name, entry in table.items() if " forward " in name}
    assert len(forward) == 12 and set(forward.values()) == {FAST}, "1 % is too little, and a wrong result is none"
    assert table == forward | kept, "this chip's old entries are gone, the other chip's stay"
    assert config.read_table(path) == table
    assert all(seen[0] != FAST and len(seen) > 5 for seen in measured.values()), "the rules are measured first"


@pytest.mark.parametrize("kind", ["forward", "forward masked", "dq", "dkv"])
def test_what_is_timed_are_the_kernels(kind, device):
    if foveate.backends()["triton"] is not None:
        pytest.skip(f"triton: {foveate.backends()['triton']}")
    case, inputs = tune.Case(kind, 16, 20), [torch.randn(1, 20, 2, 16, device=device) for _ in range(4)]
    call = tune.run(case, inputs)
    for _ in range(2):
        found = call()
    assert isinstance(found, torch.Tensor) or len(found) == (1 if kind == "dq" else 2)
    assert tune.agrees(case, inputs, found)
    assert not tune.agrees(case, inputs, found + 1 if isinstance(found, torch.Tensor) else tuple(g + 1 for g in found))


def test_descriptors_are_for_sm_90():
    assert any(c.variant == SPECIALIZED for c in tune.candidates("forward", 128, 90))
    assert all(c.variant == config.PLAIN for arch in (80, 100, 120) for c in tune.candidates("forward", 128, arch))
    assert all(c.variant == config.PLAIN for c in tune.candidates("dkv", 128, 90))


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune"]) == 1
    assert "torch sees none" in capsys.readouterr().err
    assert main(["bench", "tune", "attention"]) == 2
    assert "tune stands alone" in capsys.readouterr().err
