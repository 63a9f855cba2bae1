"""python/foveate/_C.pyi describes the compiled module to type checkers. `make stubs` writes it, tests/project/test_stubs.py compares it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

STUB = Path(__file__).parent.parent / "python" / "foveate" / "_C.pyi"


def generate() -> str:
    """The stub of the installed module, as pybind11-stubgen writes it and ruff formats it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pybind11_stubgen", "foveate._C", "-o", folder, "--exit-code"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"pybind11-stubgen found signatures that it cannot read:\n{done.stderr}")
        text = (Path(folder) / "foveate" / "_C.pyi").read_text()
    config = STUB.parent.parent.parent / "pyproject.toml"
    for step in (["check", "--fix-only", "--quiet"], ["format", "--quiet"]):
        command = [sys.executable, "-m", "ruff", *step, "--config", str(config), "--stdin-filename", str(STUB), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the stub instead of comparing it")
    text = generate()
    if parser.parse_args().write:
        STUB.write_text(text)
        return 0
    if text != STUB.read_text():
        print(f"{STUB} does not describe the compiled module: run `make stubs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
