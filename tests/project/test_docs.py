"""What the documents say exists: their code runs, their paths, names, commands and variables are those of this repository."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import doc_models
import foveate
import foveate.cli

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md"))
    if path.exists()
)
# What happened at a date keeps the names of that date.
HISTORY = {"docs/log.md", "docs/changelog.md"}
# Environment of pages whose code has to run in a process of its own.
OWN_PROCESS = {"docs/kernels/triton.md": {"TRITON_INTERPRET": "1"}}
FOLDERS = ("csrc", "python", "tests", "docs", "benchmarks", "tools", "examples", "requirements", r"\.ci", r"\.github")


@functools.cache
def read(page: str) -> str:
    return (ROOT / page).read_text()


@functools.cache
def files() -> tuple[str, ...]:
    """The files of the repository; without git, as in a source archive, those on the disk."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return tuple(name for name in listed.stdout.splitlines() if (ROOT / name).exists())
    return tuple(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file())


# ---- code --------------------------------------------------------------------------------------------------------------------


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def to_run(text: str) -> list[str]:
    """Blocks without those that begin with `# not run: REASON`."""
    blocks = python_blocks(text)
    for block in blocks:
        if block.startswith("# not run"):
            assert re.match(r"# not run: .{10,}\n", block), f"a reason has to follow: {block.splitlines()[0]}"
    return [block for block in blocks if not block.startswith("# not run")]


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """ring_attention in one process, which is a ring of one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if to_run(read(page))])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys, request) -> None:
    """One block after the other, in one namespace, in a folder that has what the page names."""
    monkeypatch.chdir(tmp_path)
    blocks = to_run(read(page))
    doc_models.make("".join(blocks))
    if page in OWN_PROCESS:
        Path("page.py").write_text("\n".join(blocks))
        path = os.pathsep.join([str(Path(foveate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | OWN_PROCESS[page] | {"PYTHONPATH": path}
        done = subprocess.run([sys.executable, "page.py"], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    if "ring_attention(" in "".join(blocks):
        request.getfixturevalue("group_of_one")
    names: dict[str, object] = {}
    for block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers' own
            exec(compile(block, page, "exec"), names)
    if page == "README.md":
        assert foveate.drop_in.calls() == 2  # a forward and a backward pass
        assert re.search(r"^native +chosen", capsys.readouterr().out, re.MULTILINE)


def test_code_that_does_not_run_says_why() -> None:
    assert to_run("```python\n# not run: it needs a GPU\nx\n```\n```python\ny\n```\n") == ["y\n"]
    with pytest.raises(AssertionError, match="a reason"):
        to_run("```python\n# not run\nx\n```\n")


# ---- paths -------------------------------------------------------------------------------------------------------------------


def missing_paths(text: str) -> list[str]:
    """Paths and names of source files that are not in the repository. `{a,b}` and `*` may stand in them."""
    names = {name for path in files() for name in (path, *map(str, Path(path).parents))}
    basenames = {os.path.basename(name) for name in names}
    missing = []
    for path in re.findall(rf"(?<![\w./~])((?:{'|'.join(FOLDERS)})/[\w./{{}},*-]*[\w}}*/])", text):
        for one in _expanded(path.rstrip("/")):
            pattern = re.escape(one).replace(r"\*", "[^/]*")
            if not any(re.fullmatch(pattern, name) for name in names):
                missing.append(path)
    for name in re.findall(r"`([\w{},.]+\.(?:py|cpp|cuh?|h|sh))`", text):
        if not all(one in basenames for one in _expanded(name)):
            missing.append(name)
    return missing


def _expanded(path: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", path)
    if match is None:
        return [path]
    return [
        one for part in match[1].split(",") for one in _expanded(path[: match.start()] + part + path[match.end() :])
    ]


def broken_links(page: str, text: str) -> list[str]:
    folder = (ROOT / page).parent
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    return [
        link
        for link in links
        if ":" not in link and not link.startswith("#") and not (folder / link.partition("#")[0]).exists()
    ]


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_links_exist(page) -> None:
    assert broken_links(page, read(page)) == []
    if page not in HISTORY:
        assert missing_paths(read(page)) == []


def test_a_wrong_path_is_seen() -> None:
    assert missing_paths("see `csrc/cpu/nothing.cpp` and csrc/core/philox.h, `no_such_file.py`, `report.py`") == [
        "csrc/cpu/nothing.cpp",
        "no_such_file.py",
    ]
    assert missing_paths("`docs/{index,nothing}.md`, `docs/*.md`, ~/docs/x, `build/docs/site`") == [
        "docs/{index,nothing}.md"
    ]
    assert broken_links("docs/index.md", "[a](install.md) [b](installed.md#x) [c](#here) [d](https://x.org)") == [
        "installed.md#x"
    ]


# ---- names -------------------------------------------------------------------------------------------------------------------


def unknown_names(text: str) -> list[str]:
    """`foveate.x.y` that cannot be reached by import and attributes."""
    found = set(re.findall(r"(?<![\w./-])(foveate(?:\.[A-Za-z_]\w*)+)(?![\w/-])", text))
    return sorted(name for name in found if not _reachable(name))


def _reachable(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                return True  # it exists, and needs a library that is not installed
            continue
        try:
            for part in parts[length:]:
                thing = getattr(thing, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_names_exist(page) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert unknown_names(read(page)) == []


def test_every_public_name_has_its_place_in_the_reference() -> None:
    pages = "\n".join(read(page) for page in PAGES if page.startswith("docs/api/"))
    documented = re.findall(r"^::: foveate\.(\w+)$", pages, re.MULTILINE)
    assert sorted(set(foveate.__all__) - set(documented)) == []
    assert len(documented) == len(set(documented))


def test_a_wrong_name_is_seen() -> None:
    text = "`foveate.attention`, foveate.atention, `foveate.train.fit`, `foveate.train.fitt`, python/foveate.py"
    assert unknown_names(text) == ["foveate.atention", "foveate.train.fitt"]


# ---- commands and variables --------------------------------------------------------------------------------------------------


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@functools.cache
def help_text(*command: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        foveate.cli.main([*command, "--help"])
    return out.getvalue()


def commands() -> set[str]:
    return set(re.findall(r"^ {4}([a-z]+)(?:  |$)", help_text(), re.MULTILINE))


def unknown_commands(text: str) -> list[str]:
    """make targets, and commands of foveate with their flags, in blocks of code and in backticks."""
    code = re.findall(r"^(?: {4}|\t)(.*)$|`([^`\n]+)`", text, re.MULTILINE) + [
        (line, "")
        for block in re.findall(r"^```(?:bash|sh)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    unknown = []
    for line in (a or b for a, b in code):
        line = re.sub(r"  +#.*| # .*", "", line)
        for target in re.findall(r"^make ([a-z]+)\b", line):
            if target not in make_targets():
                unknown.append(f"make {target}")
        match = re.match(r"(?:.* -m )?foveate ([a-z]+)(.*)", line)
        if match is None:
            continue
        if match[1] not in commands():
            unknown.append(f"foveate {match[1]}")
            continue
        step = re.match(r" ([a-z]+)", match[2]) if match[1] == "data" else None  # its commands have their own flags
        flags = re.findall(r"--[a-z][\w-]*", help_text(match[1], *(step.groups() if step else ())))
        unknown += [
            f"foveate {match[1]} {flag}"
            for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", match[2])
            if flag not in flags
        ]
    return unknown


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY])
def test_commands_exist(page) -> None:
    assert unknown_commands(read(page)) == []


def test_a_wrong_command_is_seen() -> None:
    text = "    make dem\n`foveate generat`, `foveate chat --modell x`\n\n```\nfoveate info\nmake test    # all\n```\n"
    assert unknown_commands(text) == ["make dem", "foveate generat", "foveate chat --modell"]


def variables(path: str) -> set[str]:
    return set(re.findall(r"FOVEATE_[A-Z_]*[A-Z]", read(path)))


def test_variables_are_those_of_the_code() -> None:
    code = [
        name for name in files() if name.endswith((".py", ".cpp", ".h", ".sh", "CMakeLists.txt", "Makefile", "/run"))
    ]
    known = set().union(*(variables(name) for name in code if "project/test_docs" not in name))
    for page in PAGES:
        assert page in HISTORY or variables(page) <= known, page
    package = [name for name in code if name.startswith(("python/", "csrc/cpu", "csrc/ops"))]
    asked = {name for path in package for name in re.findall(r'(?:environ\S*|getenv)[\[(]"(FOVEATE_\w+)', read(path))}
    assert asked, "the package asks for no variable: the pattern is stale"
    assert asked <= variables("docs/install.md"), "every variable of the package is in docs/install.md"


# ---- form --------------------------------------------------------------------------------------------------------------------


def long_lines(text: str) -> list[str]:
    """Lines of prose beyond 100 columns that could be broken; generated parts, tables, code and headings stay as they are."""
    text = re.sub(r"^<!-- [\w ]+: generated.*?^<!-- end of [\w ]+ -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    long = [line for line in text.splitlines() if len(line) > 100 and not line.startswith(("|", "    ", "#", "!["))]
    return [line for line in long if " " in re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)", "x", line).strip()]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/guide/transformers_support.md"])
def test_prose_is_wrapped(page) -> None:
    assert long_lines(read(page)) == []


def test_a_long_line_is_seen() -> None:
    assert long_lines("a b " * 26 + "\n| " + "x " * 99 + "\n```\n" + "y " * 99 + "\n```\n") == ["a b " * 26]
