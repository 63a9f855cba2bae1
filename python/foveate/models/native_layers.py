"""The object of csrc/decoder for a model's layers: its weights, norms and settings as the native code takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.backend import native
from foveate.models.decoder_config import LOCAL, NONE, LlamaConfig
from foveate.models.experts import Experts
from foveate.models.gpt2 import GPT2
from foveate.models.layers import LayerNorm, RMSNorm
from foveate.models.llama import alibi_slopes
from foveate.nn import PackedLinear
from foveate.quantization.panels import FLOATS, pack_floats

_C = native._C

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "relu": "relu", "relu2": "relu2", "tanh": "tanh", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
_CLAMPED = "clamped_silu"
ALL_POSITIONS = 2**31


class NativeLayers:
    """decoder: the native object. borrowed: the tensors that it points to. positions: how many its rotary tables have."""

    @torch.no_grad()
    def __init__(self, model: Any, positions: int) -> None:
        """positions: that the rotary tables need at least."""
        self.borrowed: list[Tensor] = []
        self.positions = ALL_POSITIONS
        if isinstance(model, GPT2):
            self.decoder = self._gpt2(model)
        else:
            self.decoder = self._llama(model, positions)

    def _keep(self, x: Tensor | None) -> Tensor | None:
        """x in fp32 for the native object, which does not own it."""
        if x is None:
            return None
        x = x.detach().float().contiguous()
        self.borrowed.append(x)
        return x

    def _weight(self, linear: nn.Module | None) -> tuple[Any, ...] | None:
        if linear is None:
            return None
        if not isinstance(linear, PackedLinear):
            raise ValueError(
                f"NativeDecoder runs packed linear layers, not a {type(linear).__name__}; call the model itself"
            )
        self.borrowed.append(linear.data)
        return linear.data, self._keep(linear.bias), linear.format, linear.in_features, linear.out_features

    def _norm(self, norm: RMSNorm | LayerNorm | nn.LayerNorm, times: float = 1.0) -> tuple[Any, ...]:
        """times: of what it gives."""
        weight: Tensor | None = norm.weight
        bias: Tensor | None = None if isinstance(norm, RMSNorm) else norm.bias
        if not isinstance(norm, nn.LayerNorm) and norm.offset and weight is not None:
            weight = weight.float() + norm.offset
        if times != 1:
            if weight is None:
                raise ValueError(
                    "NativeDecoder scales the weights of a norm, and this one has none; call the model itself"
                )
            weight = times * weight.float()
            bias = None if bias is None else times * bias.float()
        kind = "rms" if isinstance(norm, RMSNorm) else "layer"
        return kind, self._keep(weight), self._keep(bias), norm.eps

    def _head_norm(self, norm: RMSNorm | LayerNorm, head_dim: int) -> tuple[Any, ...]:
        """The weights of heads that have their own lie side by side."""
        kind, weight, bias, eps = self._norm(norm)
        joint = isinstance(norm, RMSNorm) and len(norm.weight) != head_dim
        return kind, weight.flatten(), None if bias is None else bias.flatten(), eps, joint

    def _mlp(self, mlp: Any) -> tuple[Any, ...]:
        return self._weight(mlp.gate_proj), self._weight(mlp.up_proj), self._weight(mlp.down_proj)

    def _tables(self, model: Any, kinds: list[str], positions: int) -> list[tuple[Tensor | None, Tensor | None]]:
        tables = []
        for kind in kinds:
            rotary = model.local_rotary if kind == LOCAL else model.rotary
            cos, sin = rotary.tables(torch.device("cpu"), length=positions, cached=True)
            tables.append((self._keep(cos), self._keep(sin)))
            self.positions = ALL_POSITIONS if len(cos) == rotary.max_positions else len(cos)
        return tables

    def _llama(self, model: Any, positions: int) -> Any:
        c: LlamaConfig = model.config
        ropes = [c.rope_of(i) for i in range(c.num_layers)]
        kinds = sorted(set(ropes) - {NONE})
        decoder = _C.Decoder(
            hidden=c.hidden_size, heads_q=c.num_heads, heads_kv=c.num_kv_heads, head_dim=c.head_dim, softcap=c.attn_softcap or 0.0,
            activation=ACTIVATIONS[c.activation] if c.swiglu_limit is None else _CLAMPED, activation_limit=c.swiglu_limit or 0.0,
            final_norm=self._norm(model.model.norm), rotary=self._tables(model, kinds, positions),
        )  # fmt: skip
        alibi = self._keep(alibi_slopes(c.num_heads, torch.device("cpu"))) if c.alibi else None
        for i, layer in enumerate(model.model.layers):
            attention = layer.self_attn
            experts = layer.mlp if isinstance(layer.mlp, Experts) else None
            options: dict[str, Any] = {} if experts is not None else {"mlp": self._mlp(layer.mlp)}
            if c.qk_norm:
                options["q_norm"] = self._head_norm(attention.q_norm, c.head_dim)
                options["k_norm"] = self._head_norm(attention.k_norm, c.head_dim)
            decoder.add_layer(
                q=self._weight(attention.q_proj), k=self._weight(attention.k_proj), v=self._weight(attention.v_proj),
                o=self._weight(attention.o_proj), clip=c.clip_qkv or 0.0, norms_after_rotary=c.qk_norm_after_rope,
                rotary=kinds.index(ropes[i]) if ropes[i] != NONE else -1, interleaved=c.rope_interleaved,
                scale=c.scale or c.head_dim**-0.5, window_left=(c.windows[i] or 0) - 1, alibi=alibi,
                sinks=self._keep(attention.sinks), parallel=bool(c.parallel), residual_scale=self._scale(c), **options,
                **self._norms(layer, c),
            )  # fmt: skip
            if experts is not None:
                self._add_experts(decoder, experts)
        return decoder

    @staticmethod
    def _scale(c: LlamaConfig) -> float:
        return 1.0 if c.residual_scale is None else c.residual_scale

    def _norms(self, layer: Any, c: LlamaConfig) -> dict[str, Any]:
        """The four places of norms, see LlamaLayer.forward."""
        norms: dict[str, Any] = {"attention_norm": layer.input_layernorm} if c.pre_norms else {}
        if c.parallel == "one":
            norms["mlp_norm"] = layer.input_layernorm
        elif not c.post_norms:
            norms["mlp_norm"] = layer.post_attention_layernorm
        elif c.pre_norms:
            norms["mlp_norm"] = layer.pre_feedforward_layernorm
        found = {name: self._norm(norm) for name, norm in norms.items()}
        if c.post_norms:
            found["attention_out_norm"] = self._norm(layer.post_attention_layernorm, self._scale(c))
            found["mlp_out_norm"] = self._norm(layer.post_feedforward_layernorm, self._scale(c))
        return found

    def _add_experts(self, decoder: Any, experts: Experts) -> None:
        router, c = experts.gate, experts.gate.config
        # The sigmoid's scores are computed in fp32 whatever the model is in.
        weight = router.weight.float() if c.router == "sigmoid" else router.weight
        format = next(name for name, dtype in FLOATS.items() if dtype is weight.dtype)
        data = pack_floats(weight.detach(), format)
        self.borrowed.append(data)
        decoder.add_experts(
            router=(data, self._keep(router.bias), format, weight.shape[1], weight.shape[0]), kind=c.router,
            choice_bias=self._keep(router.e_score_correction_bias), per_token=c.per_token, groups=c.groups, top_groups=c.top_groups,
            normalize=c.normalize, scale=c.scale, experts=[self._mlp(expert) for expert in experts.experts],
            shared=None if experts.shared_expert is None else self._mlp(experts.shared_expert),
            shared_gate=self._weight(experts.shared_expert_gate),
        )  # fmt: skip

    def _gpt2(self, model: Any) -> Any:
        c = model.config
        decoder = _C.Decoder(
            hidden=c.hidden_size, heads_q=c.num_heads, heads_kv=c.num_heads, head_dim=c.head_dim, softcap=0.0,
            activation=ACTIVATIONS[c.activation], activation_limit=0.0, final_norm=self._norm(model.transformer.ln_f), rotary=[],
        )  # fmt: skip
        for layer, scale in zip(model.transformer.h, c.scales):
            decoder.add_layer(
                attention_norm=self._norm(layer.ln_1), q=self._weight(layer.attn.c_attn), o=self._weight(layer.attn.c_proj),
                mlp_norm=self._norm(layer.ln_2), mlp=(None, self._weight(layer.mlp.c_fc), self._weight(layer.mlp.c_proj)), scale=scale,
            )  # fmt: skip
        return decoder
