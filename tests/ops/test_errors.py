"""Bad input raises a sentence that names the values and the cure; no input from Python may crash the process."""

from __future__ import annotations

import re

import pytest
import torch

import foveate

pytestmark = pytest.mark.sanitize

BAD = (ValueError, TypeError)


def qkv(b=2, sq=5, skv=7, hq=4, hkv=2, d=16, dv=None, dtype=torch.float32, device="cpu"):
    shapes = ((b, sq, hq, d), (b, skv, hkv, d), (b, skv, hkv, d if dv is None else dv))
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def sentence(*words: object) -> str:
    """A pattern for a message of some length that has all these words, in any order, numbers as whole numbers."""
    parts = [
        rf"(?<!\d)(?<!\d\.){re.escape(str(w))}(?!\d)" if isinstance(w, (int, float)) else re.escape(w) for w in words
    ]
    return r"(?is)^(?=.{30,})" + "".join(f"(?=.*{part})" for part in parts)


def raises(*words: object):
    return pytest.raises(BAD, match=sentence(*words))


class TestShapes:
    @pytest.mark.parametrize("rank", [1, 2, 3, 5])
    @pytest.mark.parametrize("which", [0, 1, 2])
    def test_rank(self, rank, which):
        tensors = qkv()
        tensors[which] = torch.zeros([2] * rank)
        with raises("dimension", str([2] * rank)):
            foveate.attention(*tensors)

    def test_packed_tensors_are_pointed_to_varlen(self):
        with raises("attention_varlen"):
            foveate.attention(*(x[0] for x in qkv()))

    def test_not_tensors(self):
        q, k, v = qkv()
        with raises("tensor", "list"):
            foveate.attention(q, k.tolist(), v)

    def test_heads_do_not_divide(self):
        with raises("heads", 5, 2, "multiple"):
            foveate.attention(*qkv(hq=5, hkv=2))

    def test_more_kv_heads_than_query_heads(self):
        with raises("heads", 2, 4, "multiple"):
            foveate.attention(*qkv(hq=2, hkv=4))

    def test_k_and_v_heads_differ(self):
        q, k, v = qkv()
        with raises("heads", 2, 1, "equal"):
            foveate.attention(q, k, v[:, :, :1])

    def test_k_and_v_lengths_differ(self):
        q, k, v = qkv()
        with raises(7, 6, "equal"):
            foveate.attention(q, k, v[:, :6])

    def test_batches_differ(self):
        q, k, v = qkv(b=3)
        with raises("batch", 3, 1, "equal"):
            foveate.attention(q, k[:1], v[:1])

    def test_head_dims_differ(self):
        q, k, v = qkv()
        with raises("head dim", 16, 8, "equal"):
            foveate.attention(q, k[..., :8], v)

    @pytest.mark.parametrize("d, dv", [(577, 64), (64, 640), (1024, 1024)])
    def test_head_dim_beyond_the_kernels(self, d, dv):
        with raises("native", "head dims up to", d, dv):
            foveate.attention(*qkv(d=d, dv=dv), backend="native")

    def test_head_dim_zero(self):
        with raises("head dim", 0):
            foveate.attention(*qkv(d=0, dv=8))


class TestKinds:
    def test_dtypes_differ(self):
        q, k, v = qkv()
        with raises("dtype", "float32", "bfloat16", ".to("):
            foveate.attention(q, k.bfloat16(), v)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
    def test_dtype_that_attention_does_not_take(self, dtype):
        with raises("dtype", str(dtype), "float32"):
            foveate.attention(*qkv(dtype=dtype))

    def test_devices_differ(self):
        q, k, v = qkv()
        with raises("cpu", "meta", ".to("):
            foveate.attention(q, k.to("meta"), v.to("meta"))

    @pytest.mark.parametrize("name", ["bias", "mask", "alibi_slopes", "sinks", "kv_lens"])
    def test_option_on_another_device(self, name):
        dtypes = {"mask": torch.bool, "kv_lens": torch.int32}
        shapes = {"bias": (1, 1, 5, 7), "mask": (1, 1, 5, 7), "alibi_slopes": (4,), "sinks": (4,), "kv_lens": (2,)}
        option = torch.zeros(shapes[name], dtype=dtypes.get(name, torch.float32), device="meta")
        with raises(name, "meta", "cpu"):
            foveate.attention(*qkv(), **{name: option})


class TestNumbers:
    @pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
    def test_dropout_outside_0_1(self, p):
        with raises("dropout_p", str(p), "[0, 1)"):
            foveate.attention(*qkv(), dropout_p=p)

    @pytest.mark.parametrize("scale", [float("nan"), float("inf"), float("-inf")])
    def test_scale_not_finite(self, scale):
        with raises("scale", str(scale), "finite"):
            foveate.attention(*qkv(), scale=scale)

    @pytest.mark.parametrize("softcap", [-1.0, float("nan"), float("inf")])
    def test_softcap(self, softcap):
        with raises("softcap", str(softcap)):
            foveate.attention(*qkv(), softcap=softcap)

    @pytest.mark.parametrize("window", [(-2, 3), (3, -7), (1.5, 2)])
    def test_window(self, window):
        with raises("window", *map(str, window), "unlimited"):
            foveate.attention(*qkv(), window=window)

    @pytest.mark.parametrize("window", [4, (1,), (1, 2, 3)])
    def test_window_is_no_pair(self, window):
        with raises("window", str(window), "pair"):
            foveate.attention(*qkv(), window=window)

    def test_tensor_for_a_number(self):
        with raises("dropout_p", "number", ".item()"):
            foveate.attention(*qkv(), dropout_p=torch.tensor(0.5))

    @pytest.mark.parametrize("name", ["scale", "softcap"])
    def test_a_learned_number_of_a_wrong_kind(self, name):
        """One number, or with scale one for each head, is taken: tests/ops/test_derivatives.py."""
        with raises(name, "shape", "one number"):
            foveate.attention(*qkv(), **{name: torch.rand(3)})
        with raises(name, "torch.int64"):
            foveate.attention(*qkv(), **{name: torch.tensor(2)})

    def test_learned_softcap_of_a_named_backend(self):
        with pytest.raises(foveate.UnsupportedError, match="softcap as a Python number"):
            foveate.attention(*qkv(), softcap=torch.tensor(2.0), backend="triton")


class TestScores:
    @pytest.mark.parametrize("shape", [(2, 4, 5, 6), (3, 4, 5, 7), (2, 2, 5, 7), (4, 7), (1, 2, 4, 5, 7)])
    @pytest.mark.parametrize("name, dtype", [("bias", torch.float32), ("mask", torch.bool)])
    def test_does_not_broadcast(self, name, dtype, shape):
        with raises(name, "broadcast", "[2, 4, 5, 7]", shape[-1]):
            foveate.attention(*qkv(), **{name: torch.zeros(shape, dtype=dtype)})

    def test_float_mask(self):
        with raises("mask", "float32", "bool", "bias"):
            foveate.attention(*qkv(), mask=torch.zeros(5, 7))

    def test_bool_bias(self):
        with raises("bias", "bool", "mask"):
            foveate.attention(*qkv(), bias=torch.zeros(5, 7, dtype=torch.bool))

    @pytest.mark.parametrize("shape", [(2,), (1, 4), (2, 2), (4, 1), ()])
    def test_alibi_shape(self, shape):
        with raises("alibi_slopes", str(list(shape)), "[4]", "[2, 4]"):
            foveate.attention(*qkv(), alibi_slopes=torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(2,), (2, 4), (1, 4), ()])
    def test_sinks_shape(self, shape):
        with raises("sinks", str(list(shape)), "[4]"):
            foveate.attention(*qkv(), sinks=torch.zeros(shape))

    def test_relative_table_heads(self):
        with raises("relative_bias", "[32, 3]", 4):
            foveate.attention(*qkv(), relative_bias=foveate.RelativeBias(torch.zeros(32, 3), True, 128))

    def test_relative_bias_is_no_tensor(self):
        with raises("RelativeBias", "Tensor"):
            foveate.attention(*qkv(), relative_bias=torch.zeros(32, 4))

    @pytest.mark.parametrize("buckets, bidirectional, distance", [(3, True, 128), (1, False, 128), (32, True, 8)])
    def test_relative_bias_buckets(self, buckets, bidirectional, distance):
        with raises(buckets, distance, "buckets", "max_distance"):
            foveate.RelativeBias(torch.zeros(buckets, 4), bidirectional, distance)


class TestLengths:
    @pytest.mark.parametrize("lens, wrong", [((7, 8), 8), ((-1, 3), -1), ((2**31 - 1, 0), 2**31 - 1)])
    def test_kv_lens_outside_the_keys(self, lens, wrong, backend):
        with raises("kv_lens", str(wrong), 7):
            foveate.attention(*qkv(), kv_lens=torch.tensor(lens, dtype=torch.int32), backend=backend)

    def test_kv_lens_that_int32_does_not_hold(self, backend):
        with raises("kv_lens", str(2**32 + 3), 7):
            foveate.attention(*qkv(), kv_lens=torch.tensor([2**32 + 3, 1]), backend=backend)

    def test_kv_lens_of_another_batch(self):
        with raises("kv_lens", 3, 2):
            foveate.attention(*qkv(), kv_lens=torch.tensor([1, 2, 3], dtype=torch.int32))

    def test_kv_lens_of_floats(self):
        with raises("kv_lens", "float32", "int32"):
            foveate.attention(*qkv(), kv_lens=torch.tensor([1.0, 2.0]))


class TestVarlen:
    """Two sequences of 5 queries and 7 keys, with one thing wrong."""

    @staticmethod
    def call(cu_q=(0, 5, 10), cu_k=(0, 7, 14), max_q=5, max_k=7, dtype=torch.int32, backend=None, **options):
        q, k, v = (x.flatten(0, 1) for x in qkv())
        cu_q, cu_k = torch.tensor(cu_q, dtype=dtype), torch.tensor(cu_k, dtype=dtype)
        return foveate.attention_varlen(q, k, v, cu_q, cu_k, max_q, max_k, backend=backend, **options)

    def test_right_call_works(self, backend):
        assert self.call(backend=backend).shape == (10, 4, 16)

    @pytest.mark.parametrize(
        "cu, wrong",
        [
            ((0, -3, 10), -3),
            ((-1, 5, 10), -1),
            ((2, 5, 10), 2),
            ((0, 12, 10), None),
            ((0, 5, 9), 9),
            ((0, 5, 11), 11),
            ((0, 5, 2**31 - 1), 2**31 - 1),
        ],
    )
    def test_cu_seqlens_values(self, cu, wrong, backend):
        with raises("cu_seqlens_q", "0", "decrease", 10, *(() if wrong is None else (str(wrong),))):
            self.call(cu_q=cu, max_q=2**31 - 1, backend=backend)
        cu_k = tuple({10: 14, 9: 13, 11: 15, 12: 16}.get(x, x) for x in cu)
        with raises("cu_seqlens_k", "0", "decrease", 14):
            self.call(cu_k=cu_k, max_k=2**31 - 1, backend=backend)

    def test_cu_seqlens_that_int32_does_not_hold(self, backend):
        with raises("cu_seqlens_q", str(2**32 + 5)):
            self.call(cu_q=(0, 2**32 + 5, 10), max_q=10, dtype=torch.int64, backend=backend)

    def test_cu_seqlens_sizes_differ(self):
        with raises("cu_seqlens", 3, 2):
            self.call(cu_k=(0, 14), max_k=14)

    def test_cu_seqlens_empty(self):
        with raises("cu_seqlens", 0):
            self.call(cu_q=(), cu_k=())

    def test_cu_seqlens_of_floats(self):
        with raises("cu_seqlens_q", "float32", "int32"):
            self.call(dtype=torch.float32)

    @pytest.mark.parametrize("which", ["q", "k"])
    def test_max_seqlen_too_small(self, which, backend):
        with raises("max_seqlen", f"_{which}", 3, {"q": 5, "k": 7}[which]):
            self.call(**{f"max_{which}": 3}, backend=backend)

    def test_max_seqlen_negative(self):
        with raises("max_seqlen_q", "-1"):
            self.call(max_q=-1)

    def test_max_seqlen_is_a_tensor(self):
        with raises("max_seqlen_k", "int"):
            self.call(max_k=torch.tensor(7))

    def test_rank(self):
        q, k, v = qkv()
        cu = torch.tensor([0, 5], dtype=torch.int32)
        with raises("dimensions", "[2, 5, 4, 16]"):
            foveate.attention_varlen(q, k, v, cu, cu, 5, 5)

    @pytest.mark.parametrize("name", ["mask", "bias", "kv_lens"])
    def test_options_that_it_does_not_have(self, name):
        with pytest.raises(TypeError, match=name):
            self.call(**{name: torch.zeros(1)})

    def test_alibi_of_another_batch(self):
        with raises("alibi_slopes", "[3, 4]", "[2, 4]"):
            self.call(alibi_slopes=torch.zeros(3, 4))


class TestMerge:
    def test_shapes(self):
        out, lse = torch.zeros(2, 5, 4, 8), torch.zeros(2, 4, 5)
        with raises("[2, 5, 4, 8]", "[2, 5, 4]", "lse"):
            foveate.merge_attention(out, lse, out, lse.mT)
        with raises("[2, 5, 4, 8]", "[2, 6, 4, 8]"):
            foveate.merge_attention(out, lse, torch.zeros(2, 6, 4, 8), torch.zeros(2, 4, 6))

    def test_dtypes(self):
        out, lse = torch.zeros(2, 5, 4, 8), torch.zeros(2, 4, 5)
        with raises("float32", "float16"):
            foveate.merge_attention(out, lse, out.half(), lse)


class TestBackends:
    def test_unknown(self):
        with raises("backend", "fast", "native", "reference"):
            foveate.attention(*qkv(), backend="fast")

    def test_unsupported_names_the_alternatives(self):
        # triton serves no tensors on the CPU outside its interpreter.
        if foveate.backends()["triton"] is None:
            pytest.skip("triton runs here")
        with pytest.raises(foveate.UnsupportedError, match=sentence("triton", "reference")):
            foveate.attention(*qkv(), backend="triton")

    def test_unsupported_is_a_value_error(self):
        assert issubclass(foveate.UnsupportedError, ValueError)


def test_positional_options_are_refused():
    with pytest.raises(TypeError, match="positional"):
        foveate.attention(*qkv(), True)


@pytest.mark.parametrize("error", [TypeError, ValueError])  # the second until 1.0: attention raised it alone before
def test_a_dtype_that_does_not_fit_is_a_type_error(error):
    q, lens = torch.randn(1, 2, 2, 8), torch.tensor([2])
    with pytest.raises(error, match="cast them to one"):
        foveate.attention(q, q.half(), q)
    with pytest.raises(error, match="cast q to the cache's dtype"):
        foveate.attention_with_kv_cache(q, q.half(), q.half(), kv_lens=lens)
