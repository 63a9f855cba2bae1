"""Imports of the package run downward only: each folder may use those below it, and modules do not import one another in a circle."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "python" / "foveate"
# From the top down. Folders in one row do not import one another.
LAYERS = [
    ["cli", "bench", "integrations"],
    ["serve", "evaluate", "inspect"],
    ["guard"],
    ["train", "data"],
    ["pipelines"],
    ["generation"],
    ["models"],
    ["nn", "drop_in", "ring"],
    ["cache"],
    ["ops"],
    ["backend", "tokenizer"],
    ["quantization"],
    ["files", "progress"],
]
HEIGHT = {name: -row for row, names in enumerate(LAYERS) for name in names}
ROOT = {"__init__", "__main__", "_public", "_version", "_moved", "_C"}
# `foveate bench` is a command over the folder bench; the server answers the field `inspect` by foveate.inspect.
BESIDE = {("cli", "bench"), ("serve", "inspect")}


def modules(package: Path) -> dict[str, Path]:
    """{"foveate.ops.softmax": its file, ...}"""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(module: str, file: Path, known: dict[str, Path]) -> set[tuple[str, bool]]:
    """(module, whether at import time) of each import of the package, inside functions too; not those for types alone."""
    tree = ast.parse(file.read_text())
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    later = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(outer)
    }
    typing_only = {
        id(node)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and ast.unparse(outer.test) == "TYPE_CHECKING"
        for inner in outer.body
        for node in ast.walk(inner)
    }
    found, top = set(), package.split(".")[0]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            names = [name if name in known or name == f"{top}._C" else base for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {(name, id(node) not in later) for name in names if name == top or name.startswith(top + ".")}
    return found


def upward(package: Path) -> list[str]:
    known = modules(package)
    wrong = []
    for module, file in known.items():
        here = module.split(".")[1] if "." in module else "__init__"
        if here in ROOT:
            continue
        for name, _ in sorted(imports(module, file, known)):
            there = name.split(".")[1] if "." in name else "__init__"
            if there == here or there in ROOT or (here, there) in BESIDE:
                continue
            if HEIGHT[there] >= HEIGHT[here]:
                wrong.append(f"{module} imports {name}: {here} does not stand over {there}")
    return wrong


def circles(package: Path) -> list[list[str]]:
    """Circles of imports at import time, each once."""
    known = modules(package)
    below = {
        module: {name for name, now in imports(module, file, known) if now and name in known and name != module}
        for module, file in known.items()
    }
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for name in sorted(below[module]):
                visit(name, [*path, module])
            done.add(module)

    for module in known:
        visit(module, [])
    return found


def test_every_folder_has_a_layer() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    files = {p.stem for p in PACKAGE.glob("*.py")}
    assert folders | files <= set(HEIGHT) | ROOT


def test_the_design_names_the_layers_in_this_order() -> None:
    text = (PACKAGE.parents[1] / "docs" / "develop" / "design.md").read_text()
    block = text[text.index("python/foveate/  imports") : text.index("```", text.index("python/foveate/  imports"))]
    rows = [set(re.findall(r"\b([a-z_]+)(?:/|\.py)", line)) for line in block.splitlines()[1:]]
    assert [row - {"triton", "reference"} for row in rows] == [set(names) for names in LAYERS]


def test_imports_run_downward() -> None:
    assert upward(PACKAGE) == []


def test_no_circles() -> None:
    assert circles(PACKAGE) == []


def test_what_torch_does_not_promise_is_named_in_one_file() -> None:
    private = re.compile(r"torch\._C\b|torch\._subclasses\b|forward_ad\._(?!current_level)|torch\._dynamo\.")
    users = [file.relative_to(PACKAGE).as_posix() for file in PACKAGE.rglob("*.py") if private.search(file.read_text())]
    assert users == ["ops/torch_internals.py"]


def test_no_module_has_the_name_of_a_public_function() -> None:
    import foveate

    named = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()} - ROOT
    clashes = [name for name in named & set(foveate.__all__) if callable(getattr(foveate, name))]
    assert clashes == []


def test_a_path_from_before_still_imports_and_says_where_the_module_is() -> None:
    import foveate
    from foveate._moved import MOVED

    assert not set(MOVED) & set(
        foveate.__all__
    )  # the import of such a path would put a module in the place of the function
    for old, new in MOVED.items():
        assert f"foveate.{new}" in modules(PACKAGE) and f"foveate.{old}" not in modules(PACKAGE)
        sys.modules.pop(f"foveate.{old}", None)
        with pytest.warns(DeprecationWarning, match=rf"foveate\.{old} is now foveate\.{new}; import it from there"):
            module = importlib.import_module(f"foveate.{old}")
        assert module is importlib.import_module(f"foveate.{new}") and module.__spec__.name == f"foveate.{new}"


@pytest.mark.parametrize(
    "folder, text, sentence",
    [
        ("ops", "from foveate.models.llama import Llama\n", "ops does not stand over models"),
        ("ops", "def f():\n    import foveate.train\n", "ops does not stand over train"),
        ("backend", "from ..tokenizer import Tokenizer\n", "backend does not stand over tokenizer"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, folder: str, text: str, sentence: str) -> None:
    for name in ("ops", "backend", "models", "train", "tokenizer"):
        (tmp_path / "foveate" / name).mkdir(parents=True)
        (tmp_path / "foveate" / name / "__init__.py").write_text("")
    (tmp_path / "foveate" / "__init__.py").write_text("")
    (tmp_path / "foveate" / "models" / "llama.py").write_text("")
    assert upward(tmp_path / "foveate") == []
    (tmp_path / "foveate" / folder / "wrong.py").write_text(text)
    assert [line for line in upward(tmp_path / "foveate") if sentence in line]


def test_a_circle_is_found(tmp_path: Path) -> None:
    for name, other in (("ops", "cache"), ("cache", "ops")):
        (tmp_path / "foveate" / name).mkdir(parents=True)
        (tmp_path / "foveate" / name / "__init__.py").write_text("")
        (tmp_path / "foveate" / name / "a.py").write_text(f"from foveate.{other} import a\n")
    (tmp_path / "foveate" / "__init__.py").write_text("")
    assert circles(tmp_path / "foveate")
