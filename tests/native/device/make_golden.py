"""Writes golden.txt: inputs and outputs of the device layer's functions, as the tables of the PTX ISA give them.

No code is shared with the emulator or the kernels: each fragment is looked up element by element with the formulas of the sections
"Matrix Fragments for mma.m16n8k16 with floating point type", "Matrix Fragments for mma.m16n8k8" and "ldmatrix". The matrices hold
small whole numbers, so that the products are exact in any order of summation.

    python make_golden.py > golden.txt
"""

from __future__ import annotations

import numpy as np

LANES = range(32)


def bf16(x: float) -> int:
    return int(np.float32(x).view(np.uint32)) >> 16


def f16(x: float) -> int:
    return int(np.float16(x).view(np.uint16))


def f32(x: float) -> int:
    return int(np.float32(x).view(np.uint32))


def mma_m16n8k16(rng: np.random.Generator, code) -> tuple[list[int], list[int]]:
    a, b, c = rng.integers(-9, 10, (16, 16)), rng.integers(-9, 10, (16, 8)), rng.integers(-99, 100, (16, 8))
    d = a @ b + c
    words: dict[str, list[int]] = {"a": [], "b": [], "c": [], "d": []}
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        elements = []
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            col = thread * 2 + (i & 1) if i < 4 else thread * 2 + (i & 1) + 8
            elements.append(code(a[row, col]))
        words["a"] += [low | high << 16 for low, high in zip(elements[::2], elements[1::2])]
        elements = []
        for i in range(4):
            row = thread * 2 + (i & 1) if i < 2 else thread * 2 + (i & 1) + 8
            elements.append(code(b[row, group]))
        words["b"] += [low | high << 16 for low, high in zip(elements[::2], elements[1::2])]
        for i in range(4):
            row, col = (group if i < 2 else group + 8), thread * 2 + (i & 1)
            words["c"].append(f32(c[row, col]))
            words["d"].append(f32(d[row, col]))
    return words["a"] + words["b"] + words["c"], words["d"]


def mma_m16n8k8_tf32(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    a, b, c = rng.integers(-999, 1000, (16, 8)), rng.integers(-999, 1000, (8, 8)), rng.integers(-99, 100, (16, 8))
    d = a @ b + c
    words: dict[str, list[int]] = {"a": [], "b": [], "c": [], "d": []}
    for lane in LANES:
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            row = group if i in (0, 2) else group + 8
            col = thread if i in (0, 1) else thread + 4
            words["a"].append(f32(a[row, col]))
        for i in range(2):
            words["b"].append(f32(b[thread if i == 0 else thread + 4, group]))
        for i in range(4):
            row, col = (group if i < 2 else group + 8), thread * 2 + (i & 1)
            words["c"].append(f32(c[row, col]))
            words["d"].append(f32(d[row, col]))
    return words["a"] + words["b"] + words["c"], words["d"]


def ldmatrix(rng: np.random.Generator, count: int, transposed: bool) -> tuple[list[int], list[int]]:
    rows = rng.integers(0, 1 << 16, (32, 8))  # of shared memory, 16 bytes each
    address = rng.permutation(32)  # the row that each lane points to
    out = []
    for lane in LANES:
        for matrix in range(count):
            # Threads 8m..8m+7 hold the addresses of the rows of matrix m.
            m = np.array([rows[address[8 * matrix + r]] for r in range(8)])
            if transposed:
                m = m.T
            # Thread 4r + t gets elements 2t and 2t + 1 of row r.
            low, high = m[lane // 4, 2 * (lane % 4)], m[lane // 4, 2 * (lane % 4) + 1]
            out.append(int(low) | int(high) << 16)
    shared = [int(r[2 * i]) | int(r[2 * i + 1]) << 16 for r in rows for i in range(4)]
    return shared + [int(x) for x in address], out


def warp(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    value = [int(x) for x in rng.integers(1, 1000000, 32)]
    ballot = sum(1 << lane for lane in LANES if value[lane] % 3 == 0)
    out = []
    for lane in LANES:
        out += [
            value[lane ^ 5],
            value[(lane * 7 + 3) % 32],
            value[lane + 3] if lane + 3 < 32 else value[lane],
            value[lane - 2] if lane >= 2 else value[lane],
            value[lane ^ 1] ^ 0xFFFFFFFF,
            ballot,
            0,
            1,
            0,
        ]
    return value, out


def cp_async(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    words = [int(x) for x in rng.integers(1, 1 << 32, 128)]
    sixteen = [0 if i // 4 % 3 == 2 else words[i] for i in range(128)]
    eight = [0 if i // 2 % 3 == 2 else words[i] for i in range(64)]
    four = [0 if i % 3 == 2 else words[i] for i in range(32)]
    return words, sixteen + eight + four + words[:-33:-1]


def memory(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    words = rng.integers(0, 1 << 32, 256, dtype=np.uint32)
    out = np.full(256, 0xDEADBEEF, np.uint32)
    for first, size in ((0, 1), (64, 2), (128, 4), (256, 8), (512, 16)):
        out.view(np.uint8)[first : first + 32 * size] = words.view(np.uint8)[first : first + 32 * size]
    return words.tolist(), out.tolist()


def sums(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    values = rng.integers(-50, 50, 512)
    return [f32(x) for x in values], [f32(values.sum())] * 2


def chain(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    values = rng.integers(1, 1000, 4)
    return values.tolist(), np.cumsum(values).tolist()


def named_barriers(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    values = [int(x) for x in rng.integers(1, 1000, 64)]
    return values, [values[63 - i] * (1 + 2 + 3) for i in range(64)]


def golden() -> dict[str, tuple[list[int], list[int]]]:
    rng = np.random.default_rng(20260101)
    cases = {
        "mma_bf16": mma_m16n8k16(rng, bf16),
        "mma_f16": mma_m16n8k16(rng, f16),
        "mma_tf32": mma_m16n8k8_tf32(rng),
    }
    for count in (4, 2):
        for transposed in (False, True):
            cases[f"ldmatrix_x{count}{'_trans' if transposed else ''}"] = ldmatrix(rng, count, transposed)
    for case in (warp, cp_async, memory, sums, chain, named_barriers):
        cases[case.__name__] = case(rng)
    return cases


def text() -> str:
    lines = []
    for name, (inputs, outputs) in golden().items():
        for kind, words in (("in", inputs), ("out", outputs)):
            lines.append(f"{name} {kind}")
            lines += [" ".join(f"{w:08x}" for w in words[i : i + 16]) for i in range(0, len(words), 16)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")
