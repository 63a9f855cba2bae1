"""NativeDecoder: a causal language model on the CPU with all its layers in one native call per step (csrc/decoder/decoder.cpp)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backend import native
from foveate.cache.view import CacheView
from foveate.models.addresses import Addresses
from foveate.models.gpt2 import GPT2
from foveate.models.layers import LayerNorm, PackedEmbedding, RMSNorm
from foveate.models.llama import Llama
from foveate.nn import PackedLinear
from foveate.ops.attention.plan import step_plan
from foveate.ops.attention.with_kv_cache_op import QUANTIZED
from foveate.quantization.panels import FLOATS

_C = native._C

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


class NativeDecoder:
    """A Llama or GPT2 of `foveate.models` on the CPU, with the same hidden, logits, forward and config.

    Building it packs every nn.Linear of the model in place (`nn.PackedLinear`, "f32", "bf16" or "f16" after its dtype; a tied embedding
    becomes the packed head's rows), so weights are not held twice and the model keeps working. hidden(tokens, cache) is one native
    call; the stream between the layers is fp32 whatever the weights are, and so is the result. The cache may store float32,
    bfloat16, float16, int8 or float8_e4m3fn whatever the weights are. Without a cache the model's own torch code runs.

    The native object knows addresses of weights. Before each step (of an Engine with weights_fixed: before the first step after each
    new request) they are compared with the model's (`Addresses`), and after share_memory(), to(), load_state_dict or a new layer it is
    built again. A copy or a pickle is the model's, built where it arrives.

    The result of a sequence has the same bits whatever its batch and the number of threads are. Steps of 32 tokens and more attend
    with another kernel than shorter ones, so prompts in other chunks agree within rounding only. Not differentiable.
    Raises ValueError with `unsupported(model)`.
    """

    # Called in each step just before the kernels, which leave the interpreter to other threads: so that these do not hold up the next
    # step's Python.
    before_kernels: Callable[[], None] | None = None
    # Whether weights are compared before each step; an Engine puts it off within calls in which nothing can change them.
    looks_at_weights = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._build(1)
        self.config: Any = model.config

    @torch.no_grad()
    def _build(self, positions: int) -> None:
        """positions: of the rotary table, at least."""
        reason = self.unsupported(self.model)
        if reason is not None:
            raise ValueError(reason)
        self._borrowed: list[Tensor] = []  # what the native object points to
        _pack(self.model)
        self._positions = positions
        self._native = self._llama(self.model) if isinstance(self.model, Llama) else self._gpt2(self.model)
        self._addresses = Addresses(self.model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        NativeDecoder.__init__(self, state["model"])

    def _current(self, positions: int) -> tuple[Any, list[Tensor]]:
        """The native object for the weights as they are, for sequences of up to `positions`, and what it points to."""
        if positions > self._positions or (self.looks_at_weights and self._addresses.changed()):
            self._build(max(positions, self._positions))
        return self._native, self._borrowed

    @staticmethod
    def unsupported(model: nn.Module) -> str | None:
        """None, or the sentence why this model cannot run here."""
        if native.missing_reason is not None:
            return native.missing_reason
        if not isinstance(model, Llama | GPT2):
            return f"NativeDecoder runs the Llama family and GPT-2, not {type(model).__name__}; call the model itself"
        if isinstance(model, Llama) and (part := _beyond(model.config)) is not None:
            return f"NativeDecoder has no {part}; call the model itself"
        if model.config.activation not in _ACTIVATIONS:
            return f"NativeDecoder knows the activations {', '.join(_ACTIVATIONS)}, not {model.config.activation}; call the model itself"
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
            for group in groups:
                kinds = {_kind(getattr(module, part)) for part in group if getattr(module, part, None) is not None}
                if len(kinds) > 1:
                    return f"{' and '.join(group)} of {name} are {' and '.join(sorted(kinds))}; they must share one kind of format"
        return None

    @torch.no_grad()
    def hidden(self, tokens: Tensor, cache: CacheView | None = None) -> Tensor:
        """tokens int64 [B, S] -> fp32 [B, S, hidden] after the final norm; see the model's hidden."""
        if cache is None:
            return self.model.hidden(tokens).float()
        if tokens.dtype is not torch.int64 or tokens.shape != (len(cache.seqs), cache.new):
            raise ValueError(
                f"tokens is {tokens.dtype} {list(tokens.shape)}; the step of the cache needs int64 {[len(cache.seqs), cache.new]}"
            )
        pages = cache.cache
        pages.check_writable(cache.seqs, cache.new)
        decoder, borrowed = self._current(cache.capacity)
        x = self._embed(tokens, cache)
        config, (B, S) = self.config, tokens.shape
        Hq, Hkv, D = config.num_heads, config.num_kv_heads, config.head_dim
        threads, quantized = torch.get_num_threads(), pages.k_pages.dtype in QUANTIZED
        capacity = cache.block_table.shape[1] * pages.page_size
        plan = step_plan(B, S, Hq, Hkv, D, capacity, threads, quantized)
        if self.before_kernels is not None:
            self.before_kernels()
        decoder.step(
            x, cache.lens, cache.block_table, pages.k_pages, pages.v_pages, pages.k_scale, pages.v_scale, plan, threads
        )
        del borrowed  # alive until here, whatever another thread has built meanwhile
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
        return x.float().contiguous()

    def _keep(self, x: Tensor | None) -> Tensor | None:
        """x in fp32 for the native object, which does not own it."""
        if x is None:
            return None
        x = x.detach().float().contiguous()
        self._borrowed.append(x)
        return x

    def _weight(self, linear: PackedLinear | None) -> tuple[Any, ...] | None:
        if linear is None:
            return None
        if not isinstance(linear, PackedLinear):
            raise ValueError(
                f"NativeDecoder runs packed linear layers, not a {type(linear).__name__}; call the model itself"
            )
        self._borrowed.append(linear.data)
        return linear.data, self._keep(linear.bias), linear.format, linear.in_features, linear.out_features

    def _norm(self, norm: RMSNorm | LayerNorm | nn.LayerNorm) -> tuple[Any, ...]:
        if isinstance(norm, LayerNorm):
            assert norm.weight is not None
            return "layer", self._keep(norm.weight.float() + norm.offset), self._keep(norm.bias), norm.eps
        if isinstance(norm, nn.LayerNorm):
            return "layer", self._keep(norm.weight), self._keep(norm.bias), norm.eps
        return "rms", self._keep(norm.weight.float() + norm.offset if norm.offset else norm.weight), None, norm.eps

    def _llama(self, model: Any) -> Any:
        c = model.config
        cos = sin = None
        if c.learned_positions is None:
            tables = model.rotary.tables(torch.device("cpu"), length=self._positions)
            cos, sin = map(self._keep, tables)
        # no more are needed
        self._positions = 2**31 if cos is None or len(cos) == c.max_positions else len(cos)
        decoder = _C.Decoder(
            hidden=c.hidden_size, inner=c.intermediate_size, heads_q=c.num_heads, heads_kv=c.num_kv_heads, head_dim=c.head_dim,
            softcap=c.attn_softcap or 0.0, activation=_ACTIVATIONS[c.activation], final_norm=self._norm(model.model.norm),
            rotary_cos=cos, rotary_sin=sin,
        )  # fmt: skip
        for i, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            options: dict[str, Any] = {"mlp_norm": layer.post_attention_layernorm}
            if layer.post_norms:
                options = {
                    "mlp_norm": layer.pre_feedforward_layernorm,
                    "attention_out_norm": layer.post_attention_layernorm,
                    "mlp_out_norm": layer.post_feedforward_layernorm,
                }
            options = {name: self._norm(norm) for name, norm in options.items()}
            if c.qk_norm:
                options["q_norm"], options["k_norm"] = (
                    self._keep(attention.q_norm.weight + c.norm_offset),
                    self._keep(attention.k_norm.weight + c.norm_offset),
                )
                options["head_norm_eps"] = c.norm_eps
            decoder.add_layer(
                attention_norm=self._norm(layer.input_layernorm), q=self._weight(attention.q_proj), k=self._weight(attention.k_proj),
                v=self._weight(attention.v_proj), o=self._weight(attention.o_proj), gate=self._weight(mlp.gate_proj),
                up=self._weight(mlp.up_proj), down=self._weight(mlp.down_proj), scale=c.scale or c.head_dim**-0.5,
                window_left=-1 if c.windows[i] is None else c.windows[i] - 1, **options,
            )  # fmt: skip
        return decoder

    def _gpt2(self, model: Any) -> Any:
        c = model.config
        self._positions = 2**31  # its positions are an embedding
        decoder = _C.Decoder(
            hidden=c.hidden_size, inner=c.intermediate_size, heads_q=c.num_heads, heads_kv=c.num_heads, head_dim=c.head_dim,
            softcap=0.0, activation=_ACTIVATIONS[c.activation], final_norm=self._norm(model.transformer.ln_f),
            rotary_cos=None, rotary_sin=None,
        )  # fmt: skip
        for layer, scale in zip(model.transformer.h, c.scales):
            decoder.add_layer(
                attention_norm=self._norm(layer.ln_1), q=self._weight(layer.attn.c_attn), o=self._weight(layer.attn.c_proj),
                mlp_norm=self._norm(layer.ln_2), up=self._weight(layer.mlp.c_fc), down=self._weight(layer.mlp.c_proj), scale=scale,
            )  # fmt: skip
        return decoder


def _beyond(config: Any) -> str | None:
    """The first part of the config that csrc/decoder does not compute."""
    parts = {
        "mixture of experts": config.experts is not None,
        "attention sinks": config.sinks,
        "ALiBi": config.alibi,
        "layer norms without a bias": config.norm not in ("rms", "layer_bias"),
        "norm of the embedding": config.embed_norm,
        "layers without a norm before them": not config.pre_norms,
        "parallel blocks": bool(config.parallel),
        "norms of q and k but RMSNorm of each head": config.qk_norm not in ("", False, True, "rms"),
        "norms after RoPE": config.qk_norm_after_rope,
        "clipped q, k and v": config.clip_qkv is not None,
        "residual scale": config.residual_scale is not None,
        "interleaved RoPE": config.rope_interleaved,
        "RoPE of several kinds": any(kind != "global" for kind in config.rope_layers),
        "RoPE with factors for long texts": (config.rope_scaling or {}).get(
            "rope_type", (config.rope_scaling or {}).get("type")
        )
        in ("longrope", "su"),
    }
    return next((part for part, there in parts.items() if there), None)


def _kind(linear: nn.Module) -> str:
    """Formats of one kind round their input in the same way."""
    if isinstance(linear, PackedLinear):
        return linear.format if linear.format in FLOATS else "blocks"
    if not isinstance(linear, nn.Linear):
        return type(linear).__name__
    return next(name for name, dtype in FLOATS.items() if dtype is linear.weight.dtype)


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
