"""Which GPUs the Triton kernels serve, from faked properties: AMD's and Intel's never get the compiled CUDA kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import foveate.backend.triton as backend
from foveate.backend import native, registry
from foveate.backend.registry import Query
from foveate.backend.triton import attention_launch, config, decode_launch
from foveate.ops.attention import operands

pytestmark = pytest.mark.device

OPS = sorted({op for op, name in registry._supports if name == "triton"})


def query(op: str, device: str) -> Query:
    if op.startswith("attention") and op != "attention_with_kv_cache":
        return operands.query(device, torch.bfloat16, 64, 64, operands.Used())
    return Query(device, torch.bfloat16)


@pytest.fixture(autouse=True)
def compiled_cuda_kernels(monkeypatch):
    """A wheel with CUDA kernels and without the interpreter; what has been chosen before is forgotten."""
    kernels = SimpleNamespace(has_cuda_kernels=lambda: True, cuda_emulated=False)
    monkeypatch.setattr(native, "_C", kernels)
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    registry.forget_choices()
    for function in (attention_launch.arch, decode_launch.num_sms):
        function.cache_clear()
    yield
    registry.forget_choices()
    for function in (attention_launch.arch, decode_launch.num_sms):
        function.cache_clear()


def nvidia(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def amd(monkeypatch, name: str) -> None:
    """ROCm's torch: its tensors are on "cuda", and its compute capability is the number of the chip, such as 9.4."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    properties = SimpleNamespace(gcnArchName=name, multi_processor_count=304)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)


@pytest.mark.parametrize("op", OPS)
def test_amd_gets_triton(op, monkeypatch):
    nvidia(monkeypatch, (9, 0))
    with_cuda_kernels = registry.choose(op, query(op, "cuda"), None) == "native"
    registry.forget_choices()
    amd(monkeypatch, "gfx942:sramecc+:xnack-")
    assert registry.choose(op, query(op, "cuda"), None) == "triton"
    with pytest.raises(registry.UnsupportedError, match="ROCm" if with_cuda_kernels else "cannot serve"):
        registry.choose(op, query(op, "cuda"), "native")


@pytest.mark.parametrize("op", OPS)
def test_intel_gets_triton(op):
    assert registry.choose(op, query(op, "xpu"), None) == "triton"
    with pytest.raises(registry.UnsupportedError, match="xpu"):
        registry.choose(op, query(op, "xpu"), "native")


def test_without_compiled_kernels_nvidia_gets_triton(monkeypatch):
    nvidia(monkeypatch, (10, 0))
    monkeypatch.setattr(native._C, "has_cuda_kernels", lambda: False)
    assert registry.choose("attention", query("attention", "cuda"), None) == "triton"


def test_chips_that_triton_does_not_compile_for(monkeypatch):
    nvidia(monkeypatch, (7, 5))
    assert "8.0" in str(backend.serves(Query("cuda", torch.float16)))
    assert registry.choose("softmax", Query("cuda", torch.float16), None) == "reference"
    nvidia(monkeypatch, (8, 0))
    assert backend.serves(Query("cuda", torch.float16)) is None


def test_other_devices_are_refused_with_a_sentence():
    assert "these are on mps" in str(backend.serves(Query("mps", torch.float16)))
    assert "float64" in str(backend.serves(Query("xpu", torch.float64)))


@pytest.mark.parametrize(
    ("name", "expected"), [("gfx942:sramecc+", config.CDNA), ("gfx90a", config.CDNA), ("gfx1100", config.RDNA)]
)
def test_amd_chips(name, expected, monkeypatch):
    amd(monkeypatch, name)
    assert attention_launch.arch(torch.device("cuda", 0)) == expected
    assert decode_launch.num_sms(torch.device("cuda", 0)) == 304


def test_intel_and_nvidia_chips(monkeypatch):
    nvidia(monkeypatch, (12, 0))
    assert attention_launch.arch(torch.device("cuda", 0)) == 120
    assert attention_launch.arch(torch.device("xpu", 0)) == config.XE
    assert attention_launch.arch(torch.device("cpu")) == config.INTERPRETER
    properties = SimpleNamespace(gpu_subslice_count=64)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device=None: properties)
    assert decode_launch.num_sms(torch.device("xpu", 0)) == 64


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_kernels_start_on_the_device_of_their_tensors(kind, monkeypatch):
    current = [0]

    class Current:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            current.append(self.device.index)

        def __exit__(self, *_):
            current.pop()

    module = getattr(torch, kind)
    monkeypatch.setattr(module, "current_device", lambda: current[-1])
    monkeypatch.setattr(module, "device", Current)
    launch = backend.on_device(lambda first: current[-1])
    assert launch(SimpleNamespace(device=torch.device(kind, 3))) == 3
    assert launch(SimpleNamespace(q=SimpleNamespace(device=torch.device(kind, 0)))) == 0
    assert current == [0]
