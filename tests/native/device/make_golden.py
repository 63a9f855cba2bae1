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


def swizzle(address: int, width: int) -> int:
    """Swizzle<B, 4, 3> of an address in bytes: bits 4.. exchanged by bits 7..; B = 3, 2, 1, 0 for 128, 64, 32 bytes and none."""
    bits = {128: 3, 64: 2, 32: 1, 0: 0}[width]
    return address ^ ((address >> 7 & ((1 << bits) - 1)) << 4)


TENSOR = (6, 20, 40)


def tma_tile(tensor: np.ndarray, first: tuple[int, int, int], box: tuple[int, int, int], width: int) -> np.ndarray:
    """The box as 16-bit codes in the order in which they lie in shared memory; zeros outside the tensor."""
    tile = np.zeros(box[0] * box[1] * box[2], np.uint16)
    for z in range(box[0]):
        for y in range(box[1]):
            for x in range(box[2]):
                at = (first[0] + z, first[1] + y, first[2] + x)
                if all(0 <= i < n for i, n in zip(at, TENSOR)):
                    tile[swizzle(((z * box[1] + y) * box[2] + x) * 2, width) // 2] = tensor[at]
    return tile


def tma_load(rng: np.random.Generator, row: int, width: int, first: int) -> tuple[list[int], list[int]]:
    tensor = rng.integers(1, 1 << 16, TENSOR, dtype=np.uint16)
    tile = tma_tile(tensor, (4, 15, first), (2, 8, row), width)
    return tensor.reshape(-1).view(np.uint32).tolist(), tile.view(np.uint32).tolist()


def tma_store(rng: np.random.Generator, add: bool) -> tuple[list[int], list[int]]:
    numbers = rng.integers(-60, 60, TENSOR)
    tensor = np.vectorize(bf16)(numbers).astype(np.uint16)
    out, tile, box = tensor.copy(), tensor.reshape(-1)[:512], (2, 8, 32)
    for z in range(2):
        for y in range(8):
            for x in range(32):
                at = (4 + z, 15 + y, 16 + x)
                if all(i < n for i, n in zip(at, TENSOR)):
                    code = tile[swizzle(((z * box[1] + y) * box[2] + x) * 2, 64) // 2]
                    value = float(np.uint32(int(code) << 16).view(np.float32))
                    out[at] = bf16(numbers[at] + value) if add else code
    return tensor.reshape(-1).view(np.uint32).tolist(), out.reshape(-1).view(np.uint32).tolist()


def mbarrier(rng: np.random.Generator) -> tuple[list[int], list[int]]:
    values = [int(x) for x in rng.integers(1, 1000, 64)]
    return values, [x * (1 + 2 + 3 + 4 + 5) for x in values]


def canonical(x: int, k: int, mn_major: bool, width: int, leading: int, stride: int) -> int:
    """Address in bytes of element (x, k), x of m or n, by the canonical layouts of wgmma's operands, in CuTe's notation, in elements:

    K-major   Swizzle o ((8, m), (T, 2k)) : ((w T, SBO), (1, T))
    MN-major  Swizzle o ((T, w, m), (8, k)) : ((1, T, LBO), (w T, SBO))

    T = 8 (numbers in 16 bytes), w = width / 16, a mode (a, b) : (c, d) of an index i being (i % a) * c + (i // a) * d.
    """
    T, w, LBO, SBO = 8, width // 16, leading // 2, stride // 2
    if mn_major:
        offset = x % T * 1 + x // T % w * T + x // (T * w) * LBO + k % 8 * (w * T) + k // 8 * SBO
    else:
        offset = x % 8 * (w * T) + x // 8 * SBO + k % T * 1 + k // T * T
    return swizzle(offset * 2, width)


def wgmma(
    rng: np.random.Generator, code, n: int, a_major: str, b_major: str, width: int, strides: tuple[int, int, int, int]
) -> tuple[list[int], list[int]]:
    """a_major: k, m, or r for registers; b_major: k or n. strides: leading and stride bytes of a, then of b."""
    a, b = rng.integers(-9, 10, (64, 16)), rng.integers(-9, 10, (16, n))
    c = rng.integers(-99, 100, (64, n))
    d = a @ b + c
    image = np.full(6144 * 2, 0xFFFF, np.uint16)  # NaN where nothing lies
    for k in range(16):
        for x in range(64 if a_major != "r" else 0):
            image[canonical(x, k, a_major == "m", width, *strides[:2]) // 2] = code(a[x, k])
        for x in range(n):
            image[(8192 + canonical(x, k, b_major == "n", width, *strides[2:])) // 2] = code(b[k, x])
    registers, accumulators, out = [], [], []
    for thread in range(128):
        warp, group, pair = thread // 32, thread % 32 >> 2, thread % 4
        elements = []
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            elements.append(code(a[16 * warp + row, pair * 2 + (i & 1) + (8 if i >= 4 else 0)]))
        registers += [low | high << 16 for low, high in zip(elements[::2], elements[1::2])]
        for i in range(n // 2):
            # row = groupID for i % 4 < 2, groupID + 8 otherwise; col = 8 * (i // 4) + threadID_in_group * 2 + (i & 1)
            at = 16 * warp + group + (0 if i % 4 < 2 else 8), 8 * (i // 4) + pair * 2 + (i & 1)
            accumulators.append(f32(c[at]))
            out.append(f32(d[at]))
    return [*strides, *image.view(np.uint32).tolist(), *registers, *accumulators], out


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


def golden_hopper() -> dict[str, tuple[list[int], list[int]]]:
    """Too large for a file: made when the tests run."""
    rng = np.random.default_rng(20260102)
    return {
        "tma_load_128": tma_load(rng, 32, 128, 0),
        "tma_load_64": tma_load(rng, 32, 64, 24),
        "tma_load_32": tma_load(rng, 16, 32, 8),
        "tma_load_none": tma_load(rng, 8, 0, 32),
        "tma_store": tma_store(rng, False),
        "tma_add": tma_store(rng, True),
        "mbarrier": mbarrier(rng),
        "wgmma_k_k_128": wgmma(rng, bf16, 64, "k", "k", 128, (0, 1024, 0, 1024)),
        "wgmma_m_n_128": wgmma(rng, f16, 128, "m", "n", 128, (0, 1024, 2048, 1024)),
        "wgmma_k_n_64": wgmma(rng, f16, 64, "k", "n", 64, (0, 512, 1024, 512)),
        "wgmma_m_k_32": wgmma(rng, bf16, 32, "m", "k", 32, (512, 256, 0, 256)),
        "wgmma_r_k_128": wgmma(rng, bf16, 96, "r", "k", 128, (0, 0, 0, 1024)),
        "wgmma_r_n_128": wgmma(rng, f16, 64, "r", "n", 128, (0, 0, 2048, 1024)),
    }


def text() -> str:
    lines = []
    for name, (inputs, outputs) in golden().items():
        for kind, words in (("in", inputs), ("out", outputs)):
            lines.append(f"{name} {kind}")
            lines += [" ".join(f"{w:08x}" for w in words[i : i + 16]) for i in range(0, len(words), 16)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(text(), end="")
