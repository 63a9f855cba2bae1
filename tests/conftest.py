"""Fixtures that run a test on everything available here, and say what was skipped and why."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch


def _refresh_package(config: pytest.Config) -> None:
    """The editable install compiles what C++ edits have made stale, once, before any test process imports it.

    A foveate on PYTHONPATH (a build under build/, another checkout) is what was asked for and goes before the editable one, here and in
    the processes that tests start.
    """
    searched = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if any((folder / "foveate" / "__init__.py").exists() for folder in searched):
        editable = [finder for finder in sys.meta_path if type(finder).__module__ == "_editable_skbc_foveate"]
        os.environ["SKBUILD_EDITABLE_SKIP"] = os.pathsep.join(finder.path for finder in editable)
        return
    if hasattr(config, "workerinput"):  # a worker of pytest-xdist: its controller has done it
        return
    spec = importlib.util.find_spec("foveate")
    if spec is None:
        pytest.exit("foveate is not installed in this environment: make build", 1)
    rebuild = getattr(spec.loader, "rebuild", None)
    if rebuild is not None:
        try:
            rebuild()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.exit(f"foveate cannot be brought up to date ({error}): make build", 1)


def pytest_report_header() -> str:
    spec = importlib.util.find_spec("foveate")
    return f"foveate: {spec.origin if spec else 'not installed'}"


def pytest_configure(config: pytest.Config) -> None:
    _refresh_package(config)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background job; the tests of Ctrl-C need it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("TRITON_INTERPRET") == "1":
        # triton 3.6's interpreter converts loop bounds in a way that newer versions of numpy will refuse
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning")
        config.addinivalue_line(
            "filterwarnings", "ignore:All-NaN slice encountered:RuntimeWarning"
        )  # the maximum of a row of NaN


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that is run on each backend has the backend's name as a marker."""
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend in ("native", "triton", "reference"):
            item.add_marker(backend)


@pytest.fixture
def device() -> str:
    """cpu, or what FOVEATE_TEST_DEVICE names: with a GPU the same files run under FOVEATE_TEST_DEVICE=cuda."""
    return os.environ.get("FOVEATE_TEST_DEVICE", "cpu")


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    import foveate

    reason = foveate.backends()[request.param]
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    case = request.node.callspec.params.get("case")
    on_gpu = request.param == "triton" or (
        request.param == "native" and foveate.backend.native.runs_cuda_kernels(request.getfixturevalue("device"))
    )
    if on_gpu and (request.function.__name__ == "test_gradcheck" or getattr(case, "dtype", None) == torch.float64):
        pytest.skip(f"{request.param}: its kernels for GPUs take no fp64")
    return request.param


@pytest.fixture
def seed() -> int:
    """One seed for the whole run, changed by FOVEATE_TEST_SEED to look for new failures."""
    return int(os.environ.get("FOVEATE_TEST_SEED", "0"))


@pytest.fixture(autouse=True)
def _seed_torch(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny models: threads cost them more than they give, above all where tests run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], list[str]]:
    """The names of the CUDA kernels that a call launches, with their template arguments, in the emulator's build."""
    from foveate.backend.native import _C

    if _C is None or not _C.cuda_emulated:
        pytest.skip("only the emulator names the kernels that it runs")
    if os.environ.get("FOVEATE_EMULATOR_PTX"):
        pytest.skip("the PTX machine does not name every launch")

    def run(f: Callable[[], object]) -> list[str]:
        path = tmp_path / "launches.jsonl"
        with monkeypatch.context() as patch:
            patch.setenv("FOVEATE_EMULATOR_COUNTERS", str(path))
            f()
        names = [json.loads(line)["kernel"] for line in path.read_text().splitlines()]
        path.unlink()
        return names

    return run
