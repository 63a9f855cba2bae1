"""Calls of every compiled function that are valid but for a few arguments, in processes of their own: what they look for is a dead process.

`python tests/support/native_fuzz.py SEED FIRST COUNT` runs cases FIRST.. of a seed; a case depends on nothing but its number. The names of
the functions that returned and of those that raised go to standard output. The case under way goes to the file named by FOVEATE_FUZZ_CASE.
"""

from __future__ import annotations

import collections
import os
import random
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.backend import native
from foveate.quantization.panels import pack_floats

C: Any = native._C
Arguments = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.int32, torch.int64, torch.bool)
FLOATS = DTYPES[:4]
NUMBERS = (0, 1, -1, 2, 3, 8, 7.5, -0.5, float("nan"), float("inf"), 2**31 - 1, 2**31, -(2**31), 2**40, 2**62, 2**63 - 1, -(2**63), 2**70,
           True, None, "x", b"", (), [1])  # fmt: skip
HAS_EXCHANGE = C.uses_dlpack_exchange()  # from torch 2.10 on
EXPECTED = (ValueError, TypeError, MemoryError, BufferError, RuntimeError)


def something(rng: random.Random, like: Any) -> Any:
    """Another value in place of `like`, of its kind most of the time."""
    if isinstance(like, tuple) and like and rng.random() < 0.8:  # a norm or a weight of the decoder
        i = rng.randrange(len(like))
        return (*like[:i], something(rng, like[i]), *like[i + 1 :])
    if not isinstance(like, Tensor):
        return rng.choice(NUMBERS) if rng.random() < 0.85 else some_tensor(rng)
    kind = rng.randrange(11)
    if kind == 0:
        return like.to(rng.choice(DTYPES))
    if kind == 1 and like.dim() > 1:
        return like.transpose(rng.randrange(like.dim()), rng.randrange(like.dim()))
    if kind == 2 and like.dim() > 0:
        return like.narrow(rng.randrange(like.dim()), 0, 0)
    if kind == 3 and like.dim() > 0:
        return torch.cat([like, like], dim=rng.randrange(like.dim()))
    if kind == 4:
        return like.unsqueeze(rng.randrange(like.dim() + 1))
    if kind == 5:
        return like.to("meta")
    if kind == 6 and like.dim() > 0 and like.numel() > 0:
        return like.flatten()[:1].expand(like.shape)
    if kind == 7 and like.dim() > 0:  # every other element of a larger one
        return torch.stack([like, like], -1)[..., 0]
    if kind == 8:
        return torch.full_like(like, rng.choice((0, 1, -1, 100)))
    if kind == 9 and not like.is_floating_point() and like.dtype != torch.bool:
        extreme = torch.iinfo(like.dtype)
        return torch.full_like(like, rng.choice((extreme.min, extreme.max)))
    return rng.choice((None, some_tensor(rng)))


def some_tensor(rng: random.Random) -> Tensor:
    shape = [rng.choice((0, 1, 2, 3, 8)) for _ in range(rng.randrange(7))]
    return torch.zeros(shape).to(rng.choice(DTYPES))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sizes(rng: random.Random, n: int, choices: tuple[int, ...] = (0, 1, 2, 5, 19)) -> list[int]:
    return [rng.choice(choices) for _ in range(n)]


def attention(rng: random.Random, backward: bool) -> Arguments:
    B, Sq, Skv, Hkv, G, D, Dv = sizes(rng, 7)
    Hq, dtype = Hkv * G, rng.choice(FLOATS)
    acc, varlen = accumulator(dtype), rng.random() < 0.3
    lead_q, lead_k = ((B * Sq,), (B * Skv,)) if varlen else ((B, Sq), (B, Skv))
    q, k = torch.randn(*lead_q, Hq, D).to(dtype), torch.randn(*lead_k, Hkv, D).to(dtype)
    v, out = torch.randn(*lead_k, Hkv, Dv).to(dtype), torch.zeros(*lead_q, Hq, Dv, dtype=dtype)
    lse = torch.zeros((Hq, B * Sq) if varlen else (B, Hq, Sq), dtype=acc)
    table = torch.randn(4, Hq, dtype=acc)
    buckets = torch.zeros(max(Sq + Skv - 1, 0), dtype=torch.int32)
    tensors = {"bias": torch.randn(B, 1, Sq, Skv).to(dtype), "mask": torch.ones(1, Hq, 1, Skv, dtype=torch.bool),
               "alibi": torch.rand(1, Hq), "rel_table": table, "sinks": torch.randn(Hq, dtype=acc),
               "kv_lens": torch.full((B,), Skv)}  # fmt: skip
    options: Arguments = {name: x if rng.random() < 0.5 else None for name, x in tensors.items()}
    if varlen:
        options |= dict.fromkeys(("bias", "mask", "kv_lens"))
    options["cu_q"] = torch.arange(B + 1) * Sq if varlen else None
    options["cu_k"] = torch.arange(B + 1) * Skv if varlen else None
    options |= {"philox": torch.tensor([1, 2]), "max_q": Sq, "max_k": Skv, "causal": rng.random() < 0.5,
                "window_left": rng.choice((-1, 3)), "window_right": -1, "scale": 0.5, "softcap": rng.choice((0.0, 2.0)),
                "rel_bidirectional": True, "rel_max_distance": 0, "dropout_p": rng.choice((0.0, 0.5)), "deterministic": True,
                "backend": ""}  # fmt: skip
    options |= {"rel_buckets": None if options["rel_table"] is None else buckets, "threads": rng.choice((1, 2, 3))}
    main = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
    if not backward:
        return main | options | {"plan": (rng.choice((1, 1, 2)), 0, max(1, Sq * G), max(1, Hkv), rng.random() < 0.5)}
    wanted = {"dbias": ("bias", torch.zeros(B, 1, Sq, Skv, dtype=acc)), "drel_table": ("rel_table", torch.zeros_like(table)),
              "dsinks": ("sinks", torch.zeros(Hq, dtype=acc))}  # fmt: skip
    extra = {name: None if options[source] is None else x for name, (source, x) in wanted.items()}
    grads = {f"d{name}": torch.zeros_like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    first = {"dout": torch.zeros_like(out), "dlse": rng.choice((None, torch.zeros_like(lse)))}
    return first | main | grads | extra | {"workspace": lambda n: torch.zeros(n, dtype=torch.uint8)} | options


def kv_cache(rng: random.Random) -> Arguments:
    B, Sq, Hkv, G, D, Dv, pages, size = (
        *sizes(rng, 1, (1, 2, 3)), *sizes(rng, 1, (0, 1, 4, 60)), *sizes(rng, 2, (1, 2)), *sizes(rng, 2, (0, 8, 16, 40)), 6, 4,
    )  # fmt: skip
    dtype = rng.choice(FLOATS[:3])
    storage = torch.int8 if rng.random() < 0.3 else dtype
    paged, Hq = rng.random() < 0.5, Hkv * G
    shape = (pages, size, Hkv) if paged else (B, 2 * size, Hkv)
    k_cache, v_cache = torch.zeros(*shape, D, dtype=storage), torch.zeros(*shape, Dv, dtype=storage)
    scale = rng.choice((torch.ones(shape), torch.ones(Hkv), torch.ones(()))) if storage == torch.int8 else None
    table, splits = torch.arange(B * 2, dtype=torch.int32).remainder(pages).view(B, 2), rng.choice((1, 1, 2))
    pairs = min(4, D // 2)
    rotary = torch.ones(100, pairs) if rng.random() < 0.3 else None
    return {
        "q": torch.randn(B, Sq, Hq, D).to(dtype), "k_cache": k_cache, "v_cache": v_cache, "k": torch.randn(B, 1, Hkv, D).to(dtype),
        "v": torch.randn(B, 1, Hkv, Dv).to(dtype), "kv_lens": torch.full((B,), 5), "out": torch.zeros(B, Sq, Hq, Dv, dtype=dtype),
        "lse": torch.zeros(B, Hq, Sq), "partial_out": torch.zeros(splits, B, Hq, Sq, Dv), "partial_lse": torch.zeros(splits, B, Hq, Sq),
        "q_rotated": torch.zeros(B, Sq, Hq, D, dtype=dtype), "counters": None, "block_table": table if paged else None,
        "rotary_cos": rotary, "rotary_sin": rotary, "rotary_interleaved": False,
        "k_scale": scale, "v_scale": None if scale is None else scale.clone(), "num_splits": 0, "batch_invariant": False, "backend": "",
        "alibi_slopes": rng.choice((None, torch.rand(1, Hq))), "sinks": rng.choice((None, torch.randn(Hq))), "causal": True,
        "window_left": -1, "window_right": -1, "scale": 0.25, "softcap": 0.0,
        "plan": (splits, 0, max(1, Sq * G), Hkv, storage == dtype and rng.random() < 0.3), "threads": 2,
    }  # fmt: skip


def softmax(rng: random.Random, backward: bool) -> Arguments:
    dtype, shape = rng.choice(FLOATS), sizes(rng, rng.randrange(1, 4), (0, 1, 2, 5, 70))
    x = torch.randn(shape).to(dtype)
    if backward:
        return {
            "dout": x,
            "out": x.clone(),
            "dx": torch.zeros_like(x),
            "scale": 1.0,
            "log": rng.random() < 0.3,
            "threads": 2,
        }
    log = rng.random() < 0.3
    bias = None if log or rng.random() < 0.5 else torch.randn(shape).to(dtype)
    mask = None if log or rng.random() < 0.5 else torch.ones(shape, dtype=torch.bool)
    return {"x": x, "bias": bias, "mask": mask, "out": torch.zeros_like(x), "scale": 1.0, "causal": not log and len(shape) > 1, "log": log,
            "threads": 2}  # fmt: skip


def softmax_columns(rng: random.Random, backward: bool) -> Arguments:
    x = torch.randn(sizes(rng, 3, (0, 1, 2, 5, 70))).to(rng.choice(FLOATS))
    rest = {"scale": 1.0, "log": rng.random() < 0.3, "threads": 2}
    if backward:
        return {"dout": x, "out": x.clone(), "dx": torch.zeros_like(x)} | rest
    return {"x": x, "out": torch.zeros_like(x)} | rest


def cross_entropy(rng: random.Random, backward: bool) -> Arguments:
    rows, cols, dtype = *sizes(rng, 1), rng.choice((1, 3, 70)), rng.choice(FLOATS)
    logits, acc = torch.randn(rows, cols).to(dtype), accumulator(dtype)
    target, stats = torch.randint(0, cols, (rows,)), torch.zeros(rows, 2, dtype=acc)
    options = {
        "ignore_index": -100,
        "label_smoothing": 0.1,
        "z_loss": 0.1,
        "softcap": rng.choice((0.0, 2.0)),
        "threads": 2,
    }
    if backward:
        return {
            "dloss": torch.ones(rows, dtype=acc),
            "logits": logits,
            "target": target,
            "stats": stats,
            "dlogits": logits.clone(),
        } | options
    return {"logits": logits, "target": target, "loss": torch.zeros(rows, dtype=acc), "stats": stats} | options


def rms_norm(rng: random.Random, backward: bool) -> Arguments:
    rows, cols, dtype = *sizes(rng, 2, (0, 1, 5, 70)), rng.choice(FLOATS)
    x, acc = torch.randn(rows, cols).to(dtype), accumulator(dtype)
    weight, rstd = rng.choice((None, torch.ones(cols, dtype=dtype))), torch.ones(rows, dtype=acc)
    if backward:
        parts = None if weight is None else torch.zeros(2, cols, dtype=acc)
        return {
            "dout": x,
            "x": x.clone(),
            "weight": weight,
            "rstd": rstd,
            "dsum": rng.choice((None, torch.zeros_like(x))),
            "dx": torch.zeros_like(x),
            "dweight_parts": parts,
            "threads": 2,
        }
    added = rng.random() < 0.5
    return {
        "x": x,
        "residual": x.clone() if added else None,
        "weight": weight,
        "out": torch.zeros_like(x),
        "sum": torch.zeros_like(x) if added else None,
        "rstd": rstd,
        "eps": 1e-5,
        "threads": 2,
    }


def rotary(rng: random.Random) -> Arguments:
    (B, S, H), D, dtype = sizes(rng, 3), rng.choice((0, 2, 7, 40)), rng.choice(FLOATS)
    x, table = torch.randn(B, S, H, D).to(dtype), torch.ones(S, D // 2).to(dtype)
    return {"x": x, "cos": table, "sin": table.clone(), "out": torch.zeros_like(x), "interleaved": rng.random() < 0.5, "inverse": False,
            "threads": 2}  # fmt: skip


def weight(rng: random.Random, inner: int, outer: int, format: str | None = None) -> tuple[Any, ...]:
    format = format or rng.choice(("f32", "bf16"))
    return pack_floats(torch.randn(outer, inner), format), None, format, inner, outer


def packed_linear(rng: random.Random) -> Arguments:
    inner, outer, rows = rng.choice((1, 32, 70)), rng.choice((1, 33)), *sizes(rng, 1)
    data, bias, format, _, _ = weight(rng, inner, outer)
    dtype = rng.choice(FLOATS[:3])
    return {"x": torch.randn(rows, inner).to(dtype), "data": data, "format": format, "bias": bias,
            "out": torch.zeros(rows, outer, dtype=dtype), "threads": 2}  # fmt: skip


def packed_rows(rng: random.Random) -> Arguments:
    inner, outer = rng.choice((1, 32, 70)), rng.choice((1, 33))
    data, _, format, _, _ = weight(rng, inner, outer)
    ids = torch.randint(0, outer, (3,))
    return {"data": data, "format": format, "in_features": inner, "out_features": outer, "ids": ids, "out": torch.zeros(3, inner),
            "threads": 2}  # fmt: skip


def copy_pages(rng: random.Random) -> Arguments:
    return {"pool": torch.zeros(2, 5, *sizes(rng, 2, (0, 1, 3))), "from_pages": [0, 1], "to_pages": [2, 3]}


def glu(rng: random.Random, backward: bool) -> Arguments:
    gate = torch.randn(*sizes(rng, 2, (0, 1, 5, 70))).to(rng.choice(FLOATS))
    rest = {"gelu": rng.random() < 0.5, "threads": 2}
    if backward:
        tensors = {name: torch.zeros_like(gate) for name in ("dgate", "dup")}
        return {"dout": gate.clone(), "gate": gate, "up": gate.clone()} | tensors | rest
    return {"gate": gate, "up": gate.clone(), "out": torch.zeros_like(gate)} | rest


def roofline(rng: random.Random, name: str) -> Arguments:
    x, sums = torch.randn(rng.choice((0, 1, 100))), torch.zeros(2)
    if name == "multiply_add":
        return {"sums": sums, "dtype": rng.choice(("float32", "float64", "bfloat16")), "steps": 10, "threads": 2}
    return {"x": x, "threads": 2} | ({"sums": sums} if name == "read_memory" else {"out": torch.zeros_like(x)})


def decoder(rng: random.Random) -> Arguments:
    """The arguments of the decoder's calls, in one dict."""
    heads_kv, group, dim, hidden, inner = (
        *sizes(rng, 2, (1, 2)),
        rng.choice((2, 16)),
        rng.choice((8, 32)),
        rng.choice((8, 40)),
    )
    heads, B, S, size = heads_kv * group, rng.choice((0, 1, 2, 2)), rng.choice((0, 1, 5)), rng.choice((0, 2, 4, 4, 4))
    format = rng.choice(("f32", "bf16"))
    norm, dtype = ("rms", torch.ones(hidden), None, 1e-5), rng.choice(FLOATS[:3])
    pages = torch.zeros(1, 6, size, heads_kv, dim, dtype=dtype)
    tables = [(torch.ones(8, dim // 2), torch.ones(8, dim // 2))] if rng.random() < 0.5 else []

    def mlp() -> tuple[Any, ...]:
        return tuple(weight(rng, *shape, format) for shape in ((hidden, inner), (hidden, inner), (inner, hidden)))

    experts = [mlp() for _ in range(3)] if rng.random() < 0.4 else None
    return {
        "hidden": hidden, "heads_q": heads, "heads_kv": heads_kv, "head_dim": dim, "softcap": 0.0, "activation": "silu",
        "activation_limit": 0.0, "final_norm": norm, "tables": tables,
        "attention_norm": rng.choice((None, norm)), "attention_out_norm": rng.choice((None, norm)), "mlp_norm": norm,
        "mlp_out_norm": None, "q": weight(rng, hidden, heads * dim, format), "k": weight(rng, hidden, heads_kv * dim, format),
        "v": weight(rng, hidden, heads_kv * dim, format), "o": weight(rng, heads * dim, hidden, format), "clip": rng.choice((0.0, 1.0)),
        "q_norm": rng.choice((None, ("rms", torch.ones(dim), None, 1e-5, False))), "k_norm": None, "norms_after_rotary": False,
        "rotary": len(tables) - 1, "interleaved": rng.random() < 0.3, "scale": 0.25, "window_left": rng.choice((-1, 3)),
        "alibi": rng.choice((None, torch.ones(heads))), "sinks": rng.choice((None, torch.zeros(heads))),
        "mlp": mlp() if experts is None else None, "parallel": rng.random() < 0.3, "residual_scale": 1.0,
        "router": weight(rng, hidden, 3, "f32"), "kind": rng.choice(("softmax", "sigmoid")), "choice_bias": None,
        "per_token": rng.choice((1, 2)), "groups": 1, "top_groups": 1, "normalize": True, "experts": experts,
        "shared": rng.choice((None, mlp())), "shared_gate": None,
        "x": torch.zeros(B, S, hidden), "lens": torch.zeros(B, dtype=torch.int32),
        "block_table": torch.arange(4 * B, dtype=torch.int32).remainder(6).view(B, 4), "k_pages": pages, "v_pages": pages.clone(),
        "k_scale": None, "v_scale": None, "plan": (1, 0, max(1, S * group), heads_kv, rng.random() < 0.2), "threads": 2,
    }  # fmt: skip


def adapted_decoder(rng: random.Random) -> Arguments:
    given, rank = decoder(rng), rng.choice((1, 2, 8))
    products = [given[name] for name in "qkvo"] + list(given["mlp"] or (None,) * 3)

    def pair(product: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if product is None or rng.random() < 0.4:
            return None
        columns, rows = product[3:]
        return weight(rng, columns, rank, "f32"), weight(rng, rank, rows, "f32")

    tokens = given["x"].shape[0] * given["x"].shape[1]
    first = rng.choice((0, tokens // 2))
    return given | {"layers": [[pair(product) for product in products]], "first": first, "tokens": tokens - first}


def run_adapted_decoder(*, layers: Any, first: Any, tokens: Any, **given: Any) -> None:
    run_decoder(adapters=[(C.DecoderAdapter(layers), first, tokens)], **given)


def run_decoder(adapters: Any = (), **given: Any) -> None:
    def part(first: str, last: str) -> Arguments:
        names = list(given)
        return {name: given[name] for name in names[names.index(first) : names.index(last) + 1]}

    made = C.Decoder(**part("hidden", "final_norm"), rotary=given["tables"])
    made.add_layer(**part("attention_norm", "residual_scale"))
    if given["experts"] is not None:
        made.add_experts(**part("router", "shared_gate"))
    made.step(**part("x", "threads"), adapters=list(adapters))


def tuple_of(name: str, given: Arguments) -> tuple[Any, ...]:
    """The operands that a function of the module takes as one tuple, out of the arguments given, of which the rest stays."""
    return tuple(given.pop(field) for field in C.operand_names()[name])


def run_attention_backward(**given: Any) -> None:
    grads = tuple(given.pop(f"d{field}") for field in C.operand_names()["Gradients"])
    C.attention_backward(operands=tuple_of("Operands", given), grads=grads, **given)


def run_kv_cache(**given: Any) -> None:
    operands, workspace = tuple_of("CacheOperands", given), tuple_of("CacheWorkspace", given)
    C.attention_with_kv_cache(operands, workspace=workspace, **given)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[random.Random], Arguments]]] = {
    "attention_forward": (
        lambda **a: C.attention_forward(operands=tuple_of("Operands", a), **a),
        lambda rng: attention(rng, False),
    ),
    "attention_backward": (run_attention_backward, lambda rng: attention(rng, True)),
    "attention_with_kv_cache": (run_kv_cache, kv_cache),
    "softmax_forward": (lambda **a: C.softmax_forward(**a), lambda rng: softmax(rng, False)),
    "softmax_backward": (lambda **a: C.softmax_backward(**a), lambda rng: softmax(rng, True)),
    "softmax_columns_forward": (lambda **a: C.softmax_columns_forward(**a), lambda rng: softmax_columns(rng, False)),
    "softmax_columns_backward": (lambda **a: C.softmax_columns_backward(**a), lambda rng: softmax_columns(rng, True)),
    "cross_entropy_forward": (lambda **a: C.cross_entropy_forward(**a), lambda rng: cross_entropy(rng, False)),
    "cross_entropy_backward": (lambda **a: C.cross_entropy_backward(**a), lambda rng: cross_entropy(rng, True)),
    "rms_norm_forward": (lambda **a: C.rms_norm_forward(**a), lambda rng: rms_norm(rng, False)),
    "rms_norm_backward": (lambda **a: C.rms_norm_backward(**a), lambda rng: rms_norm(rng, True)),
    "rotary": (lambda **a: C.rotary(**a), rotary),
    "packed_linear": (lambda **a: C.packed_linear(**a), packed_linear),
    "packed_rows": (lambda **a: C.packed_rows(**a), packed_rows),
    "copy_pages": (lambda **a: C.copy_pages(**a), copy_pages),
    "multiply_add": (lambda **a: C.multiply_add(**a), lambda rng: roofline(rng, "multiply_add")),
    "read_memory": (lambda **a: C.read_memory(**a), lambda rng: roofline(rng, "read_memory")),
    "copy_memory": (lambda **a: C.copy_memory(**a), lambda rng: roofline(rng, "copy_memory")),
    "glu_forward": (lambda **a: C.glu_forward(**a), lambda rng: glu(rng, False)),
    "glu_backward": (lambda **a: C.glu_backward(**a), lambda rng: glu(rng, True)),
    "Decoder": (run_decoder, decoder),
    "DecoderAdapter": (run_adapted_decoder, adapted_decoder),
}
# Take no arguments, or switch how tensors are read, which each case does.
NOT_CALLED = {
    "cpu_target",
    "cpu_targets",
    "cuda_emulated",
    "cuda_info",
    "has_cuda_kernels",
    "operand_names",
    "set_dlpack_exchange",
    "uses_dlpack_exchange",
}


def run_case(seed: int, number: int) -> tuple[str, bool]:
    """The function called, and whether it returned."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(rng.randrange(2**31))
    name = list(CALLS)[number % len(CALLS)]
    function, make = CALLS[name]
    arguments = make(rng)
    if HAS_EXCHANGE:
        C.set_dlpack_exchange(rng.random() < 0.5)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        replaced = rng.choice(list(arguments))
        arguments[replaced] = something(rng, arguments[replaced])
    try:
        function(**arguments)
    except EXPECTED:
        return name, False
    return name, True


def main(seed: int, first: int, count: int) -> None:
    torch.set_num_threads(2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # what asks for too much gets a MemoryError
    returned: collections.Counter[str] = collections.Counter()
    marker = os.environ.get("FOVEATE_FUZZ_CASE")
    file = os.open(marker, os.O_WRONLY | os.O_CREAT) if marker else None
    for number in range(first, first + count):
        if file is not None:
            os.pwrite(file, f"{number:<12}".encode(), 0)
        name, answered = run_case(seed, number)
        returned[f"{name} {'returned' if answered else 'raised'}"] += 1
    for key, n in returned.items():
        print(key, n)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
