"""foveate bench: what it measures, what it writes, what it refuses. Its numbers are not tested, they belong to a quiet machine."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foveate import _C
from foveate.bench import cases, check, machine, memory, report, roofline, run, timing, workloads
from foveate.cli import main
from foveate.cli.bench import BENCHES


@pytest.mark.slow
def test_one_quick_run_of_everything(tmp_path) -> None:
    found = _run_everything(tmp_path)
    _every_bench_has_rows_beside_every_peer(found["rows"])
    _numbers_are_there_and_agree(found["rows"])
    _machine_and_limits_are_named(found)
    _csv_has_the_rows_of_the_json(found, tmp_path)
    _picture_and_summary_are_written(tmp_path)


def _run_everything(folder: Path) -> dict:
    command = [
        sys.executable,
        "-m",
        "foveate",
        "bench",
        "all",
        "--quick",
        "--json",
        "--threads",
        "1",
        "--out",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _every_bench_has_rows_beside_every_peer(rows: list[dict]) -> None:
    for bench, peers in workloads.PEERS.items():
        beside = {row["peer"] for row in rows if row["bench"] == bench and row["ratio"] is not None}
        assert beside == set(peers), bench
        assert {row["dtype"] for row in rows if row["bench"] == bench} == {"fp32", "bf16"}
    assert set(workloads.PEERS) == set(cases.BENCHES) == set(BENCHES)


def _numbers_are_there_and_agree(rows: list[dict]) -> None:
    for row in rows:
        if row["us"] is None:
            assert row["bench"] == "memory"
            continue
        assert row["us"] > 0 and row["spread_us"] >= 0 and row["samples"] >= 3
        assert 0 <= row["error_share"] <= 1
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["us"])
        if row["bench"] == "overhead":
            assert row["unit"] == "" and row["rate"] is None
        else:
            assert row["unit"] in ("GFLOP/s", "GB/s")
            assert row["percent_of_limit"] == pytest.approx(100 * row["rate"] / row["limit"])


def _machine_and_limits_are_named(found: dict) -> None:
    here, limits = found["machine"], found["limits"]
    assert here["torch"] == torch.__version__ and here["threads"] == 1 and here["cpu"]
    assert here["cpu_target"] == _C.cpu_target()
    assert all(limits[name] > 0 for name in roofline.Limits._fields)


def _csv_has_the_rows_of_the_json(found: dict, folder: Path) -> None:
    (path,) = folder.glob("cpu_*.csv")
    with path.open(newline="") as file:
        assert next(csv.reader(file)) == report.COLUMNS
    for name in ("commit", "date", "cpu", "threads", "torch", "case", "us", "ratio", "percent_of_limit"):
        assert name in report.COLUMNS
    rows = report.read_csv(path)
    assert len(rows) == len(found["rows"])
    for (here, row), expected in zip(rows, found["rows"]):
        assert here.date == found["machine"]["date"]
        assert (row.bench, row.case, row.peer) == (expected["bench"], expected["case"], expected["peer"])
        if expected["us"] is not None:
            assert row.us == pytest.approx(expected["us"], rel=1e-4)


def _picture_and_summary_are_written(folder: Path) -> None:
    (picture,) = folder.glob("cpu_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    (summary,) = folder.glob("cpu_*.md")
    assert "attention forward | fp32 | sdpa | 4 |" in summary.read_text()


def test_summary_is_the_geometric_mean() -> None:
    row = run.Row("attention", "a", "fp32", peer="sdpa", ratio=1.0, percent_of_limit=50.0)
    other = run.Row("attention", "b", "fp32", peer="sdpa", ratio=4.0, percent_of_limit=80.0)
    (summary,) = run.summarize([row, other, run.Row("attention", "skipped", "fp32")])
    assert summary.mean_ratio == pytest.approx(2.0) and summary.min_ratio == 1.0 and summary.cases == 2
    assert summary.mean_percent_of_limit == pytest.approx(math.sqrt(4000)) and summary.min_percent_of_limit == 50.0


# Timing


def test_functions_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    budget = timing.Budget(min_samples=4, min_seconds=0.0, max_seconds=60.0)
    found = timing.interleaved([lambda: calls.append("a"), lambda: calls.append("b")], budget)
    assert "".join(calls) == "aabb" + "abbaabba"  # two calls each that do not count, then four rounds
    assert [t.samples for t in found] == [4, 4]


def test_budget_ends_at_the_maximum_with_three_samples() -> None:
    (found,) = timing.interleaved([lambda: torch.ones(1)], timing.Budget(10**9, 10**9, max_seconds=0.0))
    assert found.samples == 3


def test_short_calls_share_a_sample() -> None:
    calls = []
    timing.interleaved([lambda: calls.append(1)], timing.Budget(3, 0.0, 60.0), min_sample_seconds=1e-3)
    assert len(calls) > 3 * 100


def test_spread_is_the_interquartile_range() -> None:
    assert timing.summarize([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Timing(3.0, 2.0, 5)


# Check before time


def test_check_refuses_what_torch_does_better() -> None:
    exact = torch.linspace(0, 1, 100, dtype=torch.float64)
    theirs = exact.float() + 1e-5
    inside, outside = exact.float() + 1.9e-5, exact.float() + 2.5e-5
    assert 0.9 < check.check("case", [check.Checked("out", inside, theirs, exact, 0.0)]) <= 1
    with pytest.raises(check.WrongResult, match=r"case: out is off by 2\.5.*e-05, allowed are 2\.0"):
        check.check("case", [check.Checked("out", outside, theirs, exact, 0.0)])
    inside[7] = float("nan")
    with pytest.raises(check.WrongResult, match="off by nan"):
        check.check("case", [check.Checked("out", inside, theirs, exact, 0.0)])
    with pytest.raises(check.WrongResult, match="shape"):
        check.check("case", [check.Checked("out", exact.float()[None], theirs, exact, 0.0)])
    # What the arithmetic itself may be off by is allowed, however exact torch happens to be.
    assert check.check("case", [check.Checked("out", outside, exact.float(), exact, 3e-5)]) <= 1


def test_wrong_kernel_stops_the_bench(monkeypatch, capsys) -> None:
    right = workloads.foveate.attention
    monkeypatch.setattr(workloads.foveate, "attention", lambda *args, **options: right(*args, **options) * 1.01)
    monkeypatch.setattr("foveate.bench.machine.keep_freed_memory", lambda: True)  # not in this process
    assert main(["bench", "attention", "--quick", "--dtype", "fp32", "--json"]) == 1
    assert "attention B1 S128 H2 D64 causal fp32: out is off by" in capsys.readouterr().err


@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs_are_counted(causal: bool) -> None:
    case = cases.AttentionCase(2, 5, 3, 8, causal, "fp32")
    mask = torch.ones(5, 5).tril() if causal else torch.ones(5, 5)
    assert case.visible == 2 * 3 * int(mask.sum())


def test_decode_reads_from_memory() -> None:
    for case in cases.decode(False, ["bf16"]):
        assert workloads._copies(case) * case.cache_bytes >= 4 * roofline.last_cache_bytes()
    visited: list[int] = []
    call = workloads._rotating(visited.append, [(0,), (1,), (2,)])
    for _ in range(5):
        call()
    assert visited == [0, 1, 2, 0, 1]


# Limits


@pytest.mark.parametrize("offset", [0, 1, 13])
@pytest.mark.parametrize("size", [0, 1, 31, 1000, 4099])
def test_read_and_copy_loops_touch_every_element(offset: int, size: int) -> None:
    x = torch.randn(offset + size)[offset:]
    out = torch.full((offset + size + 40,), math.nan)
    sums = torch.full((3,), math.nan)
    _C.read_memory(x, sums, 3)
    torch.testing.assert_close(sums.double().sum(), x.double().sum(), atol=1e-3, rtol=0)
    _C.copy_memory(x, out[offset : offset + size], 3)
    assert torch.equal(out[offset : offset + size], x)
    assert out[:offset].isnan().all() and out[offset + size :].isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_multiply_add_counts_what_it_does(dtype: str) -> None:
    sums = torch.zeros(2)
    flops = _C.multiply_add(sums, dtype, 5, 2)
    if dtype == "bfloat16" and _C.cpu_target() not in ("avx512_bf16", "amx", "amx_shim"):
        assert flops == 0
        return
    # Chains of x -> 1 + x / 2 from 0 hold 31/16 after five steps; those of the dot product add two products of 1 each time.
    lanes_and_chains, after = (flops / 2 / 5 / 2 / 2, 10.0) if dtype == "bfloat16" else (flops / 2 / 5 / 2, 31 / 16)
    assert sums.tolist() == [lanes_and_chains * after] * 2


def test_loops_refuse_wrong_arguments() -> None:
    with pytest.raises(ValueError, match='dtype "int8" is not one of float32, float64, bfloat16'):
        _C.multiply_add(torch.zeros(1), "int8", 1, 1)
    with pytest.raises(ValueError, match=r"steps = 0 is outside 1\.\."):
        _C.multiply_add(torch.zeros(1), "float32", 0, 1)
    with pytest.raises(ValueError, match="sums has size 1 in dimension 0, expected 2"):
        _C.read_memory(torch.zeros(8), torch.zeros(1), 2)
    with pytest.raises(ValueError, match="out has size 7"):
        _C.copy_memory(torch.zeros(8), torch.zeros(7), 1)


# Memory


def test_exponent_of_powers() -> None:
    lengths = [1, 2, 4, 8]
    assert memory.growth_exponent(lengths, [3 * n for n in lengths]) == pytest.approx(1.0)
    assert memory.growth_exponent(lengths, [5 * n * n for n in lengths]) == pytest.approx(2.0)


@pytest.mark.slow
def test_memory_of_forward_and_backward_is_linear() -> None:
    """And the same measurement sees that the reference stores the scores."""
    peaks = {}
    for implementation, lengths in (("foveate", (1024, 4096)), ("reference", (256, 1024))):
        todo = [cases.MemoryCase(1, S, 4, 64, "fp32") for S in lengths]
        peaks[implementation] = [memory.measure(case, implementation, 1) for case in todo]
    assert memory.growth_exponent((1024, 4096), peaks["foveate"]) < 1.2
    assert memory.growth_exponent((256, 1024), peaks["reference"]) > 1.5
    outputs = 4 * 4096 * 4 * 64 * 4  # out, dq, dk, dv
    assert outputs <= peaks["foveate"][1] < 4 * outputs


def test_memory_bench_says_why_it_failed() -> None:
    with pytest.raises(RuntimeError, match=r"memory bench of B1 S64 H4 D64 causal \(foveate\) failed"):
        memory.measure(cases.MemoryCase(1, 64, 4, 64, "fp99"), "foveate", 1)


# Command line


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    assert all(f"  {bench}" in text for bench in BENCHES) and "examples:" in text and "--against" in text


def test_info_names_the_targets(capsys) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu target"] == _C.cpu_target() and found["torch"] == torch.__version__
    assert main(["info"]) == 0
    assert _C.cpu_target() in capsys.readouterr().out


def test_wrong_requests_get_a_sentence(capsys) -> None:
    assert main(["bench", "attention", "--threads", "0"]) == 2
    assert "--threads 0 must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exited:
        main(["bench", "atention"])
    assert exited.value.code == 2
    assert "'atention'" in capsys.readouterr().err


def test_foveate_alone(tmp_path) -> None:
    limits = roofline.Limits(1, 1.0, 1.0, 1.0, 1.0)
    rows = list(run.rows(run.Options(["overhead"], ["fp32"], peers=False, quick=True), limits))
    assert [row.peer for row in rows] == ["", "", ""] and all(row.us and row.ratio is None for row in rows)
    assert run.summarize(rows) == []
    report.draw(tmp_path / "none.png", machine.describe(), rows)
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(("module", "arguments"), [("rich", []), ("matplotlib", ["--json", "--out", "nowhere"])])
def test_missing_extra_is_named_before_anything_runs(module: str, arguments: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None if name == module else object())
    assert main(["bench", "attention", "--quick", *arguments]) == 1
    assert f"needs {module}: pip install 'foveate[bench]'" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_case_without_memory_is_skipped_and_says_so(monkeypatch) -> None:
    monkeypatch.setattr(workloads, "missing_bytes", lambda case: 3 << 30)
    limits = roofline.Limits(1, 1.0, 1.0, 1.0, 1.0)
    (row,) = run.rows(run.Options(["decode"], ["fp32"], quick=True), limits)
    assert row.us is None and row.note == "skipped: 3.0 GiB of memory are missing"
