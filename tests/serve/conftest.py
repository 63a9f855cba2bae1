"""One toy model in a folder, and one server that most tests share."""

from __future__ import annotations

import importlib.util

import pytest

import generation_toys as toys

# Without the extra `serve` and a client there is nothing to collect here.
MISSING = [
    name for name in ("fastapi", "uvicorn", "prometheus_client", "httpx2") if importlib.util.find_spec(name) is None
]
collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads cost tiny models more than they give."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return toys.folder(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def llm(folder):
    """The same model in process, for comparison."""
    import serve_toys

    return serve_toys.make_llm(folder)


@pytest.fixture(scope="module")
def toy(folder):
    import serve_toys

    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}) as running:
        yield running


@pytest.fixture(scope="session")
def tooled(folder):
    """One whose chat template takes tools."""
    import serve_toys

    def load():
        llm = serve_toys.make_llm(folder, num_pages=128)
        llm.tokenizer.chat_template = serve_toys.TOOL_TEMPLATE
        return llm

    with serve_toys.serving({"toy": load}) as running:
        yield running
