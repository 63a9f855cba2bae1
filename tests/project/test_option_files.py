"""An operand of attention is carried by the six files of docs/develop/add_an_option.md, and named elsewhere only for its meaning."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "develop" / "add_an_option.md"
CARRIED = ["python/foveate/ops/attention", "csrc/contract", "csrc/ops", "csrc/bindings", "csrc/core"]
# Files in these folders that name `sinks` for another reason.
MEANING = {
    "python/foveate/ops/attention/definition.py": "calls the definition of the reference backend",
    "csrc/bindings/bind_decoder.cpp": "hands a layer's sinks to the decoder, which calls the op with a KV cache",
    "python/foveate/ops/attention/op.py": "hands calls of few queries to the op with a KV cache",
    "python/foveate/ops/attention/weights.py": "applies the options to the scores of chosen rows in plain torch",
}
OTHER_OP = re.compile(r"(with_kv_cache\w*|cache_operands)\.py|kv_cache\.(h|cpp)")


def names_of(file: Path) -> set[str]:
    """Names and short strings in the code of a file; not its comments and docstrings."""
    if file.suffix != ".py":
        return set(re.findall(r"\w+", re.sub(r"//.*", "", file.read_text())))
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        found |= {value for _, value in ast.iter_fields(node) if isinstance(value, str) and len(value) < 40}
    return found


def test_an_operand_is_carried_by_the_six_files_of_the_guide() -> None:
    table = GUIDE.read_text().split("## What it means")[0]
    guide = set(re.findall(r"^\| `([\w/.]+)` \|", table, re.MULTILINE))
    files = [file for folder in CARRIED for file in sorted((ROOT / folder).iterdir()) if file.is_file()]
    named = {str(file.relative_to(ROOT)) for file in files if "sinks" in names_of(file)}
    assert len(guide) == 6
    assert {name for name in named if not OTHER_OP.search(name)} - set(MEANING) == guide
    assert set(MEANING) <= named


def test_names_in_comments_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        '"""sinks are a number that this long sentence of a docstring names."""  # sinks\nx = 1\n'
    )
    (tmp_path / "a.h").write_text("int x;  // sinks\n")
    assert "sinks" not in names_of(tmp_path / "a.py") | names_of(tmp_path / "a.h")
