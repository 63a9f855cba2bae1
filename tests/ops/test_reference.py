"""The definition itself, against known answers, torch, transformers and loops over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cases import AttentionCase, make_inputs
from foveate.backend.reference import attention as reference
from foveate.backend.reference import rows as ops

# Random123's known-answer vectors for philox4x32 with 10 rounds: counter, key, words.
PHILOX_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", PHILOX_ANSWERS)
def test_philox_known_answers(counter, key, words):
    answer = reference.philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(answer.tolist()) == words


def philox_word(seed: int, offset: int, bh: int, i: int, j: int) -> int:
    """One word in Python's integers, written apart from the tensor version."""
    c = [j // 4, i, bh, offset & 0xFFFFFFFF]
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[j % 4]


@pytest.mark.parametrize("seed, offset", [(0, 0), (2**62 + 12345, 2**40 + 7), (-3, -1)])
def test_philox_keep_addresses_each_word(seed, offset):
    p, b, h, sq, skv = 0.4, 2, 3, 5, 11
    keep = reference.philox_keep(torch.tensor([seed, offset]), p, b, h, sq, skv)
    assert keep.shape == (b, h, sq, skv)
    for batch, head, i, j in torch.cartesian_prod(*map(torch.arange, keep.shape)).tolist():
        assert keep[batch, head, i, j] == (philox_word(seed, offset, batch * h + head, i, j) >= round(p * 2**32))
    later = reference.philox_keep(torch.tensor([seed, offset]), p, 1, h, sq, skv, first_batch=1)
    assert torch.equal(later[0], keep[1])


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (64, 1000), (33, 100), (16, 40)])
def test_buckets_are_those_of_transformers(bidirectional, num_buckets, max_distance):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-3000, 3000)
    ours = reference.relative_buckets(distances, num_buckets, bidirectional, max_distance)
    theirs = t5.T5Attention._relative_position_bucket(distances, bidirectional, num_buckets, max_distance)
    assert torch.equal(ours, theirs)
    one_by_one = [
        reference.relative_buckets(d[None], num_buckets, bidirectional, max_distance) for d in distances[2500:3500]
    ]
    assert torch.equal(ours[2500:3500], torch.cat(one_by_one)), "the bucket of a distance depends on its neighbours"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("hkv", [1, 2, 4])
def test_attention_is_torchs(masked, hkv):
    case = AttentionCase(sq=20, skv=33, hkv=hkv, dtype=torch.float64, mask="b1qk" if masked else None)
    inputs = make_inputs(case, 0)
    if masked:
        inputs.mask[..., 0] = True  # torch versions disagree about empty rows
    out, _ = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.reference_options())
    q, k, v = (x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, enable_gqa=True)
    torch.testing.assert_close(out, theirs.transpose(1, 2), rtol=1e-12, atol=1e-12)


def attention_by_hand(inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract, read aloud: one query, one key, one number at a time. No dropout."""
    case, q, k, v = inputs.case, inputs.q.tolist(), inputs.k.tolist(), inputs.v.tolist()
    dv = len(v[0][0][0])
    out = torch.zeros(case.b, case.sq, case.hq, dv, dtype=torch.float64)
    lse = torch.full((case.b, case.hq, case.sq), float("-inf"), dtype=torch.float64)
    shape = (case.b, case.hq, case.sq, case.skv)
    bias = None if inputs.bias is None else inputs.bias.expand(shape)
    mask = None if inputs.mask is None else inputs.mask.expand(shape)
    slopes = None if inputs.alibi_slopes is None else inputs.alibi_slopes.double().expand(case.b, case.hq)
    left, right = case.window or (-1, -1)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, shape[:3])).tolist():
        kv_head = h * case.hkv // case.hq
        length = case.skv if inputs.kv_lens is None else int(inputs.kv_lens[b])
        weights = {}
        for j in range(length):
            distance = j - (i + length - case.sq)
            if case.causal and distance > 0:
                continue
            if (left >= 0 and distance < -left) or (right >= 0 and distance > right):
                continue
            if mask is not None and not mask[b, h, i, j]:
                continue
            s = sum(x * y for x, y in zip(q[b][i][h], k[b][j][kv_head])) * (case.scale or case.d**-0.5)
            if case.softcap:
                s = case.softcap * math.tanh(s / case.softcap)
            if slopes is not None:
                s -= float(slopes[b, h]) * abs(distance)
            if bias is not None:
                s += float(bias[b, h, i, j])
            if inputs.table is not None:
                bidirectional = case.relative == "bidirectional"
                bucket = reference.relative_buckets(torch.tensor([distance]), len(inputs.table), bidirectional, 40)
                s += float(inputs.table[int(bucket), h])
            weights[j] = math.exp(s)
        if not weights:
            continue
        total = sum(weights.values())
        lse[b, h, i] = math.log(total)
        if inputs.sinks is not None:
            total += math.exp(float(inputs.sinks[h]))
        for j, weight in weights.items():
            for c in range(dv):
                out[b, i, h, c] += weight / total * v[b][j][kv_head][c]
    return out, lse


BY_HAND = [
    AttentionCase(),
    AttentionCase(causal=True, sq=9, skv=4),
    AttentionCase(causal=True, window=(3, -1), softcap=1.0, sinks=True),
    AttentionCase(window=(2, 1), alibi="bh", kv_lens=True, b=3),
    AttentionCase(bias="1h1k", mask="b1qk", scale=0.9),
    AttentionCase(relative="bidirectional", kv_lens=True, b=3),
    AttentionCase(relative="backward", causal=True, alibi="h", bias="qk", hkv=1),
    AttentionCase(b=3, kv_lens=True, causal=True, window=(-1, 2), sinks=True, mask="bhqk", dv=3),
]


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.id)
def test_attention_by_hand(case):
    import dataclasses

    sizes = {"d": 4, "dtype": torch.float64} | ({"sq": 6, "skv": 9} if case.sq == 33 else {})
    inputs = make_inputs(dataclasses.replace(case, **sizes), 1)
    out, lse = reference.attention(inputs.q, inputs.k, inputs.v, **inputs.reference_options())
    by_hand, lse_by_hand = attention_by_hand(inputs)
    torch.testing.assert_close(out, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, lse_by_hand, rtol=1e-12, atol=1e-12)


class TestKVCache:
    """Against attention over the concatenated keys, dense and paged, plain and quantized."""

    B, NEW, OLD, HKV, D, DV = 2, 3, (4, 1), 2, 8, 4

    def setup_method(self):
        torch.manual_seed(0)
        b, n = self.B, self.NEW
        self.q = torch.randn(b, n, 4, self.D)
        self.k, self.v = torch.randn(b, n, self.HKV, self.D), torch.randn(b, n, self.HKV, self.DV)
        self.k_old, self.v_old = torch.randn(b, 8, self.HKV, self.D), torch.randn(b, 8, self.HKV, self.DV)
        self.kv_lens = torch.tensor(self.OLD, dtype=torch.int32)

    def expected(self, q=None, k=None, **options):
        """One sequence after the other, its keys written out."""
        q, k = self.q if q is None else q, self.k if k is None else k
        outs = []
        for b, length in enumerate(self.OLD):
            keys = torch.cat([self.k_old[b, :length], k[b]])[None]
            values = torch.cat([self.v_old[b, :length], self.v[b]])[None]
            outs.append(reference.attention(q[b : b + 1], keys, values, scale=0.3, causal=True, **options)[0])
        return torch.cat(outs)

    def caches(self, paged: bool):
        """Both caches with the old keys, everything else NaN, and the block table (pages of 3 rows, in no order)."""
        if not paged:
            k, v = self.k_old.clone(), self.v_old.clone()
            for b, length in enumerate(self.OLD):
                k[b, length:], v[b, length:] = float("nan"), float("nan")
            return k, v, None
        table = torch.tensor([[4, 0, 2], [5, 1, 3]], dtype=torch.int32)
        k, v = (torch.full((7, 3, self.HKV, d), float("nan")) for d in (self.D, self.DV))
        for b, length in enumerate(self.OLD):
            for t in range(length):
                page, row = table[b, t // 3], t % 3
                k[page, row], v[page, row] = self.k_old[b, t], self.v_old[b, t]
        return k, v, table

    @pytest.mark.parametrize("paged", [False, True])
    def test_append_and_attend(self, paged):
        k_cache, v_cache, table = self.caches(paged)
        options = dict(kv_lens=self.kv_lens, block_table=table, scale=0.3, softcap=2.0, window=(3, 0))
        out, _ = reference.attention_with_kv_cache(self.q, k_cache, v_cache, k=self.k, v=self.v, **options)
        torch.testing.assert_close(out, self.expected(softcap=2.0, window=(3, 0)))
        # Without new keys, at the new lengths, the same keys are seen.
        options["kv_lens"] = self.kv_lens + self.NEW
        again, _ = reference.attention_with_kv_cache(self.q, k_cache, v_cache, **options)
        torch.testing.assert_close(again, out, rtol=0, atol=0)

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_rotary_positions(self, interleaved):
        angles = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.1, 0.01])  # rot 6 of D 8
        cos, sin = angles.cos(), angles.sin()
        positions = self.kv_lens[:, None] + torch.arange(self.NEW)
        q, k = ops.apply_rotary(self.q, self.k, cos[positions], sin[positions], interleaved)
        k_cache, v_cache, table = self.caches(True)
        options = dict(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved, block_table=table, scale=0.3)
        out, _ = reference.attention_with_kv_cache(
            self.q, k_cache, v_cache, k=self.k, v=self.v, kv_lens=self.kv_lens, **options
        )
        torch.testing.assert_close(out, self.expected(q, k))
        # The last NEW positions are where q was; k is None.
        again, _ = reference.attention_with_kv_cache(
            self.q, k_cache, v_cache, kv_lens=self.kv_lens + self.NEW, **options
        )
        torch.testing.assert_close(again, out)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
    @pytest.mark.parametrize("kind", ["number", "per head", "per token"])
    def test_quantized(self, dtype, kind):
        limit = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
        k_cache, v_cache = torch.zeros(2, 8, 2, self.D).to(dtype), torch.zeros(2, 8, 2, self.DV).to(dtype)
        scales = {"number": 4 / limit, "per head": torch.tensor([4 / limit, 5 / limit]), "per token": None}[kind]
        k_scale, v_scale = (
            (torch.full((2, 8, 2), float("nan")) for _ in range(2)) if scales is None else (scales, scales)
        )
        lens = torch.tensor([2, 5], dtype=torch.int32)
        reference.attention_with_kv_cache(
            self.q, k_cache, v_cache, k=self.k, v=self.v, kv_lens=lens, scale=0.3, k_scale=k_scale, v_scale=v_scale
        )  # fmt: skip
        for cache, scale, x in ((k_cache, k_scale, self.k), (v_cache, v_scale, self.v)):
            for b, length in enumerate(lens.tolist()):
                new = slice(length, length + self.NEW)
                s = scale[b, new, :, None] if kind == "per token" else torch.as_tensor(scale)[..., None]
                if kind == "per token":
                    torch.testing.assert_close(s[..., 0], x[b].abs().amax(-1) / limit)
                stored = cache[b, new].float() * s
                # int8 rounds to half a step; e4m3, with 3 bits of mantissa, to 1/16 of the value or half of 2**-9.
                bound = 0.5 * s if dtype == torch.int8 else torch.maximum(x[b].abs() / 16, s * 2**-10)
                error = (stored - x[b]).abs()
                assert (error <= 1.0001 * bound).all()
                assert error.max() > 0

    def test_token_of_zeros(self):
        cache, scales = torch.ones(1, 4, 1, 8, dtype=torch.int8), torch.ones(1, 4, 1)
        zeros = torch.zeros(1, 2, 1, 8)
        out, _ = reference.attention_with_kv_cache(
            torch.randn(1, 2, 1, 8), cache, cache.clone(), k=zeros, v=zeros, scale=1.0,
            kv_lens=torch.zeros(1, dtype=torch.int32), k_scale=scales, v_scale=scales.clone(),
        )  # fmt: skip
        assert not out.any()
        assert scales[0, :2].eq(0).all() and scales[0, 2:].eq(1).all()
        assert not cache[0, :2].any() and cache[0, 2:].eq(1).all()


class TestRows:
    def setup_method(self):
        torch.manual_seed(0)
        self.x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_softmax_and_log_softmax(self, dim):
        torch.testing.assert_close(ops.softmax(self.x, dim, scale=0.7), F.softmax(0.7 * self.x, dim))
        torch.testing.assert_close(ops.log_softmax(self.x, dim), F.log_softmax(self.x, dim))

    def test_softmax_masks(self):
        mask = torch.rand(6, 11) < 0.6
        mask[2] = False
        y = ops.softmax(self.x, mask=mask, bias=torch.ones(11), causal=True)
        visible = mask & torch.ones(6, 11, dtype=torch.bool).tril(5)
        expected = F.softmax((self.x + 1).masked_fill(~visible, float("-inf")), -1).masked_fill(~visible, 0)
        torch.testing.assert_close(y, expected)
        assert not y[2].any()
        y.square().sum().backward()
        assert self.x.grad.isfinite().all() and not self.x.grad[2].any()

    @pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_cross_entropy_is_torchs(self, reduction, smoothing):
        target = torch.tensor([1, 2, -100, 4, 5, 10])
        options = dict(label_smoothing=smoothing, reduction=reduction)
        torch.testing.assert_close(
            ops.cross_entropy(self.x, target, **options), F.cross_entropy(self.x, target, **options)
        )

    def test_cross_entropy_extras(self):
        target = torch.tensor([1, 2, 3, 4, 5, 10])
        capped = 3 * torch.tanh(self.x / 3)
        z = 1e-2 * capped.logsumexp(-1).square().mean()
        torch.testing.assert_close(
            ops.cross_entropy(self.x, target, softcap=3.0, z_loss=1e-2), F.cross_entropy(capped, target) + z
        )

    def test_cross_entropy_of_ignored_rows(self):
        x = torch.randn(3, 5)
        x[1] = float("nan")
        x.requires_grad_()
        loss = ops.cross_entropy(x, torch.tensor([0, -100, 4]), z_loss=0.1, label_smoothing=0.1, softcap=5.0)
        loss.backward()
        assert loss.isfinite() and x.grad.isfinite().all() and not x.grad[1].any()
        assert ops.cross_entropy(x, torch.full((3,), -100)).isnan()

    def test_linear_cross_entropy(self):
        hidden, weight, bias = torch.randn(6, 8), torch.randn(20, 8), torch.randn(20)
        target = torch.tensor([0, 19, -100, 3, 4, 5])
        expected = F.cross_entropy(F.linear(hidden, weight, bias), target)
        torch.testing.assert_close(ops.linear_cross_entropy(hidden, weight, target, bias), expected)

    def test_rms_norm(self):
        weight = torch.randn(11, dtype=torch.float64)
        out, rstd = ops.rms_norm(self.x, weight, 1e-5)
        torch.testing.assert_close(out, F.rms_norm(self.x, (11,), weight, 1e-5))
        torch.testing.assert_close(rstd, (self.x.square().mean(-1) + 1e-5).rsqrt())

    @pytest.mark.parametrize("interleaved", [False, True])
    def test_rotary_is_a_complex_product(self, interleaved):
        q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 1, 8)
        angle = torch.randn(5, 3)
        turned = ops.apply_rotary(q, k, angle.cos(), angle.sin(), interleaved=interleaved)
        for x, y in zip((q, k), turned):
            first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
            z = torch.complex(x[..., first], x[..., second]) * torch.exp(1j * angle)[:, None]
            torch.testing.assert_close(y[..., first], z.real)
            torch.testing.assert_close(y[..., second], z.imag)
            assert torch.equal(y[..., 6:], x[..., 6:])
