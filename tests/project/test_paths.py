"""A file that a comment, a docstring or a script names is there: moves leave no path behind that leads nowhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED = re.compile(
    r"(?<![\w/.*])(?:python/foveate|csrc|docs|tests|tools|benchmarks|examples|\.ci)/[\w/.-]*\w\.(?:py|pyi|h|hpp|cpp|cu|cuh|md|sh|json|txt)\b"
)
# Files from outside a checkout, or of one that a test makes up.
ELSEWHERE = ("docs/log.md", "CHANGELOG.md", "tests/project/test_docs.py", "tests/project/test_paths.py")


def missing(root: Path, files: list[str]) -> list[str]:
    found = []
    for name in files:
        for number, line in enumerate((root / name).read_text(errors="replace").splitlines(), 1):
            found += [f"{name}:{number}: {path}" for path in NAMED.findall(line) if not (root / path).exists()]
    return found


def is_ignored(path: str) -> bool:
    return subprocess.run(["git", "check-ignore", "-q", path], cwd=ROOT).returncode == 0


def test_every_path_that_a_file_names_exists() -> None:
    if not (ROOT / ".git").exists():
        return  # an unpacked source distribution
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    kinds = (
        ".py",
        ".pyi",
        ".h",
        ".cpp",
        ".cu",
        ".cuh",
        ".txt",
        ".toml",
        ".sh",
        ".yml",
        ".yaml",
        ".md",
        "Makefile",
        "run",
    )
    files = [name for name in listed if name.endswith(kinds) and name not in ELSEWHERE and (ROOT / name).exists()]
    assert len(files) > 300
    nowhere = missing(ROOT, files)
    # what a build makes is not there before it
    built = {path for path in {line.rsplit(": ", 1)[1] for line in nowhere} if is_ignored(path)}
    assert [line for line in nowhere if line.rsplit(": ", 1)[1] not in built] == []


def test_a_path_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.h").write_text("// see csrc/a.h and csrc/gone/b.h\n")
    assert missing(tmp_path, ["csrc/a.h"]) == ["csrc/a.h:1: csrc/gone/b.h"]
