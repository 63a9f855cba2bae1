"""What is written in several places agrees: the version, the pins of tools, the Pythons of the wheels."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import release

ROOT = Path(__file__).parents[2]


def pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"\b([a-z][\w-]*)==([\w.]+)", text))


def test_version_is_one() -> None:
    assert release.faults() == []


@pytest.mark.parametrize(
    "file, old, new, sentence",
    [
        ("CITATION.cff", "version: ", "version: 9", "CITATION.cff has version 9"),
        ("CHANGELOG.md", "## 0", "## 9", "the first section of CHANGELOG.md is 9"),
        ("pyproject.toml", 'version = "', 'version = "9', "the tag is v"),
    ],
)
def test_another_version_is_seen(tmp_path, file, old, new, sentence) -> None:
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    tag = f"v{release.version()}"
    text = (tmp_path / file).read_text()
    (tmp_path / file).write_text(re.sub(f"^{old}", new, text, count=1, flags=re.MULTILINE))
    assert any(fault.startswith(sentence) for fault in release.faults(tmp_path, tag))


def test_a_release_has_a_date(tmp_path) -> None:
    for name in ("pyproject.toml", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
    current = release.version()
    for heading, count in (
        (f"## {current}, 2026-12-01", 0),
        (f"## {current}, not released yet", 1),
        (f"## {current}", 1),
    ):
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n")
        assert len(release.faults(tmp_path, f"v{current}")) == count


def test_hooks_have_the_versions_of_make_lint() -> None:
    hooks = pins((ROOT / ".pre-commit-config.yaml").read_text())
    assert {"ruff", "clang-format"} <= hooks.keys()
    assert hooks.items() <= pins((ROOT / "requirements" / "dev.txt").read_text()).items()


def test_wheels_are_for_the_pythons_that_the_package_names() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    named = re.findall(r"Programming Language :: Python :: 3\.(\d+)", text)
    built = re.findall(r"cp3(\d+)-manylinux", text)
    least = re.search(r'requires-python = ">=3\.(\d+)"', text)
    assert least is not None and named == built and named[0] == least[1]
