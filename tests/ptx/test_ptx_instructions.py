"""Each instruction of the PTX machine against its definition in the PTX ISA, written once more in Python."""

from __future__ import annotations

import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ptx_programs import Failed, run_text

I32 = [0, 1, 2, 3, 5, 7, 31, 32, 33, 255, 256, 65535, 65536, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE,
       0x12345678, 0xDEADBEEF,
       0x0F0F0F0F, 0xAAAAAAAA, 100, 1000, 12, 0x00FF00FF, 0x80008000, 0x7FFF8000, 64, 63, 0x3F800000, 0xFFFF0000]  # fmt: skip
SPECIAL_F32 = [0.0, -0.0, 1.0, -1.0, 1.5, 2.5, -2.5, 0.5, 1e-45, -1e-45, 1.1754942e-38, 3.4028235e38, -3.4028235e38, float("inf"),
               float("-inf"), float("nan"), 0.1, 1 / 3, 1e10, -1e10, 65504.0, 65520.0, 2**-25, 3.0000002, 127.5, -127.5, 2147483648.0,
               -2147483648.0, 1e-10, 16777217.0, 8388609.5, 0.99999994]  # fmt: skip


def signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def bits_of(x: float) -> int:
    with np.errstate(over="ignore"):
        return int(np.float32(x).view(np.uint32))


def float_of(bits: int) -> float:
    return float(np.uint32(bits).view(np.float32))


class Case(NamedTuple):
    text: str  # of {d}, {a}, {b}, {c}: registers of the widths that `registers` names, e.g. "r", "rd", "f"
    registers: str  # of d, then of a, b, c, separated by spaces
    expect: Callable[..., int | float | None]  # from unsigned numbers, or floats; None: not checked


def integers(name: str, registers: str, expect: Callable[..., int]) -> Case:
    return Case(name, registers, expect)


def truncate(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shift_left(a: int, n: int, bits: int) -> int:
    return a << n if n < bits else 0


def permute(a: int, b: int, c: int) -> int:
    data = [(b << 32 | a) >> 8 * k & 0xFF for k in range(8)]
    out = 0
    for k in range(4):
        selector = c >> 4 * k & 15
        byte = data[selector & 7]
        if selector & 8:
            byte = 0xFF if byte & 0x80 else 0
        out |= byte << 8 * k
    return out


S = signed
CASES = {
    "add.s32": Case("add.s32 {d}, {a}, {b}", "r r r", lambda a, b: a + b),
    "sub.s32": Case("sub.s32 {d}, {a}, {b}", "r r r", lambda a, b: a - b),
    "mul.lo.s32": Case("mul.lo.s32 {d}, {a}, {b}", "r r r", lambda a, b: a * b),
    "mul.hi.u32": Case("mul.hi.u32 {d}, {a}, {b}", "r r r", lambda a, b: a * b >> 32),
    "mul.hi.s32": Case("mul.hi.s32 {d}, {a}, {b}", "r r r", lambda a, b: S(a, 32) * S(b, 32) >> 32),
    "mul.wide.u32": Case("mul.wide.u32 {d}, {a}, {b}", "rd r r", lambda a, b: a * b),
    "mul.wide.s32": Case("mul.wide.s32 {d}, {a}, {b}", "rd r r", lambda a, b: S(a, 32) * S(b, 32)),
    "mul.wide.u16": Case("mul.wide.u16 {d}, {a}, {b}", "r rs rs", lambda a, b: a * b),
    "mad.lo.s32": Case("mad.lo.s32 {d}, {a}, {b}, {c}", "r r r r", lambda a, b, c: a * b + c),
    "mad.wide.s32": Case("mad.wide.s32 {d}, {a}, {b}, {c}", "rd r r rd", lambda a, b, c: S(a, 32) * S(b, 32) + c),
    "mul.lo.s64": Case("mul.lo.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: a * b),
    "mul.hi.u64": Case("mul.hi.u64 {d}, {a}, {b}", "rd rd rd", lambda a, b: a * b >> 64),
    "add.s64": Case("add.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: a + b),
    "sub.s64": Case("sub.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: a - b),
    "div.s32": Case("div.s32 {d}, {a}, {b}", "r r r", lambda a, b: truncate(S(a, 32), S(b, 32)) if b else None),
    "div.u32": Case("div.u32 {d}, {a}, {b}", "r r r", lambda a, b: a // b if b else None),
    "rem.s32": Case("rem.s32 {d}, {a}, {b}", "r r r", lambda a, b: S(a, 32) - truncate(S(a, 32), S(b, 32)) * S(b, 32) if b else None),
    "rem.u32": Case("rem.u32 {d}, {a}, {b}", "r r r", lambda a, b: a % b if b else None),
    "div.s64": Case("div.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: truncate(S(a, 64), S(b, 64)) if b else None),
    "rem.s64": Case("rem.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: S(a, 64) - truncate(S(a, 64), S(b, 64)) * S(b, 64) if b else None),
    "min.s32": Case("min.s32 {d}, {a}, {b}", "r r r", lambda a, b: min(S(a, 32), S(b, 32))),
    "max.s32": Case("max.s32 {d}, {a}, {b}", "r r r", lambda a, b: max(S(a, 32), S(b, 32))),
    "max.u32": Case("max.u32 {d}, {a}, {b}", "r r r", max),
    "min.s64": Case("min.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: min(S(a, 64), S(b, 64))),
    "max.s64": Case("max.s64 {d}, {a}, {b}", "rd rd rd", lambda a, b: max(S(a, 64), S(b, 64))),
    "neg.s32": Case("neg.s32 {d}, {a}", "r r", lambda a: -a),
    "neg.s64": Case("neg.s64 {d}, {a}", "rd rd", lambda a: -a),
    "abs.s32": Case("abs.s32 {d}, {a}", "r r", lambda a: abs(S(a, 32))),
    "and.b32": Case("and.b32 {d}, {a}, {b}", "r r r", lambda a, b: a & b),
    "or.b64": Case("or.b64 {d}, {a}, {b}", "rd rd rd", lambda a, b: a | b),
    "xor.b16": Case("xor.b16 {d}, {a}, {b}", "rs rs rs", lambda a, b: a ^ b),
    "not.b32": Case("not.b32 {d}, {a}", "r r", lambda a: ~a),
    "shl.b32": Case("shl.b32 {d}, {a}, {b}", "r r r", lambda a, b: shift_left(a, b, 32)),
    "shl.b64": Case("shl.b64 {d}, {a}, {b}", "rd rd r", lambda a, b: shift_left(a, b, 64)),
    "shr.u32": Case("shr.u32 {d}, {a}, {b}", "r r r", lambda a, b: a >> min(b, 32)),
    "shr.s32": Case("shr.s32 {d}, {a}, {b}", "r r r", lambda a, b: S(a, 32) >> min(b, 31)),
    "shr.s64": Case("shr.s64 {d}, {a}, {b}", "rd rd r", lambda a, b: S(a, 64) >> min(b, 63)),
    "shr.s16": Case("shr.s16 {d}, {a}, {b}", "rs rs r", lambda a, b: S(a, 16) >> min(b, 15)),
    "shr.u16": Case("shr.u16 {d}, {a}, {b}", "rs rs r", lambda a, b: a >> min(b, 16)),
    "prmt.b32": Case("prmt.b32 {d}, {a}, {b}, {c}", "r r r r", permute),
    "bfi.b32": Case("bfi.b32 {d}, {a}, {b}, 3, 29", "r r r", lambda a, b: (a << 3) | (b & 7)),
    "bfi.b32 of 5 bits": Case("bfi.b32 {d}, {a}, {b}, 11, 5", "r r r", lambda a, b: (a & 31) << 11 | (b & ~(31 << 11))),
    "lop3.b32": Case("lop3.b32 {d}, {a}, {b}, {c}, 0x96", "r r r r", lambda a, b, c: a ^ b ^ c),
    "selp.b32": Case("setp.lt.u32 %p1, {a}, {b};\n selp.b32 {d}, {a}, {b}, %p1", "r r r", min),
    "cvt.s64.s32": Case("cvt.s64.s32 {d}, {a}", "rd r", lambda a: S(a, 32)),
    "cvt.u64.u32": Case("cvt.u64.u32 {d}, {a}", "rd r", lambda a: a),
    "cvt.u32.u64": Case("cvt.u32.u64 {d}, {a}", "r rd", lambda a: a),
    "cvt.u16.u32": Case("cvt.u16.u32 {d}, {a}", "rs r", lambda a: a),
    "cvt.s16.s8": Case("cvt.s16.s8 {d}, {a}", "rs rs", lambda a: S(a, 8)),
    "mov.b64 packs": Case("mov.b64 {d}, {{{a}, {b}}}", "rd r r", lambda a, b: b << 32 | a),
    "mov.b32 splits": Case("mov.b32 {{%rs1, {d}}}, {a}", "rs r", lambda a: a >> 16),
    "setp.ge.s32": Case("setp.ge.s32 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r r r", lambda a, b: S(a, 32) >= S(b, 32)),
    "setp.lt.u32": Case("setp.lt.u32 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r r r", lambda a, b: a < b),
    "setp.gt.s64": Case("setp.gt.s64 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r rd rd", lambda a, b: S(a, 64) > S(b, 64)),
    "setp.eq.s16": Case("setp.eq.s16 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r rs rs", lambda a, b: a == b),
    "xor.pred": Case(
        "setp.lt.u32 %p1, {a}, {b};\n setp.lt.s32 %p2, {a}, {b};\n xor.pred %p3, %p1, %p2;\n selp.u32 {d}, 1, 0, %p3", "r r r",
        lambda a, b: (a < b) != (S(a, 32) < S(b, 32)),
    ),
    "a predicate of one instruction": Case(
        "mov.u32 {d}, 7;\n setp.lt.u32 %p1, {a}, {b};\n @%p1 add.s32 {d}, {a}, 1;\n @!%p1 add.s32 {d}, {b}, 2", "r r r",
        lambda a, b: a + 1 if a < b else b + 2,
    ),
}  # fmt: skip

WORDS = {"rs": 1, "r": 1, "f": 1, "rd": 2}
LOAD = {"rs": "u16", "r": "u32", "f": "f32", "rd": "u64"}
STORE = {"rs": "u16", "r": "u32", "f": "f32", "rd": "u64"}


def operands(registers: str, values: list[int]) -> list[list[int]]:
    """Of each operand, one number a lane: `values` in an order of its own, 64-bit ones from two of them."""
    result = []
    for k, kind in enumerate(registers.split()[1:]):
        low = [values[(lane * (2 * k + 1) + 3 * k) % 32] for lane in range(32)]
        high = [values[(lane * 7 + 5 * k + 1) % 32] for lane in range(32)]
        result.append(
            [h << 32 | v for h, v in zip(high, low)]
            if kind == "rd"
            else [v & 0xFFFF for v in low]
            if kind == "rs"
            else low
        )
    return result


def run_case(machine: Path, folder: Path, case: Case, inputs: list[list[int]]) -> list[int]:
    """The result of each lane. Each operand has 8 bytes of `in` for each lane, the result 8 bytes of `out`."""
    kinds = case.registers.split()
    names = [f"%{kind}{10 + k}" for k, kind in enumerate(kinds)]
    lines = ["ld.param.u64 %rd4, [in];", "mul.wide.u32 %rd5, %r1, 8;", "add.s64 %rd4, %rd4, %rd5;"]
    lines += ["ld.param.u64 %rd6, [out];", "add.s64 %rd6, %rd6, %rd5;"]
    lines += [
        f"ld.global.{LOAD[kind]} {name}, [%rd4+{256 * k}];" for k, (kind, name) in enumerate(zip(kinds[1:], names[1:]))
    ]
    lines.append(case.text.format(d=names[0], **dict(zip("abc", names[1:]))) + ";")
    lines.append(f"st.global.{STORE[kinds[0]]} [%rd6], {names[0]};")
    words = np.array(inputs, np.uint64).reshape(-1).view(np.uint32)
    out = run_text(machine, folder, "".join(f"\t{line}\n" for line in lines), words, 64).out
    width = {"rs": 16, "r": 32, "f": 32, "rd": 64}[kinds[0]]
    return [int(x) & ((1 << width) - 1) for x in out.view(np.uint64)]


@pytest.mark.parametrize("name", CASES)
def test_integers(machine: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    inputs = operands(case.registers, I32)
    divides = name.startswith(("div", "rem"))
    if divides:  # by zero is an error of its own
        inputs[1] = [b or 3 for b in inputs[1]]
    results = run_case(machine, tmp_path, case, inputs)
    width = {"rs": 16, "r": 32, "rd": 64}[case.registers.split()[0]]
    for lane, result in enumerate(results):
        expected = int(case.expect(*(operand[lane] for operand in inputs)))
        assert result == expected & ((1 << width) - 1), [hex(operand[lane]) for operand in inputs]


@pytest.mark.parametrize("name", ["div.s32", "rem.u32", "div.s64"])
def test_a_division_by_zero_is_reported(machine: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    inputs = operands(case.registers, I32)
    inputs[1] = [lane + 1 if lane != 9 else 0 for lane in range(32)]
    with pytest.raises(Failed, match=r"division by zero in lane 9"):
        run_case(machine, tmp_path, case, inputs)


NAN = 0x7FFFFFFF  # the one that PTX's instructions return


def nearest(exact: Fraction | float) -> int:
    """The bits of the float nearest to a number, ties to even."""
    if not isinstance(exact, Fraction):
        return bits_of(exact) if exact == exact else NAN
    if exact == 0:
        return 0
    magnitude = abs(exact)
    exponent = max(int(magnitude.numerator.bit_length() - magnitude.denominator.bit_length()), -126)
    while Fraction(2) ** exponent > magnitude and exponent > -126:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    step = Fraction(2) ** (exponent - 23)
    steps = round(magnitude / step)  # to even
    value = float(steps * step) if steps * step < Fraction(2) ** 128 else float("inf")
    return bits_of(-value if exact < 0 else value)


def downwards(exact: Fraction) -> int:
    bits = nearest(exact)
    value = float_of(bits)
    if value == float("inf"):
        return bits_of(3.4028235e38)
    if value != float("-inf") and Fraction(value) > exact:
        return bits_of(float(np.nextafter(np.float32(value), np.float32(-np.inf))))
    return bits


def of_floats(compute: Callable[..., int]) -> Callable[..., int | None]:
    """Of finite numbers by exact fractions; of others by IEEE arithmetic in double."""

    def expect(*bits: int) -> int | None:
        values = [float_of(b) for b in bits]
        if all(np.isfinite(values)):
            return compute(*(Fraction(v) for v in values))
        return None

    return expect


def ieee(compute: Callable[..., float]) -> Callable[..., int]:
    def expect(*bits: int) -> int:
        with np.errstate(all="ignore"):
            result = compute(*(np.uint32(b).view(np.float32) for b in bits))
        return NAN if result != result else int(np.float32(result).view(np.uint32))

    return expect


def clamp(value: float) -> int:
    return 0 if value != value else int(max(-(2**31), min(2**31 - 1, value)))


def of_two(choose: Callable, a: np.float32, b: np.float32, of_zeros: np.float32) -> np.float32:
    """fmin or fmax, but of two zeros of different signs `of_zeros`."""
    return of_zeros if a == b and np.signbit(a) != np.signbit(b) else choose(a, b)


def widened_half(bits: int) -> int | None:
    is_nan = bits & 0x7C00 == 0x7C00 and bits & 0x3FF
    return None if is_nan else bits_of(struct.unpack("e", struct.pack("H", bits))[0])


def differs_in_order(a: int, b: int) -> bool:
    return float_of(a) < float_of(b) or float_of(a) > float_of(b)


FLOATS = {
    "add.f32": Case("add.f32 {d}, {a}, {b}", "f f f", ieee(lambda a, b: a + b)),
    "sub.f32": Case("sub.f32 {d}, {a}, {b}", "f f f", ieee(lambda a, b: a - b)),
    "mul.f32": Case("mul.f32 {d}, {a}, {b}", "f f f", ieee(lambda a, b: a * b)),
    "div.rn.f32": Case("div.rn.f32 {d}, {a}, {b}", "f f f", ieee(lambda a, b: a / b)),
    "rcp.rn.f32": Case("rcp.rn.f32 {d}, {a}", "f f", ieee(lambda a: np.float32(1) / a)),
    "sqrt.rn.f32": Case("sqrt.rn.f32 {d}, {a}", "f f", ieee(np.sqrt)),
    "fma.rn.f32": Case("fma.rn.f32 {d}, {a}, {b}, {c}", "f f f f", of_floats(lambda a, b, c: nearest(a * b + c) if a * b + c else None)),
    "fma.rm.f32": Case("fma.rm.f32 {d}, {a}, {b}, {c}", "f f f f", of_floats(lambda a, b, c: downwards(a * b + c) if a * b + c else None)),
    "min.f32": Case("min.f32 {d}, {a}, {b}", "f f f", ieee(lambda a, b: of_two(np.fmin, a, b, np.float32(-0.0)))),
    "max.f32": Case("max.f32 {d}, {a}, {b}", "f f f", ieee(lambda a, b: of_two(np.fmax, a, b, np.float32(0.0)))),
    "neg.f32": Case("neg.f32 {d}, {a}", "f f", lambda a: a ^ 0x80000000),
    "abs.f32": Case("abs.f32 {d}, {a}", "f f", lambda a: a & 0x7FFFFFFF),
    "copysign.f32": Case("copysign.f32 {d}, {a}, {b}", "f f f", lambda a, b: (a & 0x80000000) | (b & 0x7FFFFFFF)),
    "cvt.rni.f32.f32": Case("cvt.rni.f32.f32 {d}, {a}", "f f", ieee(np.rint)),
    "cvt.sat.f32.f32": Case("cvt.sat.f32.f32 {d}, {a}", "f f", ieee(lambda a: np.float32(0) if not a > 0 else min(a, np.float32(1)))),
    "cvt.rzi.s32.f32": Case("cvt.rzi.s32.f32 {d}, {a}", "r f", lambda a: clamp(float_of(a))),
    "cvt.rn.f32.s32": Case("cvt.rn.f32.s32 {d}, {a}", "f r", lambda a: nearest(Fraction(S(a, 32)))),
    "cvt.rn.f32.s64": Case("cvt.rn.f32.s64 {d}, {a}", "f rd", lambda a: nearest(Fraction(S(a, 64)))),
    "cvt.rn.f32.s16": Case("cvt.rn.f32.s16 {d}, {a}", "f rs", lambda a: nearest(Fraction(S(a, 16)))),
    "cvt.f32.f16": Case("cvt.f32.f16 {d}, {a}", "f rs", widened_half),
    "setp.lt.f32": Case("setp.lt.f32 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r f f", lambda a, b: float_of(a) < float_of(b)),
    "setp.leu.f32": Case("setp.leu.f32 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r f f", lambda a, b: not float_of(a) > float_of(b)),
    "setp.neu.f32": Case("setp.neu.f32 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r f f", lambda a, b: float_of(a) != float_of(b)),
    "setp.ne.f32": Case("setp.ne.f32 %p1, {a}, {b};\n selp.u32 {d}, 1, 0, %p1", "r f f", differs_in_order),
    "setp.nan.f32": Case("setp.nan.f32 %p1, {a}, {a};\n selp.u32 {d}, 1, 0, %p1", "r f", lambda a: float_of(a) != float_of(a)),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_floats(machine: Path, tmp_path: Path, name: str) -> None:
    case = FLOATS[name]
    rng = np.random.default_rng(1)
    drawn = [
        int(x) for x in (rng.standard_normal(32) * 10.0 ** rng.integers(-30, 30, 32)).astype(np.float32).view(np.uint32)
    ]
    checked = 0
    for values in ([bits_of(x) for x in SPECIAL_F32], drawn):
        inputs = operands(case.registers, values)
        for lane, result in enumerate(run_case(machine, tmp_path, case, inputs)):
            expected = case.expect(*(operand[lane] for operand in inputs))
            if expected is None:
                continue
            checked += 1
            assert result == int(expected) & 0xFFFFFFFF, [hex(operand[lane]) for operand in inputs]
    assert checked >= 24


@pytest.mark.parametrize(
    "text, message",
    [
        ("frobnicate.s32 %r2, %r1, %r1;", r"line \d+: 'frobnicate.s32 %r2, %r1, %r1': the machine does not know frobnicate.s32"),
        ("add.sat.s32 %r2, %r1, %r1;", "the machine does not know add.sat.s32"),
        ("add.s32 %rd9, %r1, %r1;", "its operands are not of the kinds that the machine knows for add.s32"),
        ("mov.u32 %r2, %clock;", "the register %clock is not declared, or a special one that the machine does not know"),
        ("bra $nowhere;", "its label does not exist"),
        ("add.s32 %r2, %r1, %r3;\n st.global.u32 [%rd2], %r2;", r"PTX line \d+: st.global.u32 .*reads a register that nobody has written"),
    ],
)  # fmt: skip
def test_what_it_does_not_know_stops_it(machine: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Failed, match=message):
        run_text(machine, tmp_path, f"\t{text}\n", np.zeros(32, np.uint32), 32)
