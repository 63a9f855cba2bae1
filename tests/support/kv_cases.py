"""Cases of attention_with_kv_cache, the exact result of a case, and PyTorch's own in the same dtype."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import compare
import foveate
import poison
from foveate.backend.reference import attention as reference
from foveate.bench.tolerance import attention_forward_floors, largest

F32, BF16, F16, I8, F8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn
LIMIT = {I8: 127.0, F8: 448.0}


@dataclasses.dataclass(frozen=True)
class KvCase:
    b: int = 2
    sq: int = 1
    snew: int | None = None  # None: sq with new, 0 without
    new: bool = True
    hq: int = 4
    hkv: int = 2
    d: int = 32
    dv: int | None = None
    longest: int = 90  # keys before the append; the sequences have random lengths up to it
    page_size: int | None = None
    dtype: torch.dtype = F32
    storage: torch.dtype | None = None
    scale_kind: str = "token"  # token, head, number or float
    rotary: int | None = None  # pairs
    rotary_dtype: torch.dtype = F32
    interleaved: bool = False
    causal: bool = True
    window: tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    alibi: str | None = None  # "h" or "bh"
    sinks: bool = False
    num_splits: int = 0
    batch_invariant: bool = False
    lens_dtype: torch.dtype = torch.int32

    @property
    def id(self) -> str:
        default = KvCase()
        changed = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self)]
        parts = [f"{name}={value}".replace("torch.", "") for name, value in changed if value != getattr(default, name)]
        return "-".join(parts).replace(" ", "") or "default"

    @property
    def new_tokens(self) -> int:
        return 0 if not self.new else self.sq if self.snew is None else self.snew


@dataclasses.dataclass
class KvInputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    options: dict[str, Any]

    def clone(self) -> KvInputs:
        copied = {name: x.clone() if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return KvInputs(self.q.clone(), self.k_cache.clone(), self.v_cache.clone(), copied)

    def run(self, backend: str | None = None) -> tuple[Tensor, Tensor]:
        return foveate.attention_with_kv_cache(
            self.q, self.k_cache, self.v_cache, **self.options, return_lse=True, backend=backend
        )


def bits(x: Tensor) -> Tensor:
    """To compare NaN and fp8 too."""
    return x.contiguous().view(torch.uint8)


def random_cache(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> tuple[Tensor, Any]:
    """Cache contents and the scale option."""
    x = torch.randn(shape)
    if dtype not in LIMIT:
        return x.to(dtype), None
    scale = {
        "token": x.abs().amax(-1) / LIMIT[dtype],
        "head": torch.linspace(0.5, 1.5, shape[2]) * 5 / LIMIT[dtype],
        "number": torch.tensor(5 / LIMIT[dtype]),
        "float": 5 / LIMIT[dtype],
    }[kind]
    x = (x / torch.as_tensor(scale)[..., None]).clamp(-LIMIT[dtype], LIMIT[dtype])
    return (x.round() if dtype == I8 else x).to(dtype), scale


def make_kv_inputs(case: KvCase, seed: int = 0) -> KvInputs:
    torch.manual_seed(seed)
    dv = case.d if case.dv is None else case.dv
    capacity, storage = case.longest + case.new_tokens + 3, case.storage or case.dtype
    lowest = case.sq if case.rotary and not case.new else 0
    lens = torch.randint(lowest, case.longest + 1, (case.b,), dtype=case.lens_dtype)
    lens[:1] = case.longest  # at least one full one
    table = None
    shape = (case.b, capacity, case.hkv)
    if case.page_size is not None:
        max_pages = -(-capacity // case.page_size)
        pages = case.b * max_pages + 2
        table = torch.randperm(pages)[: case.b * max_pages].view(case.b, max_pages).to(torch.int32)
        shape = (pages, case.page_size, case.hkv)
    k_cache, k_scale = random_cache((*shape, case.d), storage, case.scale_kind)
    v_cache, v_scale = random_cache((*shape, dv), storage, case.scale_kind)
    options: dict[str, Any] = {"kv_lens": lens, "block_table": table, "k_scale": k_scale, "v_scale": v_scale}
    if case.new:
        options["k"] = torch.randn(case.b, case.new_tokens, case.hkv, case.d).to(case.dtype)
        options["v"] = torch.randn(case.b, case.new_tokens, case.hkv, dv).to(case.dtype)
    if case.rotary:
        angle = torch.rand(capacity + case.sq, case.rotary) * 6.28
        options["rotary_cos"], options["rotary_sin"] = (
            angle.cos().to(case.rotary_dtype),
            angle.sin().to(case.rotary_dtype),
        )
        options["rotary_interleaved"] = case.interleaved
    if case.alibi:
        options["alibi_slopes"] = torch.rand((case.b, case.hq) if case.alibi == "bh" else (case.hq,))
    if case.sinks:
        options["sinks"] = torch.randn(case.hq)
    for name in ("causal", "window", "softcap", "scale", "num_splits", "batch_invariant"):
        options[name] = getattr(case, name)
    return KvInputs(torch.randn(case.b, case.sq, case.hq, case.d).to(case.dtype), k_cache, v_cache, options)


def _reference_options(options: dict[str, Any], d: int) -> dict[str, Any]:
    options = {name: x for name, x in options.items() if name not in ("num_splits", "batch_invariant")}
    options["window"] = options["window"] or (-1, -1)
    options["scale"] = d**-0.5 if options["scale"] is None else options["scale"]
    options["softcap"] = options["softcap"] or 0.0
    return options


def exact(inputs: KvInputs) -> tuple[Tensor, Tensor]:
    """The definition in fp64, with the new keys and values rounded as the cache rounds them."""
    inputs = inputs.clone()
    options = _reference_options(inputs.options, inputs.q.shape[-1])
    # Append in the real dtypes, so that what the cache holds is what every backend must hold; then attend in fp64 without k and v.
    reference.attention_with_kv_cache(inputs.q, inputs.k_cache, inputs.v_cache, **options)
    new = 0 if "k" not in options else options["k"].shape[1]
    q = inputs.q.double()
    if "rotary_cos" in options:
        first = options["kv_lens"] - (0 if "k" in options else q.shape[1])
        turned = [
            reference.rotate(
                q[b : b + 1],
                *(options[name][n : n + q.shape[1]] for name in ("rotary_cos", "rotary_sin")),
                options["rotary_interleaved"],
            )
            for b, n in enumerate(first.tolist())
        ]
        q = torch.cat(turned)
    rest = {name: x for name, x in options.items() if not name.startswith("rotary") and name not in ("k", "v")}
    rest["kv_lens"] = options["kv_lens"] + new
    wide = (x if x.dtype in LIMIT else x.double() for x in (inputs.k_cache, inputs.v_cache))
    return reference.attention_with_kv_cache(q, *wide, **rest)


def in_torch(inputs: KvInputs) -> tuple[Tensor, Tensor]:
    """One sequence after the other as one writes it with torch's operators in the dtype of q."""
    inputs = inputs.clone()
    options, q = _reference_options(inputs.options, inputs.q.shape[-1]), inputs.q
    reference.attention_with_kv_cache(q, inputs.k_cache, inputs.v_cache, **options)
    new, table = 0 if "k" not in options else options["k"].shape[1], options["block_table"]
    outs, lses = [], []
    for b, before in enumerate(options["kv_lens"].tolist()):
        keys, values = (
            _gather(cache, options[name], b, before + new, table).to(q.dtype)
            for cache, name in ((inputs.k_cache, "k_scale"), (inputs.v_cache, "v_scale"))
        )
        row = q[b : b + 1]
        if "rotary_cos" in options:
            first = before if "k" in options else before - q.shape[1]
            tables = (options[name][first : first + q.shape[1]] for name in ("rotary_cos", "rotary_sin"))
            row = reference.rotate(row, *tables, options["rotary_interleaved"]).to(q.dtype)
        slopes, sinks = options.get("alibi_slopes"), options.get("sinks")
        out, lse = compare.torch_attention(
            row, keys[None], values[None], causal=options["causal"], window=options["window"], scale=options["scale"],
            softcap=options["softcap"], bias=None, mask=None, rel_table=None, rel_bidirectional=False, rel_max_distance=0,
            alibi_slopes=None if slopes is None else (slopes[b] if slopes.dim() == 2 else slopes).to(q.dtype),
            sinks=None if sinks is None else sinks.to(q.dtype), kv_lens=None, dropout_p=0.0, philox=None,
        )  # fmt: skip
        outs.append(out), lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def forward_floors(inputs: KvInputs) -> dict[str, float]:
    """The floors of out and lse. A rotation keeps the norm of a row."""

    def rows(name: str) -> Tensor:
        cache, scale = getattr(inputs, f"{name}_cache"), inputs.options[f"{name}_scale"]
        stored = cache.double() if scale is None else cache.float() * torch.as_tensor(scale)[..., None]
        new = inputs.options.get(name)
        return stored.flatten(0, 1) if new is None else torch.cat([stored.flatten(0, 1), new.double().flatten(0, 1)])

    slopes, length = inputs.options.get("alibi_slopes"), inputs.k_cache[..., 0, 0].numel()
    bias = 0.0 if slopes is None else largest(slopes) * length
    return attention_forward_floors(
        inputs.q.flatten(0, 1), rows("k"), rows("v"), inputs.q.dtype, scale=inputs.options["scale"], bias=bias
    )


def _gather(cache: Tensor, scale: Any, b: int, length: int, table: Tensor | None) -> Tensor:
    def of(x: Tensor) -> Tensor:
        return x[b, :length] if table is None else x[table[b].long()].flatten(0, 1)[:length]

    if cache.dtype not in LIMIT:
        return of(cache)
    scale = torch.as_tensor(scale)
    return of(cache.float()) * (of(scale) if scale.dim() > 1 else scale)[..., None]


def check_append(layout: dict[str, Any], seed: int, backend: str) -> None:
    """The cache and its scales after a call are bitwise the reference backend's: values, positions, rounding, and nothing else written."""
    inputs = make_kv_inputs(KvCase(**layout, b=3, sq=9), seed)
    inputs.options["k"][0, 1, 0] = 0  # an all-zero row has scale 0
    ours, reference = inputs.clone(), inputs.clone()
    ours.run(backend), reference.run("reference")
    assert not torch.equal(bits(ours.k_cache), bits(inputs.k_cache))
    assert torch.equal(bits(ours.k_cache), bits(reference.k_cache))
    assert torch.equal(bits(ours.v_cache), bits(reference.v_cache))
    if isinstance(inputs.options["k_scale"], Tensor):
        assert torch.equal(ours.options["k_scale"], reference.options["k_scale"])
        assert torch.equal(ours.options["v_scale"], reference.options["v_scale"])


def check_case(case: KvCase, seed: int, backend: str) -> None:
    """As good as torch in the same dtype, beside fp64; nothing outside the outputs is written."""
    inputs = make_kv_inputs(case, seed)
    expected, expected_lse = exact(inputs)
    peer, peer_lse = in_torch(inputs) if case.b else (expected, expected_lse)
    with poison.guarded_outputs():
        out, lse = inputs.clone().run(backend)
    assert out.dtype == case.dtype and lse.dtype == F32
    floors = forward_floors(inputs)
    compare.assert_as_good_as_torch(out, expected, peer, floor=floors["out"])
    compare.assert_as_good_as_torch(lse, expected_lse, peer_lse, name="lse", floor=floors["lse"])
