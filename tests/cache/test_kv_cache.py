"""attention_with_kv_cache against fp64: every option, storage and layout; what is written; what must not be read; bad input."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import compare
import foveate
import poison
from foveate.backend.reference import attention as reference
from kv_cases import (
    BF16,
    F8,
    F16,
    F32,
    I8,
    KvCase,
    bits,
    check_append,
    check_case,
    exact,
    forward_floors,
    in_torch,
    make_kv_inputs,
)

pytestmark = [pytest.mark.kernels, pytest.mark.cuda]

BACKENDS = ["native", "reference"]

OPTIONS = [
    {},
    {"sq": 5},
    {"sq": 37, "snew": 37, "longest": 60},
    {"sq": 40, "rotary": 12, "window": (50, -1), "sinks": True, "alibi": "bh", "softcap": 8.0, "b": 3},
    {"sq": 30, "rotary": 12, "interleaved": True, "new": False},
    {"new": False},
    {"new": False, "sq": 4},
    {"sq": 2, "snew": 5},
    {"sq": 6, "snew": 3},
    {"causal": False, "sq": 3},
    {"window": (17, -1), "sq": 3},
    {"window": (9, 4), "causal": False, "sq": 6},
    {"window": (0, 0), "sq": 2},
    {"softcap": 3.0},
    {"scale": 0.3},
    {"alibi": "h", "sq": 3},
    {"alibi": "bh", "b": 3},
    {"sinks": True},
    {"rotary": 16},
    {"rotary": 5, "sq": 3, "interleaved": True},
    {"rotary": 8, "new": False, "sq": 3},
    {"hq": 7, "hkv": 1},
    {"hq": 3, "hkv": 3, "d": 24, "dv": 40},
    {"d": 72, "dv": 17, "hq": 12, "hkv": 2},
    {"num_splits": 3},
    {"num_splits": 200, "sinks": True},
    {"batch_invariant": True, "longest": 150},
    {"lens_dtype": torch.int64, "b": 5},
    {
        "rotary": 8,
        "window": (31, -1),
        "softcap": 5.0,
        "alibi": "bh",
        "sinks": True,
        "sq": 3,
        "hq": 6,
        "num_splits": 2,
        "scale": 0.2,
    },
]
LAYOUTS = [
    {},
    {"page_size": 16},
    {"page_size": 7, "dtype": BF16},
    {"dtype": F16},
    {"dtype": BF16, "rotary_dtype": BF16},
    {"page_size": 1, "storage": I8},
    {"dtype": BF16, "storage": I8, "scale_kind": "head"},
    {"dtype": F16, "storage": F8, "page_size": 5},
    {"storage": F8, "scale_kind": "float"},
    {"dtype": BF16, "storage": F8, "scale_kind": "number", "page_size": 64},
]
CASES = [KvCase(**layout, **option) for layout in LAYOUTS for option in OPTIONS] + [
    KvCase(d=192, dv=128, hq=16, hkv=16, page_size=64, dtype=BF16),  # MLA, expanded
    KvCase(d=576, dv=512, hq=128, hkv=1, page_size=64, dtype=BF16, longest=130),  # MLA, absorbed
    KvCase(d=576, dv=512, hq=128, hkv=1, longest=70, b=1),
    KvCase(d=256, hq=2, hkv=1, longest=1000, b=1, dtype=BF16),
    KvCase(b=0),
    KvCase(sq=0, snew=3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_against_exact(case, seed):
    check_case(case, seed, "native")


@pytest.mark.parametrize("case", CASES[:: len(OPTIONS) // 2], ids=lambda case: case.id)
def test_reference_against_exact(case, seed):
    check_case(case, seed, "reference")


def test_float64_goes_to_the_reference(seed):
    inputs = make_kv_inputs(KvCase(dtype=torch.float64), seed)
    out, lse = inputs.clone().run()
    assert out.dtype == lse.dtype == torch.float64
    with pytest.raises(foveate.UnsupportedError, match=r"float64.*; backends that can: reference"):
        inputs.run("native")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: KvCase(**layout).id)
def test_append_writes_what_the_reference_writes_and_nothing_else(layout, seed):
    check_append(layout, seed, "native")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_rotated_keys_are_appended(dtype, interleaved, seed):
    """To an ulp: a kernel may fuse the products of the rotation."""
    inputs = make_kv_inputs(
        KvCase(dtype=dtype, b=3, sq=9, rotary=11, interleaved=interleaved, rotary_dtype=dtype), seed
    )
    native, reference = inputs.clone(), inputs.clone()
    native.run("native"), reference.run("reference")
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(native.k_cache, reference.k_cache, rtol=2 * ulp, atol=2 * ulp)
    assert torch.equal(bits(native.v_cache), bits(reference.v_cache))


@pytest.mark.parametrize("storage", [I8, F8], ids=str)
def test_every_stored_value_and_halfway_point(storage):
    """Quantisation on a grid that holds every representable number and every midpoint; loading by q = one-hot."""
    if storage == I8:
        values = torch.arange(-254, 255) / 2
    else:
        stored = torch.arange(256, dtype=torch.uint8).view(F8).float()
        stored = stored[stored.isfinite()].unique()
        values = torch.cat([stored, (stored[1:] + stored[:-1]) / 2]).sort().values
    values = torch.cat([values, torch.tensor([1e9, -1e9, 1e-12])])[None, :, None, None].contiguous()
    n = values.shape[1]
    caches = [torch.zeros(1, n, 1, 1).to(storage) for _ in range(4)]
    for backend, (k_cache, v_cache) in zip(BACKENDS, (caches[:2], caches[2:])):
        out = foveate.attention_with_kv_cache(
            torch.ones(1, n, 1, 1), k_cache, v_cache, k=values, v=values, kv_lens=torch.tensor([0]), window=(0, 0),
            k_scale=1.0, v_scale=1.0, backend=backend,
        )  # fmt: skip
        assert torch.equal(out, v_cache.float())
    assert torch.equal(bits(caches[1]), bits(caches[3]))


POISONED = [
    KvCase(sq=3),
    KvCase(sq=3, page_size=8, dtype=BF16, rotary=7),
    KvCase(page_size=16, dtype=F16, num_splits=3, hq=8),
    KvCase(dtype=BF16, d=20, dv=12, b=4),
    KvCase(storage=F8, page_size=8, b=3),
    KvCase(storage=I8, sq=2),
    KvCase(sq=40, page_size=8, longest=50),
    KvCase(page_size=8, window=(20, -1), batch_invariant=True),
    KvCase(sq=65, page_size=3, window=(20, -1), longest=250, dtype=F16),
    KvCase(sq=65, page_size=16, window=(20, -1), longest=700, d=64, dtype=BF16, b=3),
]


@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.id)
def test_nothing_beyond_the_length_is_read(case, seed):
    """NaN (scales too) beyond the keys, in unused pages and in padding; wild block_table entries where none is needed."""
    inputs = make_kv_inputs(case, seed)
    clean = inputs.clone().run("native")
    dirty, used = inputs.clone(), inputs.options["kv_lens"] + case.new_tokens
    table = inputs.options["block_table"]
    shape = inputs.k_cache.shape[:2]
    keep = torch.zeros(shape, dtype=torch.bool)
    for b, n in enumerate(used.tolist()):
        for t in range(n):
            place = (b, t) if table is None else (table[b, t // shape[1]], t % shape[1])
            keep[place] = True
        if table is not None:
            first = max(n - case.sq - case.window[0], 0) // shape[1] if case.window else 0
            dirty.options["block_table"][b, -(-n // shape[1]) :] = 10**6
            dirty.options["block_table"][b, :first] = -7
    assert not keep.all()
    for name in ("k_cache", "v_cache"):
        cache = getattr(dirty, name)
        if cache.dtype in (I8, F8):
            cache.view(torch.uint8)[~keep] = 0x7F
        else:
            cache[~keep] = float("nan")
            setattr(dirty, name, poison.nan_padded(cache))
    for name in ("k_scale", "v_scale"):
        if inputs.options[name] is not None:
            dirty.options[name][~keep] = float("nan")
    for name in ("q", "k", "v"):
        holder = dirty.__dict__ if name == "q" else dirty.options
        holder[name] = poison.nan_padded(holder[name])
    for ours, theirs in zip(dirty.run("native"), clean):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", [{}, {"page_size": 5, "dtype": BF16}, {"storage": I8}], ids=str)
def test_prefill_then_decode_is_one_pass(layout, seed):
    case = KvCase(sq=24, b=2, longest=0, rotary=9, **layout)
    once, step = make_kv_inputs(case, seed), make_kv_inputs(case, seed)
    (expected, _), (peer, _) = exact(once), in_torch(once)
    whole, _ = once.run("native")
    pieces, begin = [], 0
    for size in (11, 1, 1, 7, 1, 3):
        part = step.options | {name: step.options[name][:, begin : begin + size] for name in ("k", "v")}
        part["kv_lens"] = torch.full((2,), begin)
        pieces.append(
            foveate.attention_with_kv_cache(step.q[:, begin : begin + size], step.k_cache, step.v_cache, **part)
        )
        begin += size
    assert begin == 24
    assert torch.equal(once.k_cache, step.k_cache) and torch.equal(once.v_cache, step.v_cache)
    floor = forward_floors(once)["out"]
    compare.assert_as_good_as_torch(whole, expected, peer, floor=floor)
    compare.assert_as_good_as_torch(torch.cat(pieces, 1), expected, peer, floor=floor)


def test_paged_equals_dense_bitwise(seed):
    dense = make_kv_inputs(KvCase(longest=64 - 5, sq=2, b=3, batch_invariant=True), seed)
    out, _ = dense.clone().run("native")
    paged = dense.clone()
    order = torch.randperm(3 * 8)
    for name in ("k_cache", "v_cache"):
        cache = getattr(dense, name)
        pages = torch.empty(24, 8, *cache.shape[2:])
        pages[order] = cache.reshape(24, 8, *cache.shape[2:])
        setattr(paged, name, pages)
    paged.options["block_table"] = order.view(3, 8).int()
    assert torch.equal(paged.run("native")[0], out)


def test_arguments_as_views(seed):
    """Transposed caches [B, H, S, D], expanded kv heads of q, int64 lengths with a stride."""
    inputs = make_kv_inputs(KvCase(b=3, sq=2), seed)
    expected = inputs.clone().run("native")
    for name in ("k_cache", "v_cache"):
        cache = getattr(inputs, name)
        setattr(inputs, name, cache.transpose(1, 2).contiguous().transpose(1, 2))
    inputs.q = inputs.q.transpose(2, 3).contiguous().transpose(2, 3)  # a last dimension that is not contiguous
    inputs.options["kv_lens"] = torch.stack([inputs.options["kv_lens"]] * 2, 1).long()[:, 0]
    for ours, theirs in zip(inputs.run("native"), expected):
        assert torch.equal(ours, theirs)


def test_autocast_casts_queries_and_new_keys(seed):
    inputs = make_kv_inputs(KvCase(dtype=BF16), seed)
    expected = inputs.clone().run()[0]
    wide = inputs.clone()
    wide.q, wide.options["k"], wide.options["v"] = wide.q.float(), wide.options["k"].float(), wide.options["v"].float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide.run()[0], expected)


def test_opcheck(seed):
    from foveate.ops.attention import with_kv_cache_op as kv_cache_op

    for case in (KvCase(), KvCase(page_size=8, storage=I8, rotary=4, alibi="h", sinks=True, num_splits=2)):
        inputs = make_kv_inputs(case, seed)
        o = inputs.options.get
        alibi = None if o("alibi_slopes") is None else o("alibi_slopes")[None]
        arguments = (
            inputs.q, inputs.k_cache, inputs.v_cache, o("k"), o("v"), o("kv_lens"), o("block_table"), o("rotary_cos"),
            o("rotary_sin"), False, True, -1, -1, 0.2, 0.0, alibi, o("sinks"), o("k_scale"), o("v_scale"),
            case.num_splits, False, "",
        )  # fmt: skip
        torch.library.opcheck(kv_cache_op.op, arguments)


def test_compile_equals_eager(seed):
    inputs = make_kv_inputs(KvCase(page_size=8, sq=2, rotary=4, sinks=True, window=(30, None)), seed)
    eager, compiled = inputs.clone(), inputs.clone()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k_cache, v_cache, options):
        return foveate.attention_with_kv_cache(q * 1, k_cache, v_cache, **options)

    out = step(compiled.q, compiled.k_cache, compiled.v_cache, compiled.options)
    assert torch.equal(out, eager.run()[0])
    assert torch.equal(compiled.k_cache, eager.k_cache) and torch.equal(compiled.v_cache, eager.v_cache)


DEFAULT = KvCase()


def changed(case=DEFAULT, **options):
    """A call whose inputs are those of the case with some replaced, by a function of the KvInputs if callable."""

    def call(backend):
        inputs = make_kv_inputs(case)
        for name, value in options.items():
            value = value(inputs) if callable(value) else value
            if name in ("q", "k_cache", "v_cache"):
                setattr(inputs, name, value)
            else:
                inputs.options[name] = value
        before = inputs.clone()
        try:
            inputs.run(backend)
        finally:
            if inputs.k_cache.device.type != "meta":
                assert torch.equal(bits(inputs.k_cache), bits(before.k_cache)), "written before the error"

    return call


PAGED = KvCase(page_size=8, b=2, longest=20)
BAD = [
    (changed(q=lambda i: i.q[0]), r"q has shape \[1, 4, 32\]; it must have four dimensions"),
    (changed(q=lambda i: i.q[..., :16]), "q has head dim 16 and k_cache has 32"),
    (
        changed(q=lambda i: i.q[:, :, :3]),
        "q has 3 heads and the cache has 2; the number of query heads must be a multiple",
    ),
    (changed(q=lambda i: i.q.bfloat16()), "q is torch.bfloat16 and the cache torch.float32; cast q"),
    (changed(q=lambda i: i.q.int()), "q is torch.int32; attention_with_kv_cache takes"),
    (changed(q=lambda i: i.q.to("meta")), "k_cache is on cpu and q on meta; move it with"),
    (changed(q=lambda i: i.q[:1]), "k has shape"),
    (changed(q=lambda i: i.q[:1], k=None, v=None, kv_lens=torch.tensor([1])), "q has batch size 1 and the cache 2"),
    (
        changed(q=lambda i: i.q.requires_grad_()),
        "q requires a gradient, but attention_with_kv_cache has no backward; call it under",
    ),
    (changed(k_cache=lambda i: i.k_cache[:, :-1]), "must be equal but for the last dimension"),
    (
        changed(k_cache=lambda i: i.k_cache.mT.contiguous().mT),
        "the last dimension of k_cache has stride 2; it must be contiguous",
    ),
    (changed(v_cache=lambda i: i.v_cache.bfloat16()), "k_cache is torch.float32 and v_cache torch.bfloat16"),
    (changed(k=None), "k and v must be given together"),
    (changed(k=lambda i: i.options["k"].half()), "k is torch.float16 and q torch.float32"),
    (changed(v=lambda i: i.options["v"][..., :8]), r"v has shape \[2, 1, 2, 8\]; it must be"),
    (changed(kv_lens=3), "kv_lens must be a torch.Tensor"),
    (changed(kv_lens=torch.tensor([1.0, 2.0])), "kv_lens is torch.float32 of shape"),
    (
        changed(kv_lens=torch.tensor([1, 2, 3])),
        r"kv_lens is torch.int64 of shape \[3\]; it must be int32 or int64 \[2\]",
    ),
    (changed(kv_lens=torch.tensor([1, -1])), r"kv_lens\[1\] = -1 is negative"),
    (
        changed(kv_lens=torch.tensor([94, 1])),
        r"kv_lens\[0\] \+ Snew = 94 \+ 1 = 95 exceeds the cache's 94 keys; use a larger cache",
    ),
    (changed(kv_lens=torch.tensor([2**62, 1])), "exceeds the cache's 94 keys"),
    (
        changed(PAGED, kv_lens=torch.tensor([24, 1])),
        "exceeds the cache's 24 keys; use a larger cache or a block_table with more",
    ),
    (changed(PAGED, block_table=lambda i: i.options["block_table"].long()), "block_table is torch.int64 of shape"),
    (
        changed(PAGED, block_table=lambda i: i.options["block_table"][:1]),
        r"it must be int32 \[B, max_pages\] with B = 2",
    ),
    (changed(PAGED, block_table=lambda i: i.options["block_table"].mT.contiguous().mT), "pass block_table.contiguous"),
    (
        changed(PAGED, block_table=torch.full((2, 3), 8, dtype=torch.int32)),
        r"block_table\[0, 0\] = 8 is not a page: the cache has 8",
    ),
    (changed(PAGED, block_table=torch.tensor([[0, 1, -1]] * 2).int()), r"block_table\[0, 2\] = -1 is not a page"),
    (changed(KvCase(rotary=4), rotary_sin=None), "rotary_cos and rotary_sin must be given together"),
    (changed(KvCase(rotary=17)), "rotates 2 \\* 17 elements of each head, but the head dim is 32"),
    (changed(KvCase(rotary=4, rotary_dtype=F16)), "they must be float32 or torch.float32"),
    (changed(KvCase(rotary=4), rotary_sin=lambda i: i.options["rotary_sin"][1:]), r"both must be \[max_pos, rot / 2\]"),
    (
        changed(
            KvCase(rotary=4),
            rotary_cos=lambda i: i.options["rotary_cos"][:9],
            rotary_sin=lambda i: i.options["rotary_sin"][:9],
        ),
        "rotary_cos and rotary_sin have 9 positions, sequence 0 needs 91",
    ),
    (
        changed(KvCase(rotary=4, new=False, sq=3), kv_lens=torch.tensor([9, 2])),
        r"kv_lens\[1\] = 2 is less than the 3 queries",
    ),
    (changed(window=(1, 2, 3)), "must be a pair"),
    (changed(window=(-2, 0)), "from 0 up, where None or -1"),
    (changed(scale=float("nan")), "scale=nan must be a finite number"),
    (changed(softcap=-1.0), "softcap=-1.0 must be a finite number above 0"),
    (changed(alibi_slopes=torch.rand(3)), r"alibi_slopes must be float32 of shape \[Hq\]"),
    (changed(sinks=torch.rand(5)), r"sinks must be a float tensor \[Hq\] = \[4\]"),
    (changed(num_splits=-1), "num_splits=-1 must be 0"),
    (changed(k_scale=1.0), "k_scale is given, but the cache is torch.float32"),
    (changed(KvCase(storage=I8), k_scale=None), "the cache is torch.int8 and needs k_scale: a float"),
    (
        changed(KvCase(storage=I8), v_scale=torch.rand(5)),
        r"v_scale is torch.float32 of shape \[5\]; it must be float32 and a number",
    ),
    (changed(KvCase(storage=F8), v_scale=torch.rand(2).double()), "v_scale is torch.float64 of shape"),
    (changed(), "backend='cuda' is unknown"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD, ids=[sentence[:50] for _, sentence in BAD])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input(call, sentence, backend):
    with pytest.raises((ValueError, TypeError), match=sentence):
        call("cuda" if "cuda" in sentence else backend)


def test_gradients_are_only_refused_where_they_would_be_lost(seed):
    inputs = make_kv_inputs(KvCase(), seed)
    expected = inputs.clone().run()[0]
    for allowed in (torch.no_grad, torch.inference_mode):
        trial = inputs.clone()
        trial.q.requires_grad_()
        with allowed():
            assert torch.equal(trial.run()[0], expected)
    with pytest.raises(ValueError, match="q requires a gradient"):
        trial.run()


def test_reference_definition_is_the_backend(seed):
    """backend="reference" is reference.py itself, so that checking against it checks against the definition."""
    inputs = make_kv_inputs(dataclasses.replace(KvCase(), sinks=True), seed)
    o = inputs.clone().options
    expected, _ = reference.attention_with_kv_cache(
        inputs.q,
        inputs.k_cache.clone(),
        inputs.v_cache.clone(),
        k=o["k"],
        v=o["v"],
        kv_lens=o["kv_lens"],
        scale=32**-0.5,
        sinks=o["sinks"],
    )
    assert torch.equal(inputs.run("reference")[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_batch_invariant_rows_do_not_depend_on_how_many_queries_a_step_has(dtype: torch.dtype, group: int) -> None:
    """What checking drafts needs: 13 queries at once and one after the other give the same bits."""
    torch.manual_seed(0)
    before, new, Hkv, D = 300, 13, 3, 64
    k_cache, v_cache = torch.randn(2, 1, 512, Hkv, D).to(dtype)
    q = torch.randn(1, new, Hkv * group, D).to(dtype)

    def attend(q: torch.Tensor, end: int) -> torch.Tensor:
        lens = torch.tensor([end], dtype=torch.int32)
        return foveate.attention_with_kv_cache(
            q, k_cache, v_cache, kv_lens=lens, batch_invariant=True, backend="native"
        )

    together = attend(q, before + new)
    for i in range(new):
        assert torch.equal(together[:, i : i + 1], attend(q[:, i : i + 1], before + i + 1))
