"""LoRA adapters in the native decoder: what the torch modules give, in one step with others and none, row by row the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_native_decoder import make as make_simple
from test_native_decoder import quantized
from test_native_families import DENSE, EXPERTS
from test_native_families import make as make_family
from torch import Tensor, nn

import foveate
from foveate.generation.lora import Adapter, Adapters
from foveate.models.native_adapter import NativeAdapter
from foveate.models.native_decoder import NativeDecoder
from foveate.nn import PackedLinear

pytestmark = [pytest.mark.kernels, pytest.mark.linear_kernels]

PROMPTS = torch.arange(6 * 5).view(6, 5) * 7 % 97
NEXT = torch.arange(6 * 3).view(3, 6, 1) * 11 % 97
ORDER = (None, "few", "all", None, "all", "few")  # of the rows of a batch
SCALE = 0.7


def adapter(model: nn.Module, name: str, rank: int, ends: tuple[str, ...]) -> Adapter:
    """Of the layers whose names end so; called `name`."""
    generator = torch.Generator().manual_seed(rank)
    pairs = {}
    for layer, module in model.named_modules():
        of_layers = layer.startswith(("model.layers.", "transformer.h."))
        if not isinstance(module, PackedLinear) or not of_layers or not layer.endswith(ends):
            continue
        a = nn.Linear(module.in_features, rank, bias=False)
        b = nn.Linear(rank, module.out_features, bias=False)
        for part, scale in ((a, 0.3), (b, 0.3 * SCALE)):
            part.weight.data = scale * torch.randn(part.weight.shape, generator=generator)
        pairs[layer] = (PackedLinear.from_linear(a), PackedLinear.from_linear(b))
    assert pairs
    runs = NativeAdapter.unsupported(model, pairs) is None
    assert runs or model.config.experts is not None
    return Adapter(name, Path(), rank, -rank, pairs, NativeAdapter(model, pairs) if runs else None)


def two(native: NativeDecoder) -> dict[str | None, Adapter | None]:
    few = ("q_proj", "v_proj", "o_proj", "down_proj", "c_proj")
    return {
        None: None,
        "all": adapter(native.model, "all", 4, ("",)),
        "few": adapter(native.model, "few", 9, few),
    }


@torch.no_grad()
def run(native: Any, adapters: Adapters, chosen: list[Adapter | None], rows: list[int]) -> Tensor:
    """[rows, 5 + 3, hidden]: a prompt and three steps."""
    c = native.config
    cache = foveate.PagedKVCache(
        40, 4, num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, dtype=torch.float32
    )
    seqs = [cache.create() for _ in rows]
    hidden = []
    for tokens in (PROMPTS, *NEXT):
        cache.append(seqs, tokens.shape[1])
        view = foveate.CacheView(cache, seqs, tokens.shape[1])
        hidden.append(adapters.hidden(native, tokens[rows], view, chosen))
    return torch.cat(hidden, 1)


def without_native(chosen: list[Adapter | None]) -> list[Adapter | None]:
    return [None if a is None else Adapter(a.name, a.folder, a.rank, a.root, a.pairs) for a in chosen]


@pytest.mark.parametrize("format", [None, "q8_0"])
@pytest.mark.parametrize("name", ["llama_biases", "gemma2", "gpt2", "parallel", "plain_norm", "norms_behind", "sinks"])
def test_equals_the_modules_with_rows_of_others(name: str, format: str | None) -> None:
    model = make_family(DENSE[name]) if name in DENSE else make_simple(name)
    native = NativeDecoder(quantized(model, format) if format else model)
    adapters, made = Adapters(model), two(native)
    for one in made.values():
        if one is not None:
            adapters.add(one)
    chosen = [made[name] for name in ORDER]
    rows = list(range(len(ORDER)))
    mine = run(native, adapters, chosen, rows)
    theirs = run(native, adapters, without_native(chosen), rows)
    base = run(native, adapters, [None] * len(rows), rows)
    for i, one in enumerate(chosen):
        far = (mine[i] - base[i]).norm() / base[i].norm()
        if one is None:
            assert far == 0  # the bits
        else:
            assert (mine[i] - theirs[i]).norm() / base[i].norm() < (2e-5 if format is None else 0.02) < 0.1 < far
    threads = torch.get_num_threads()
    try:  # the same bits alone as in the batch, whatever the number of threads is
        for i, count in enumerate((1, 3, 2, 1, 2, 3)):
            torch.set_num_threads(count)
            assert torch.equal(run(native, adapters, [chosen[i]], [i])[0], mine[i]), f"row {i}, {count} threads"
    finally:
        torch.set_num_threads(threads)


def test_equals_weights_with_the_update_in_them() -> None:
    model, merged = make_simple("qwen3"), make_simple("qwen3")
    merged.load_state_dict(model.state_dict())
    native = NativeDecoder(model)
    made = two(native)["all"]
    assert made is not None
    for layer, (a, b) in made.pairs.items():
        merged.get_submodule(layer).weight.data += b.dequantize() @ a.dequantize()  # type: ignore[operator, union-attr]
    mine = run(native, Adapters(model), [made] * 6, list(range(6)))
    theirs = run(NativeDecoder(merged), Adapters(merged), [None] * 6, list(range(6)))
    assert F.cosine_similarity(mine, theirs, dim=-1).min() > 1 - 1e-5
    torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)


def test_adapters_of_experts_run_on_the_modules() -> None:
    model = make_family(EXPERTS["softmax"])
    native = NativeDecoder(model)
    adapters, made = Adapters(model), adapter(model, "all", 4, ("_proj",))
    assert made.native is None and "experts" in str(NativeAdapter.unsupported(model, made.pairs))
    adapters.add(made)
    mine = run(native, adapters, [made, None], [0, 1])
    base = run(native, adapters, [None, None], [0, 1])
    assert torch.equal(mine[1], base[1]) and (mine[0] - base[0]).norm() > 0.1 * base[0].norm()


def test_of_another_model_is_refused() -> None:
    native, other = NativeDecoder(make_simple("llama")), NativeDecoder(make_simple("qwen3"))
    made = adapter(other.model, "other", 4, ("",))
    with pytest.raises(ValueError, match="A and B are"):
        run(native, Adapters(native.model), [made], [0])
    assert made.native is not None
    with pytest.raises(ValueError, match="cache"):
        native.hidden(PROMPTS[:1], None, [(made.native, 1)])
