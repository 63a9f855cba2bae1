"""LoRA (Hu et al. 2021, arXiv 2106.09685): frozen linear layers plus trained updates of low rank; on packed ones it is QLoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.models.bert import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification
from foveate.models.layers import PackedEmbedding
from foveate.models.registry import LAYERS
from foveate.nn import PackedLinear

# Heads are small and often new, so they are trained whole; by the module's name, as peft's modules_to_save.
_HEADS: dict[type[nn.Module], tuple[str, ...]] = {
    BertForQuestionAnswering: ("qa_outputs",),
    BertForSequenceClassification: ("classifier", "pooler"),
    BertForMaskedLM: ("transform",),
}


@dataclass(frozen=True)
class LoraConfig:
    """targets: names of the linear layers, or the ends of their names after a dot; None: all in attention and MLP.

    alpha None is twice the rank. The update is scaled by alpha / rank, with rslora by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv
    2312.03732).
    """

    rank: int
    alpha: float | None = None
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None
    rslora: bool = False

    @property
    def peft_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.peft_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class FrozenLinear(nn.Module):
    """A packed layer in training: x @ W.T + bias with W expanded in each pass and kept in none; no gradient reaches W.

    PackedLinear itself rounds x to int8, which is for inference; here x stays as it is.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return _FrozenProduct.apply(x, self.packed)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedLinear) -> Tensor:
        ctx.packed = packed
        bias = None if packed.bias is None else packed.bias.to(x.dtype)
        return F.linear(x, expand(packed).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return dout @ expand(ctx.packed).to(dout.dtype), None


def expand(packed: PackedLinear) -> Tensor:
    """fp32 [out, in]"""
    return packed.rows(torch.arange(packed.out_features, device=packed.data.device))


class LoraLinear(nn.Module):
    """base(x) + scale * dropout(x) @ A.T @ B.T. A [rank, in] as nn.Linear is initialised, B [out, rank] 0, both fp32."""

    def __init__(self, base: Any, config: LoraConfig) -> None:
        super().__init__()
        packed = isinstance(base, PackedLinear)
        device = base.data.device if packed else base.weight.device
        self.base = FrozenLinear(base) if packed else base
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(config.dropout)
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)
        return self.base(x) + self.scale * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """One linear layer with W + scale * B A, computed in fp32."""
        base: Any = self.base
        packed = isinstance(base, FrozenLinear)
        weight = expand(base.packed) if packed else base.weight.float()
        bias = base.packed.bias if packed else base.bias
        return _linear(weight + self.scale * self.lora_B @ self.lora_A, bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta").requires_grad_(False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


def expand_packed(model: nn.Module) -> nn.Module:
    """Puts a linear layer of the same values in fp32 in the place of each packed one."""
    for name, module in list(model.named_modules()):
        if isinstance(module, FrozenLinear):
            model.set_submodule(name, _expanded(module.packed))
        elif isinstance(module, PackedLinear) and name.rpartition(".")[2] != "packed":
            model.set_submodule(name, _expanded(module))
    return model


def _expanded(packed: PackedLinear) -> nn.Linear:
    return _linear(expand(packed), packed.bias)


def add_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Freezes the model but for new adapters and its head; the names of the adapted layers. ValueError where no layer fits."""
    names = target_names(model, config.targets)
    model.requires_grad_(False)
    for name in names:
        model.set_submodule(name, LoraLinear(model.get_submodule(name), config))
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a tied head is the embedding's module
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, PackedLinear) and not isinstance(parent, (FrozenLinear, PackedEmbedding)):
            # The loss needs the head's matrix in each step, and expanding it there would take longer than using it.
            model.set_submodule(name, _expanded(module) if name == "lm_head" else FrozenLinear(module))
    for module in saved_modules(model).values():
        module.requires_grad_(True)
    return names


def target_names(model: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    linear = [
        name for name, m in model.named_modules() if isinstance(m, (nn.Linear, PackedLinear)) and "lm_head" not in name
    ]
    if targets is None:
        layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LAYERS))
        return [name for name in linear if name.startswith(layers)]
    absent = [t for t in targets if not any(fits(name, t) for name in linear)]
    if absent:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"the model has no linear layer {', '.join(absent)} to adapt; it has {', '.join(known)}")
    return [name for name in linear if any(fits(name, t) for t in targets)]


def fits(name: str, target: str) -> bool:
    """As peft matches target_modules."""
    return name == target or name.endswith(f".{target}")


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of the head that are trained whole, by name."""
    heads = _HEADS.get(type(model), ())
    return {name: module for name, module in model.named_modules() if any(fits(name, head) for head in heads)}


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def merge_lora(model: nn.Module) -> nn.Module:
    """Puts each adapter into its layer, in place; the model as it was before add_lora, with other weights."""
    for name, module in list(adapters(model)):
        model.set_submodule(name, module.merged())
    return model
