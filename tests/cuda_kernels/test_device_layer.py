"""The device layer (csrc/cuda/device) against golden vectors and torch: on the emulator always, on a GPU where there is one.

The golden vectors come from the PTX ISA's tables (tests/native/device/make_golden.py), not from the emulator, so that kernel
and emulator cannot share a wrong idea of a layout. Conversions are compared for every 16-bit number."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch

from device_programs import CODES, GOLDEN, SOURCES, WIDENED, bits, check_widening, emulated, for_gpu

pytestmark = pytest.mark.device


def load_make_golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_golden", SOURCES / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN_HOPPER = load_make_golden().golden_hopper()
ARCHS = {"conformance": ("80", "90a"), "conformance_hopper": ("90a",)}


class Program(NamedTuple):
    path: Path

    def __call__(self, case: str, words: np.ndarray) -> np.ndarray:
        done = subprocess.run([self.path, case], input=words.astype(np.uint32).tobytes(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return np.frombuffer(done.stdout, np.uint32)


def build(where: str, program: str, capabilities: tuple[int, ...], folder: Path) -> Program:
    if where == "emulator":
        return Program(emulated(program))
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    if torch.cuda.get_device_capability()[0] not in capabilities:
        pytest.skip(f"the GPU here has none of the compute capabilities {capabilities}")
    return Program(for_gpu(program, folder, ARCHS[program]))


@pytest.fixture(scope="module", params=["emulator", "gpu"])
def conformance(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build(request.param, "conformance", tuple(range(8, 20)), tmp_path_factory.mktemp("gpu"))


@pytest.fixture(scope="module", params=["emulator", "gpu"])
def conformance_hopper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    return build(request.param, "conformance_hopper", (9,), tmp_path_factory.mktemp("gpu"))


def test_golden_vectors_are_those_of_the_tables() -> None:
    assert (SOURCES / "golden.txt").read_text() == load_make_golden().text()


@pytest.mark.parametrize("program", ARCHS)
def test_compiles_for_the_gpus_of_the_package(program: str, tmp_path: Path) -> None:
    assert for_gpu(program, tmp_path, ARCHS[program]).exists()


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(conformance: Program, case: str) -> None:
    assert conformance(case, np.array(GOLDEN[case]["in"])).tolist() == GOLDEN[case]["out"]


@pytest.mark.parametrize("case", GOLDEN_HOPPER)
def test_golden_hopper(conformance_hopper: Program, case: str) -> None:
    words, expected = GOLDEN_HOPPER[case]
    assert conformance_hopper(case, np.array(words)).tolist() == expected


@pytest.mark.parametrize("name", WIDENED)
def test_widening_every_code(conformance: Program, name: str) -> None:
    check_widening(conformance, name)


def floats_around(dtype: torch.dtype) -> torch.Tensor:
    """Every number of `dtype`, both neighbours of every midpoint between two of them, special values and random bits."""
    size = torch.uint8 if dtype == torch.float8_e4m3fn else torch.uint16
    values = torch.from_numpy(CODES.astype(np.int32)).to(size).view(dtype).float()
    values = values[~values.isnan()].unique()
    finite = values[values.isfinite()].double()
    middle = ((finite[1:] + finite[:-1]) / 2).float()
    above, below = torch.nextafter(middle, torch.tensor(torch.inf)), torch.nextafter(middle, torch.tensor(-torch.inf))
    special = torch.tensor(
        [
            0.0,
            -0.0,
            torch.inf,
            -torch.inf,
            torch.nan,
            -torch.nan,
            3.4e38,
            -3.4e38,
            1e-45,
            447,
            448,
            449,
            464,
            65519,
            65520,
        ]
    )
    random = torch.from_numpy(
        np.random.default_rng(1).integers(0, 1 << 32, 50000, dtype=np.uint32).view(np.float32).copy()
    )
    return torch.cat([values, middle, above, below, special, random])


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_narrowing_to_16_bits(conformance: Program, name: str, dtype: torch.dtype) -> None:
    x = floats_around(dtype)
    out = conformance(f"narrow_{name}", bits(x))
    expected = x.to(dtype).view(torch.uint16).numpy().astype(np.uint32)
    expected[x.isnan().numpy()] = 0x7FFF
    assert np.array_equal(out & 0xFFFF, expected)
    assert np.array_equal(out >> 16, expected)  # by pack()


def test_narrowing_to_fp8(conformance: Program) -> None:
    x = floats_around(torch.float8_e4m3fn)
    out = conformance("narrow_f8e4m3", bits(x))
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().astype(np.uint32)
    expected[x.isnan().numpy()] = 0x7F
    assert np.array_equal(out, expected)


def test_narrowing_to_int8(conformance: Program) -> None:
    x = torch.cat(
        [torch.arange(-300, 300, dtype=torch.float32) / 2, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30])]
    )
    out = conformance("narrow_int8", bits(x))
    expected = x.nan_to_num(0, 127, -128).round().clamp(-128, 127).to(torch.int8).view(torch.uint8).numpy()
    assert np.array_equal(out, expected)


def test_tf32_rounds_half_away_from_zero(conformance: Program) -> None:
    rng = np.random.default_rng(2)
    x = np.concatenate(
        [rng.normal(size=5000).astype(np.float32), np.float32([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 1.0, 0.0])]
    )
    out = conformance("to_tf32", x.view(np.uint32)).view(np.float32)
    _, exponent = np.frexp(x)
    step = np.exp2(exponent.astype(np.float64) - 11)  # 1 + 10 bits of mantissa
    expected = np.copysign(np.floor(np.abs(x.astype(np.float64)) / step + 0.5) * step, x)
    assert np.array_equal(out.astype(np.float64), expected)


# What the instructions promise: absolute error of log2 near 1, relative errors elsewhere.
@pytest.mark.parametrize(
    "name, function, low, high, relative, absolute",
    [
        ("exp2", np.exp2, -120, 120, 2.0**-21, 0),
        ("log2", np.log2, 1e-30, 1e30, 2.0**-20, 2.0**-21),
        ("rcp", np.reciprocal, 1e-30, 1e30, 2.0**-22, 0),
        ("rsqrt", lambda x: 1 / np.sqrt(x), 1e-30, 1e30, 2.0**-21, 0),
        ("tanh", np.tanh, -10, 10, 2.0**-10.5, 0),
    ],
)
def test_approximate_math(
    conformance: Program, name: str, function: Callable, low: float, high: float, relative: float, absolute: float
) -> None:
    rng = np.random.default_rng(3)
    if low > 0:
        x = np.exp(rng.uniform(np.log(low), np.log(high), 20000)).astype(np.float32)
    else:
        x = rng.uniform(low, high, 20000).astype(np.float32)
    out = conformance(name, x.view(np.uint32)).view(np.float32).astype(np.float64)
    expected = function(x.astype(np.float64))
    assert (np.abs(out - expected) <= relative * np.abs(expected) + absolute).all()


def test_edges_of_approximate_math(conformance: Program) -> None:
    inf, nan = np.inf, np.nan
    edges = {
        "exp2": ([-inf, inf, 0, -0.0, -200, 1e-40, -127], [0, inf, 1, 1, 0, 1, 0]),  # subnormal results are zeros
        "log2": ([0, inf, 1, -1, 1e-40], [-inf, inf, 0, nan, -inf]),
        "rcp": ([0, -0.0, inf, 2, 1e-40], [inf, -inf, 0, 0.5, inf]),
        "rsqrt": ([0, inf, 4, -1], [inf, 0, 0.5, nan]),
        "tanh": ([inf, -inf, 0], [1, -1, 0]),
    }
    for name, (x, expected) in edges.items():
        out = conformance(name, np.array(x, np.float32).view(np.uint32)).view(np.float32)
        assert np.array_equal(out, np.array(expected, np.float32), equal_nan=True), (name, out)
