"""NativeDecoder: a causal language model on the CPU with all its layers in one native call per step (csrc/decoder)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backend import native
from foveate.cache.view import CacheView
from foveate.models.addresses import Addresses
from foveate.models.experts import Experts
from foveate.models.gpt2 import GPT2
from foveate.models.layers import PackedEmbedding
from foveate.models.llama import Llama
from foveate.models.native_adapter import NativeAdapter
from foveate.models.native_layers import ACTIVATIONS, ALL_POSITIONS, NativeLayers
from foveate.nn import PackedLinear
from foveate.ops.attention.plan import step_plan
from foveate.ops.attention.with_kv_cache_op import QUANTIZED
from foveate.quantization.panels import FLOATS
from foveate.quantization.scaled_blocks import ON_FLOATS


class NativeDecoder:
    """A Llama or GPT2 of `foveate.models` on the CPU, with the same hidden, logits, forward and config.

    Building it packs every nn.Linear of the model in place (`nn.PackedLinear`, "f32", "bf16" or "f16" after its dtype; a tied embedding
    becomes the packed head's rows), so weights are not held twice and the model keeps working. hidden(tokens, cache) is one native
    call; the stream between the layers is fp32 whatever the weights are, and so is the result. The cache may store float32,
    bfloat16, float16, int8 or float8_e4m3fn whatever the weights are. Without a cache the model's own torch code runs.

    The native object knows addresses of weights. Before each step (of an Engine with weights_fixed: before the first step after each
    new request) they are compared with the model's (`Addresses`), and after share_memory(), to(), load_state_dict or a new layer it is
    built again. A copy or a pickle is the model's, built where it arrives.

    The result of a sequence has the same bits whatever its batch and the number of threads are. Prompts attend with another kernel
    than what is generated. Where the view says which of them a step is (CacheView.prompt), a prompt's bits do not depend on how it is
    divided into steps; where it does not, a step of 32 tokens and more is a prompt. Not differentiable.
    Raises ValueError with `unsupported(model)`.
    """

    # Called in each step just before the kernels, which leave the interpreter to other threads: so that these do not hold up the next
    # step's Python.
    before_kernels: Callable[[], None] | None = None
    # Whether weights are compared before each step; an Engine puts it off within calls in which nothing can change them.
    looks_at_weights = True
    kernel_seconds = 0.0  # in the native calls of all steps

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._build(1)
        self.config: Any = model.config

    def _build(self, positions: int) -> None:
        """positions: of the rotary tables, at least."""
        reason = self.unsupported(self.model)
        if reason is not None:
            raise ValueError(reason)
        with torch.no_grad():
            _pack(self.model)
        self._layers = NativeLayers(self.model, positions)
        self._addresses = Addresses(self.model)
        self._long = self._has_long_factors()

    def _has_long_factors(self) -> bool:
        """Whether RoPE runs with its factors for long texts, see Llama.set_context."""
        return isinstance(self.model, Llama) and self.model.rotary.long

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        NativeDecoder.__init__(self, state["model"])

    def _current(self, positions: int) -> NativeLayers:
        """Those for the weights as they are, for sequences of up to `positions`."""
        layers = self._layers
        if (
            positions > layers.positions
            or self._long != self._has_long_factors()
            or (self.looks_at_weights and self._addresses.changed())
        ):
            self._build(max(positions, layers.positions) if layers.positions < ALL_POSITIONS else positions)
        return self._layers

    @staticmethod
    def unsupported(model: nn.Module) -> str | None:
        """None, or the sentence why this model cannot run here."""
        if native.missing_reason is not None:
            return native.missing_reason
        if not isinstance(model, Llama | GPT2):
            return f"NativeDecoder runs the Llama family and GPT-2, not {type(model).__name__}; call the model itself"
        if isinstance(model, Llama) and model.config.latent is not None:
            return "NativeDecoder has no latent attention (MLA); call the model itself"
        if model.config.activation not in ACTIVATIONS:
            return f"NativeDecoder knows the activations {', '.join(ACTIVATIONS)}, not {model.config.activation}; call the model itself"
        for name, parameter in model.named_parameters():
            if parameter.device.type != "cpu":
                return f"NativeDecoder runs on the CPU; {name} is on {parameter.device}"
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.weight.dtype not in FLOATS.values():
                return (
                    f"{name} is {module.weight.dtype}; NativeDecoder packs float32, bfloat16 and float16: use .to(...)"
                )
        for name, module in model.named_modules():
            groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
            if isinstance(module, Experts):
                for part in ("up_proj", "down_proj"):
                    kinds = {_kind(expert.get_submodule(part)) for expert in module.experts}
                    if len(kinds) > 1:
                        return f"{part} of the experts of {name} are {' and '.join(sorted(kinds))}; they must share one kind of format"
            for group in groups:
                kinds = {_kind(getattr(module, part)) for part in group if getattr(module, part, None) is not None}
                if len(kinds) > 1:
                    return f"{' and '.join(group)} of {name} are {' and '.join(sorted(kinds))}; they must share one kind of format"
        return None

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, cache: CacheView | None = None, adapters: Sequence[tuple[NativeAdapter, int]] = ()
    ) -> Tensor:
        """tokens int64 [B, S] -> fp32 [B, S, hidden] after the final norm; see the model's hidden.

        adapters: each with how many rows of the batch it has, one after the other up to the last row; the rows in front of them have
        none, and the bits that they have without others. They need a cache.
        """
        if cache is None:
            if adapters:
                raise ValueError("adapters run in a step of a cache; give the cache's view")
            return self.model.hidden(tokens).float()
        if tokens.dtype is not torch.int64 or tokens.shape != (len(cache.seqs), cache.new):
            raise ValueError(
                f"tokens is {tokens.dtype} {list(tokens.shape)}; the step of the cache needs int64 {[len(cache.seqs), cache.new]}"
            )
        pages = cache.cache
        pages.check_writable(cache.seqs, cache.new)
        layers = self._current(cache.capacity)
        x = self._embed(tokens, cache)
        config, (B, S) = self.config, tokens.shape
        Hq, Hkv, D = config.num_heads, config.num_kv_heads, config.head_dim
        threads, quantized = torch.get_num_threads(), pages.k_pages.dtype in QUANTIZED
        capacity = cache.block_table.shape[1] * pages.page_size
        plan = step_plan(B, S, Hq, Hkv, D, capacity, threads, quantized, cache.prompt)
        first, parts = S * (B - sum(rows for _, rows in adapters)), []
        for adapter, rows in adapters:
            parts.append((adapter.native, first, S * rows))
            first += S * rows
        if self.before_kernels is not None:
            self.before_kernels()
        began = time.perf_counter()
        layers.decoder.step(
            x, cache.lens, cache.block_table, pages.k_pages, pages.v_pages, pages.k_scale, pages.v_scale, plan, threads,
            *([parts] if parts else ()),
        )  # fmt: skip
        self.kernel_seconds += time.perf_counter() - began
        del layers  # alive until here, whatever another thread has built meanwhile
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., hidden] -> [..., vocab] in hidden's dtype."""
        with torch.no_grad():
            return self.model.logits(hidden)

    def forward(self, tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        return self.logits(self.hidden(tokens, cache))

    __call__ = forward

    def _embed(self, tokens: Tensor, cache: CacheView) -> Tensor:
        """fp32 [B, S, hidden], memory of its own."""
        if isinstance(self.model, GPT2):
            decoder = self.model.transformer
            x = decoder.wte(tokens) + decoder.wpe(cache.positions())
        else:
            x = self.model.model.embed_tokens(tokens)
            if self.config.embed_scale is not None:
                x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)
            if self.config.learned_positions is not None:
                x = x + self.model.model.embed_positions(cache.positions() + self.config.learned_positions)
            if self.model.model.embed_norm is not None:
                x = self.model.model.embed_norm(x)
        return x.float().contiguous()


def _kind(linear: nn.Module) -> str:
    """Formats of one kind round their input in the same way."""
    if isinstance(linear, PackedLinear):
        return _kind_of_rows(linear.format)
    if not isinstance(linear, nn.Linear):
        return type(linear).__name__
    return _kind_of_rows(next(name for name, dtype in FLOATS.items() if dtype is linear.weight.dtype))


def _kind_of_rows(format: str) -> str:
    if format in ("f32", "f16", *ON_FLOATS):
        return "fp32"
    return format if format in FLOATS else "blocks"


def _pack(model: nn.Module) -> None:
    """Every nn.Linear becomes a PackedLinear, one at a time; an embedding that shares the head's weight becomes its rows."""
    tables = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        packed = PackedLinear.from_linear(module)
        if id(module.weight) in tables:
            model.set_submodule(tables[id(module.weight)], PackedEmbedding(packed, module.weight.dtype))
        model.set_submodule(name, packed)
