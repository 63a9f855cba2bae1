"""The generated parts of README.md and docs/support.md are those of this build and of the committed results."""

from __future__ import annotations

from pathlib import Path

import pytest

import foveate
import peers
import readme
import support_matrix
from foveate.backend import registry
from foveate.bench import machine, report, run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
of_a_build_with_cuda = pytest.mark.skipif(
    not foveate.backend.native._C.has_cuda_kernels(),
    reason="the tables of the README are those of a build with CUDA, which this one is not",
)


@of_a_build_with_cuda
def test_generated_parts_are_up_to_date(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert readme.main(["--check"]) == 0, "run `python tools/readme.py`"


def test_matrix_is_what_the_backends_answer(monkeypatch) -> None:
    plain = support_matrix.matrix()
    assert "| `softcap` | yes | yes |" in plain and "| `attention_with_kv_cache` | yes | - |" in plain
    answers = dict(registry._supports)
    answers["attention_backward", "native"] = lambda query: (
        "no gradient of sinks here" if "sinks" in query.features else None
    )
    monkeypatch.setattr(registry, "_supports", answers)
    changed = support_matrix.matrix()
    assert "| `sinks` | yes | no (1) |" in changed and "\n1. no gradient of sinks here." in changed
    kept = ("| `bias`", "| float32", "| float16", "| `softmax` |", "| `rms_norm` |")
    other = [line for line in plain.splitlines() if line.startswith(kept)]
    assert len(other) == 5 and set(other) <= set(changed.splitlines())


def test_check_sees_a_stale_document(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    for name in readme.FILES:
        (tmp_path / name).write_text((ROOT / name).read_text().replace("| `softcap` | yes", "| `softcap` | no"))
    assert readme.main(["--check"]) == 1
    assert "not up to date" in capsys.readouterr().err
    assert readme.main([]) == 0
    assert readme.main(["--check"]) == 0
    assert "| `softcap` | yes" in (tmp_path / "docs" / "support.md").read_text()


def committed(folder: Path, date: str, ratio: float, cpu: str = "a CPU") -> None:
    """Results of a full run and of generation on a date."""
    results = folder / "benchmarks" / "results"
    results.mkdir(parents=True, exist_ok=True)
    here = machine.Machine("abc", date, cpu, "avx2", 4, "2.13.0", "0.1.0")
    file = report.CsvFile(results / f"{here.stem('cpu')}.csv", here)
    for dtype, factor in (("fp32", 1.0), ("bf16", 2.0)):
        for bench in ("attention", "decode"):
            file.add(run.Row(bench, "B1", dtype, us=1.0, peer="sdpa", ratio=ratio * factor, percent_of_limit=70.0))
    file.add(run.Row("memory", "growth with S", "fp32", rate=1.01, unit="exponent"))
    file.close()
    rates = [("decode", "foveate", 300.0), ("decode", "llama.cpp", 100.0), ("decode_16", "foveate", 900.0)]
    lines = [f"{case},{engine},{rate}" for case, engine, rate in [*rates, ("decode_16", "llama.cpp", 200.0)]]
    (results / f"{here.stem('generate')}.csv").write_text("\n".join(["case,engine,tokens_per_s", *lines]) + "\n")
    (results / f"{here.stem('generate')}.md").write_text(f"a table of {cpu}\n")


def test_numbers_come_from_the_newest_results(tmp_path) -> None:
    assert "No results" in readme.generated(tmp_path)["numbers"]
    committed(tmp_path, "2001-01-01", 1.0)
    committed(tmp_path, "2002-01-01", 3.0)
    (tmp_path / "benchmarks" / "results" / "cpu_a-avx2_2003-01-01_decode.csv").write_text("not a full run")
    parts = readme.generated(tmp_path)
    assert "a CPU, 4 threads, avx2, torch 2.13.0, 2002-01-01, commit `abc`." in parts["numbers"]
    assert "| attention forward | fp32 | sdpa | 1 | 3.00x | 3.00x | 70 (70) |" in parts["numbers"]
    assert "grows as S to the power of 1.01 (fp32)" in parts["numbers"]
    assert "| attention forward, bf16, beside torch SDPA | **6x**, lowest 6x |" in parts["headline"]
    assert "one request, beside llama.cpp | **3x**, 300 tokens/s |" in parts["headline"]
    assert "16 requests at once, beside llama.cpp | **4.5x**, 900 tokens/s |" in parts["headline"]
    assert "a CPU, 4 threads, avx2, torch 2.13.0, 2002-01-01.\n" in parts["headline"]
    assert "| CPU time, decode, bf16, a, avx2 | 1x |  |  |  | 6x |  |  |  |" in parts["peers"]
    assert parts["generation"] == "a table of a CPU"


def test_every_machine_is_shown(tmp_path) -> None:
    committed(tmp_path, "2001-01-01", 1.0, "Intel(R) Xeon(R) Processor @ 2.00GHz")
    committed(tmp_path, "2002-01-01", 3.0, "AMD EPYC 9R45")
    parts = readme.generated(tmp_path)
    assert "| | AMD EPYC 9R45, avx2 | Intel Xeon, avx2 |" in parts["headline"]
    assert "| attention forward, fp32, beside torch SDPA | **3x**, lowest 3x | **1x**, lowest 1x |" in parts["headline"]
    assert parts["numbers"].count("commit `abc`") == 2
    assert "| CPU time, decode, bf16, Intel Xeon, avx2 | 1x |  |  |  | 2x |  |  |  |" in parts["peers"]
    assert parts["generation"].startswith("a table of AMD EPYC 9R45\n\na table of Intel")
    readme.draw_picture(tmp_path)
    assert readme.picture_is_current(tmp_path)


def test_picture_is_that_of_the_newest_results(tmp_path) -> None:
    committed(tmp_path, "2001-01-01", 1.0)
    assert not readme.picture_is_current(tmp_path)
    readme.draw_picture(tmp_path)
    assert readme.picture_is_current(tmp_path)
    committed(tmp_path, "2002-01-01", 3.0)
    assert not readme.picture_is_current(tmp_path)
    assert readme.picture_is_current(ROOT), "run `python tools/readme.py`"


@of_a_build_with_cuda
def test_features_are_those_of_the_backends(monkeypatch) -> None:
    """An option that one backend lacks is no tick in the table of peers."""
    assert "| softcap | ✓ | ✓ |" in peers.table({}) and "differs" not in peers.table({})
    served = support_matrix.served
    monkeypatch.setattr(
        support_matrix,
        "served",
        lambda *call: (True, False) if call == ("native", "cuda", "softcap") else served(*call),
    )
    assert "| softcap | differs | ✓ |" in peers.table({})


def test_missing_markers_are_named() -> None:
    whole = "<!-- x: generated -->\n<!-- end of x -->\n"
    assert readme.with_parts({"a": whole, "b": "text\n"}, {"x": "new"})["a"].splitlines()[1:4] == ["", "new", ""]
    for texts in (
        {"a": "# no markers here\n"},
        {"a": whole, "b": whole},
        {"a": "<!-- end of x -->\n<!-- x: generated -->\n"},
    ):
        with pytest.raises(KeyError, match="end of x"):
            readme.with_parts(texts, {"x": "new"})
