"""NativeAdapter: a LoRA adapter as the native decoder takes it (csrc/decoder/adapters.h)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from foveate.backend import native
from foveate.models.gpt2 import GPT2
from foveate.nn import PackedLinear

_C = native._C

# The products of a layer in the order of csrc/decoder/adapters.h, Adapted.
_LLAMA = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_GPT2 = ("attn.c_attn", None, None, "attn.c_proj", None, "mlp.c_fc", "mlp.c_proj")


class NativeAdapter:
    """pairs: of each adapted layer of a Llama or GPT2, by its name, A [rank, in] and scale * B [out, rank], packed as f32.

    Raises ValueError with `unsupported(...)`.
    """

    def __init__(self, model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> None:
        reason = self.unsupported(model, pairs)
        if reason is not None:
            raise ValueError(reason)
        self._borrowed: list[Tensor] = []
        self.native = _C.DecoderAdapter([[self._product(pairs, name) for name in layer] for layer in _names(model)])

    @staticmethod
    def unsupported(model: nn.Module, pairs: Mapping[str, tuple[nn.Module, nn.Module]]) -> str | None:
        """None, or the sentence why the native decoder cannot run this adapter."""
        known = {name for layer in _names(model) for name in layer}
        for name, pair in pairs.items():
            if name not in known:
                return f"the native decoder adapts the products of attention and of one MLP in each layer, and {name} is none of them"
            if not all(isinstance(part, PackedLinear) and part.format == "f32" for part in pair):
                return f"the adapter's A and B of {name} are not packed as f32"
        return None

    def _product(
        self, pairs: Mapping[str, tuple[nn.Module, nn.Module]], name: str | None
    ) -> tuple[object, object] | None:
        if name is None or name not in pairs:
            return None
        a, b = (self._weight(part) for part in pairs[name])
        return a, b

    def _weight(self, linear: nn.Module) -> tuple[Tensor, None, str, int, int]:
        if not isinstance(linear, PackedLinear):
            raise TypeError(f"a {type(linear).__name__} is not packed; take PackedLinear.from_linear of it")
        self._borrowed.append(linear.data)
        return linear.data, None, linear.format, linear.in_features, linear.out_features


def _names(model: nn.Module) -> list[list[str | None]]:
    """The names of the products of each layer; None for what it has not."""
    gpt2 = isinstance(model, GPT2)
    prefix, products = ("transformer.h", _GPT2) if gpt2 else ("model.layers", _LLAMA)
    count = len(model.get_submodule(prefix))  # type: ignore[arg-type]
    there = dict(model.named_modules())
    return [
        [name if name in there else None for name in (f"{prefix}.{i}.{product}" for product in products)]
        for i in range(count)
    ]
