"""Attention cases, for the tests: a frozen description, and the tensors made from it by a seed."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def repro(case: AttentionCase | VarlenCase, check: str, seed: int, backend: str) -> str:
    """A shell line that runs `check` ("module.function") again on this case alone."""
    module, function = check.split(".")
    code = (
        f"import torch; from cases import *; from {module} import {function}; {function}({case}, {seed}, '{backend}')"
    )
    return f'PYTHONPATH=python:tests/support:tests/ops python -c "{code}"'


DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}


@dataclass(frozen=True)
class AttentionCase:
    """One call of foveate.attention. `bias` and `mask` name their dims by b, h, q, k, and 1 for a broadcast one."""

    b: int = 2
    sq: int = 33
    skv: int = 33
    hq: int = 4
    hkv: int = 4
    d: int = 32
    dv: int | None = None  # None: d
    dtype: torch.dtype = torch.float32
    causal: bool = False
    window: tuple[int, int] | None = None
    scale: float | None = None
    softcap: float | None = None
    bias: str | None = None  # "bhqk", "1h1k", "qk", ...
    mask: str | None = None
    alibi: str | None = None  # "h" or "bh"
    relative: str | None = None  # "bidirectional" or "backward"
    sinks: bool = False
    kv_lens: bool = False
    dropout: float = 0.0
    layout: str = "bshd"  # or "bhsd" transposed

    @property
    def id(self) -> str:
        """Readable and short: the shape, then whatever differs from the defaults."""
        dims = f"b{self.b}-{self.sq}x{self.skv}-h{self.hq}x{self.hkv}-d{self.d}"
        if self.dv not in (None, self.d):
            dims += f"x{self.dv}"
        parts = [dims, DTYPE_NAMES[self.dtype]]
        for field in dataclasses.fields(self)[8:]:
            value = getattr(self, field.name)
            if value == field.default:
                continue
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts.append(field.name if value is True else f"{field.name}:{text}")
        return "-".join(parts)

    def __str__(self) -> str:
        """The constructor call that makes this case."""
        changed = [f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return f"AttentionCase({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @property
    def neighbour(self) -> AttentionCase:
        """This case or, where a softmax over one key makes plain arithmetic exact, one that sees a few more keys."""
        window = self.window and tuple(side if side < 0 else max(side, 2) for side in self.window)
        return dataclasses.replace(self, sq=max(self.sq, 4), skv=max(self.skv, 4), window=window)

    def make_inputs(self, seed: int, device: str = "cpu") -> AttentionInputs:
        return make_inputs(self, seed, device)


@dataclass
class AttentionInputs:
    """The tensors of a case; an option that the case leaves out is None."""

    case: AttentionCase
    seed: int
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    table: Tensor | None = None
    sinks: Tensor | None = None
    kv_lens: Tensor | None = None
    cu_seqlens: tuple[Tensor, Tensor] | None = None  # of q and of k, for packed sequences: then q is [total_q, Hq, D]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The differentiable inputs by name."""
        names = ("q", "k", "v", "bias", "table", "sinks")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same values in another dtype, with leaves that have no history. ALiBi slopes stay fp32."""
        return self.replace(**{name: x.detach().to(dtype) for name, x in self.leaves.items()})

    def replace(self, **tensors: Any) -> AttentionInputs:
        return dataclasses.replace(self, **tensors)

    def requires_grad(self) -> AttentionInputs:
        return self.replace(**{name: x.detach().requires_grad_() for name, x in self.leaves.items()})

    def options(self) -> dict[str, Any]:
        """Keyword arguments of foveate.attention, with a fresh generator of the same seed each time."""
        import foveate

        case = self.case
        relative = None
        if self.table is not None:
            relative = foveate.RelativeBias(
                self.table, bidirectional=case.relative == "bidirectional", max_distance=MAX_DISTANCE
            )
        batched = {"bias": self.bias, "mask": self.mask, "kv_lens": self.kv_lens}
        return (batched if self.cu_seqlens is None else {}) | {
            "causal": case.causal,
            "window": case.window,
            "scale": case.scale,
            "softcap": case.softcap,
            "alibi_slopes": self.alibi_slopes,
            "relative_bias": relative,
            "sinks": self.sinks,
            "dropout_p": case.dropout,
            "generator": torch.Generator(self.q.device).manual_seed(self.seed) if case.dropout else None,
        }

    def run(self, backend: str | None, **more: Any) -> tuple[Tensor, Tensor]:
        """out and lse of the public function."""
        import foveate

        options = self.options() | {"return_lse": True, "backend": backend} | more
        if self.cu_seqlens is None:
            return foveate.attention(self.q, self.k, self.v, **options)
        longest = [int(cu.diff().max()) for cu in self.cu_seqlens]
        return foveate.attention_varlen(self.q, self.k, self.v, *self.cu_seqlens, *longest, **options)

    def reference_options(self) -> dict[str, Any]:
        """Keyword arguments of foveate.backend.reference.attention.attention. Its dropout words are unrelated to those of `options`."""
        case = self.case
        batched = {"bias": self.bias, "mask": self.mask, "kv_lens": self.kv_lens}
        return (batched if self.cu_seqlens is None else {}) | {
            "causal": case.causal,
            "window": case.window or (-1, -1),
            "scale": case.d**-0.5 if case.scale is None else case.scale,
            "softcap": case.softcap or 0.0,
            "alibi_slopes": self.alibi_slopes,
            "rel_table": self.table,
            "rel_bidirectional": case.relative == "bidirectional",
            "rel_max_distance": MAX_DISTANCE,
            "sinks": self.sinks,
            "dropout_p": case.dropout,
            "philox": torch.tensor([self.seed, 0], device=self.q.device),
        }


MAX_DISTANCE = 40  # small, so that every bucket of the table is met at the lengths of the tests
NUM_BUCKETS = 16


def make_inputs(case: AttentionCase, seed: int, device: str = "cpu") -> AttentionInputs:
    """Random tensors for a case. With kv_lens and b >= 3 one sequence is empty; with a mask one query sees no key."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"b": case.b, "h": case.hq, "q": case.sq, "k": case.skv, "1": 1}

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def tokens(length: int, heads: int, dim: int) -> Tensor:
        if case.layout == "bhsd":
            return normal(case.b, heads, length, dim).transpose(1, 2)
        return normal(case.b, length, heads, dim)

    dv = case.d if case.dv is None else case.dv
    inputs = AttentionInputs(
        case, seed, tokens(case.sq, case.hq, case.d), tokens(case.skv, case.hkv, case.d), tokens(case.skv, case.hkv, dv)
    )
    if case.bias:
        inputs.bias = normal(*(sizes[letter] for letter in case.bias))
    if case.mask:
        mask = torch.rand(*(sizes[letter] for letter in case.mask), generator=generator) < 0.7
        if "q" in case.mask and case.sq:
            mask.select(case.mask.index("q"), case.sq // 2).fill_(False)
        inputs.mask = mask.to(device)
    if case.alibi:
        inputs.alibi_slopes = normal(*(sizes[letter] for letter in case.alibi), dtype=torch.float32).abs() * 0.2
    if case.relative:
        inputs.table = normal(NUM_BUCKETS, case.hq)
    if case.sinks:
        inputs.sinks = normal(case.hq)
    if case.kv_lens:
        lens = torch.randint(0, case.skv + 1, (case.b,), generator=generator, dtype=torch.int32)
        lens[0] = case.skv // 2 + case.skv % 2
        if case.b >= 3:
            lens[1] = 0
        inputs.kv_lens = lens.to(device)
    return inputs


_C = AttentionCase
_OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"window": (5, 3)},
    {"window": (0, 0)},
    {"window": (-1, 4)},
    {"window": (7, -1), "causal": True},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"bias": "bhqk"},
    {"bias": "1h1k"},
    {"bias": "b1q1"},
    {"bias": "qk"},
    {"bias": "1111"},
    {"mask": "bhqk"},
    {"mask": "b11k"},
    {"mask": "qk"},
    {"alibi": "h"},
    {"alibi": "bh"},
    {"relative": "bidirectional"},
    {"relative": "backward", "causal": True},
    {"sinks": True},
    {"kv_lens": True, "b": 3},
    {"dropout": 0.3},
]
# Each option alone, with more keys than queries so that a wrong alignment shows.
SINGLE_OPTION = [_C(sq=37, skv=70, hkv=2, **options) for options in _OPTIONS]

COMBINED = [
    _C(b=3, sq=45, skv=45, hkv=2, causal=True, kv_lens=True, window=(9, -1)),
    _C(b=3, sq=21, skv=77, hq=6, hkv=2, causal=True, kv_lens=True, alibi="bh", sinks=True),
    _C(b=3, sq=50, skv=19, causal=True, kv_lens=True, relative="backward", softcap=5.0),
    _C(sq=64, skv=64, hq=8, hkv=1, relative="bidirectional", mask="b11k", dropout=0.1),
    _C(sq=31, skv=66, softcap=3.0, bias="1h1k", mask="11qk", sinks=True, window=(20, 2)),
    _C(sq=40, skv=40, alibi="h", bias="b1qk", relative="bidirectional", causal=True),
    _C(b=3, sq=29, skv=90, kv_lens=True, bias="bhqk", mask="b1qk", dropout=0.5, causal=True, sinks=True),
    _C(sq=128, skv=65, hkv=2, causal=True, sinks=True, dropout=0.2, layout="bhsd"),
]

ODD_LENGTHS = [(1, 1), (113, 203), (239, 1), (3, 799), (257, 256), (1, 1000), (64, 64), (65, 63)]
SHAPES = [_C(b=1, sq=sq, skv=skv, hq=2, hkv=1, causal=causal) for sq, skv in ODD_LENGTHS for causal in (False, True)]
EMPTY = [
    _C(b=0),
    _C(sq=0),
    _C(skv=0),
    _C(sq=0, skv=0, causal=True, sinks=True),
    _C(skv=0, bias="1h1k", relative="bidirectional", dropout=0.1, kv_lens=True),
]
HEAD_DIMS = [_C(sq=19, skv=35, hq=2, hkv=1, d=d, causal=True) for d in (8, 16, 40, 64, 72, 80, 96, 128, 192, 256)]
# The native CPU kernels' alone: diffusion's VAE has one head of 512, MLA 576 and 512.
WIDE_HEAD_DIMS = [
    _C(sq=19, skv=35, hq=2, hkv=1, d=d, dv=dv, causal=True, dtype=dtype)
    for d, dv in ((264, 264), (320, 320), (512, 512), (576, 512), (64, 576))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
] + [_C(b=1, sq=130, skv=260, hq=1, hkv=1, d=512, bias="1h1k", dropout=0.2)]
VALUE_DIMS = [
    _C(sq=19, skv=35, hq=2, hkv=1, d=d, dv=dv) for d, dv in ((192, 128), (64, 128), (16, 256), (256, 8), (40, 72))
]
HEADS = [_C(sq=9, skv=41, hq=hq, hkv=hkv, causal=True) for hq, hkv in ((1, 1), (7, 1), (6, 3), (16, 2))]
DTYPES = [
    _C(sq=70, skv=133, hkv=2, d=64, dtype=dtype, causal=causal, layout=layout)
    for dtype in (torch.bfloat16, torch.float16, torch.float64)
    for causal, layout in ((False, "bshd"), (True, "bhsd"))
]
HALF_OPTIONS = [
    dataclasses.replace(case, dtype=dtype)
    for case in COMBINED
    for dtype in ((torch.bfloat16, torch.float16) if case.sinks else (torch.bfloat16,))
]

# On the CPU the decode kernel's, which reads bias and mask by the tile of keys.
FEW_QUERIES = [
    _C(sq=1, skv=203, hq=8, hkv=2, mask="b11k"),
    _C(sq=3, skv=130, mask="bhqk", bias="1h1k", causal=True),
    _C(b=3, sq=2, skv=77, hkv=1, kv_lens=True, mask="b1qk", bias="bhqk", softcap=3.0, sinks=True),
    _C(sq=1, skv=301, d=64, mask="11q1", alibi="h", window=(99, -1)),
    _C(sq=1, skv=301, hq=8, hkv=2, d=64, mask="b11k", bias="b1q1", dtype=torch.bfloat16),
    _C(sq=2, skv=150, d=40, mask="1hqk", bias="qk", dtype=torch.float16),
]

ATTENTION_CASES = [
    *SINGLE_OPTION,
    *COMBINED,
    *SHAPES,
    *FEW_QUERIES,
    *HEAD_DIMS,
    *VALUE_DIMS,
    *HEADS,
    *DTYPES,
    *HALF_OPTIONS,
]
# The fp32 cases once more: on a GPU the kernels of 16-bit types are others, with branches of their own.
BF16_CASES = [
    case
    for case in (dataclasses.replace(c, dtype=torch.bfloat16) for c in ATTENTION_CASES if c.dtype == torch.float32)
    if case not in ATTENTION_CASES
]


def random_cases(n: int, seed: int) -> list[AttentionCase]:
    """n cases with shapes, dtypes and options drawn from a seed."""
    rng = random.Random(seed)

    def sometimes(*values: Any, p: float = 0.25) -> Any:
        return rng.choice(values) if rng.random() < p else None

    cases = []
    for _ in range(n):
        hkv = rng.choice([1, 1, 2, 3])
        length = rng.choice([1, 2, 7, 16, 31, 64, 100, 129, 300])
        # A square case exercises the tile-aligned paths, an arbitrary one the alignment of causal and window.
        sq, skv = (length, length) if rng.random() < 0.3 else (rng.randint(1, 140), rng.randint(1, 300))
        d = rng.randrange(8, 137, 8)
        window = sometimes((rng.randint(-1, 60), rng.randint(-1, 60)))
        bias_dims = "".join(letter if rng.random() < 0.6 else "1" for letter in "bhqk")
        mask_dims = "".join(letter if rng.random() < 0.6 else "1" for letter in "bhqk")
        cases.append(
            AttentionCase(
                b=rng.randint(1, 3),
                sq=sq,
                skv=skv,
                hq=hkv * rng.choice([1, 2, 4]),
                hkv=hkv,
                d=d,
                dv=sometimes(rng.randrange(8, 137, 8)),
                dtype=rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
                causal=rng.random() < 0.5,
                window=window,
                scale=sometimes(0.2, 0.05),
                softcap=sometimes(1.5, 20.0),
                bias=sometimes(bias_dims),
                mask=sometimes(mask_dims),
                alibi=sometimes("h", "bh"),
                relative=sometimes("bidirectional", "backward"),
                sinks=rng.random() < 0.25,
                kv_lens=rng.random() < 0.35,
                dropout=sometimes(0.1, 0.5) or 0.0,
                layout=rng.choice(["bshd", "bshd", "bhsd"]),
            )
        )
    return cases


@dataclass(frozen=True)
class VarlenCase:
    """One call of foveate.attention_varlen: the lengths of the packed sequences, and the options of `case`."""

    lens_q: tuple[int, ...]
    lens_k: tuple[int, ...]
    case: AttentionCase = AttentionCase()

    @property
    def id(self) -> str:
        return f"q{'_'.join(map(str, self.lens_q))}-k{'_'.join(map(str, self.lens_k))}-{self.case.id}"

    @property
    def neighbour(self) -> VarlenCase:
        return self

    def make_inputs(self, seed: int, device: str = "cpu") -> AttentionInputs:
        """Packed inputs: q [total_q, Hq, D] and so on, with cu_seqlens."""
        packed = dataclasses.replace(self.case, b=1, sq=sum(self.lens_q), skv=sum(self.lens_k), alibi=None)
        inputs = make_inputs(packed, seed, device)
        slopes = None
        if self.case.alibi:
            slopes = torch.linspace(0.05, 0.4, len(self.lens_q) * self.case.hq, device=device).view(-1, self.case.hq)
            slopes = slopes if self.case.alibi == "bh" else slopes[0].contiguous()
        cu_seqlens = tuple(
            torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32) for lens in (self.lens_q, self.lens_k)
        )
        return inputs.replace(
            case=self.case, q=inputs.q[0], k=inputs.k[0], v=inputs.v[0], alibi_slopes=slopes, cu_seqlens=cu_seqlens
        )


_RAGGED = ((5, 1, 64, 0, 33), (9, 40, 64, 3, 20))
VARLEN_CASES = [
    VarlenCase((16, 16), (16, 16)),
    VarlenCase(*_RAGGED),
    VarlenCase((7,), (100,), _C(causal=True, hkv=1)),
    VarlenCase((0, 3, 0), (4, 0, 5), _C(sinks=True)),
    VarlenCase(*_RAGGED, _C(causal=True, hkv=2, d=64, dv=40)),
    VarlenCase(*_RAGGED, _C(window=(6, 2), softcap=4.0, sinks=True)),
    VarlenCase(*_RAGGED, _C(alibi="bh", causal=True)),
    VarlenCase(*_RAGGED, _C(alibi="h", scale=0.2)),
    VarlenCase(*_RAGGED, _C(relative="bidirectional", hkv=2)),
    VarlenCase(*_RAGGED, _C(relative="backward", causal=True, dropout=0.3, hkv=2)),
    VarlenCase(*_RAGGED, _C(dtype=torch.bfloat16, causal=True, hkv=1, d=64)),
    VarlenCase(*_RAGGED, _C(dtype=torch.float16, window=(10, 10), sinks=True, dropout=0.2)),
]
