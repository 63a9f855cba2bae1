"""LoRA (Hu et al. 2021, arXiv 2106.09685): frozen linear layers plus trained updates of low rank; on packed ones it is QLoRA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.models.bert import BertForMaskedLM, BertForQuestionAnswering, BertForSequenceClassification
from foveate.models.decoder_classifier import LlamaForSequenceClassification
from foveate.models.layers import PackedEmbedding
from foveate.models.registry import LAYERS
from foveate.nn import PackedLinear

# Heads are small and often new, so they are trained whole; by the module's name, as peft's modules_to_save.
_HEADS: dict[type[nn.Module], tuple[str, ...]] = {
    BertForQuestionAnswering: ("qa_outputs",),
    BertForSequenceClassification: ("classifier", "pooler"),
    BertForMaskedLM: ("transform", "lm_head.dense", "lm_head.LayerNorm"),
    LlamaForSequenceClassification: ("score",),
}

HEADS = ("lm_head", "cls.predictions.decoder", "lm_predictions.lm_head.decoder")  # that may be the embedding's matrix


@dataclass(frozen=True)
class LoraConfig:
    """targets: names of the linear layers and embeddings, or the ends of their names after a dot; None: all linear layers in attention
    and MLP. Of a head and an embedding that are one matrix, the one that is adapted alone parts from the other, as peft has it.

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
    """base(x) + scale * dropout(x) @ A.T @ B.T. A [rank, in] as nn.Linear is initialised, B [out, rank] 0, both fp32.

    active False: base(x) alone."""

    active = True

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

    @property
    def second(self) -> Tensor:
        """The matrix that is 0 until something is learnt."""
        return self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
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

    def widened(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x' [..., in + rank] and W' [out, in + rank] with x' @ W'.T = self(x) but for the bias: for losses that take a head's matrix."""
        base: Any = self.base
        if not self.active:
            return x, base.weight
        update = self.scale * F.linear(self.dropout(x), self.lora_A)
        return torch.cat([x, update.to(x.dtype)], -1), torch.cat([base.weight, self.lora_B.to(base.weight.dtype)], 1)


class LoraEmbedding(nn.Module):
    """base(tokens) + scale * A.T[tokens] @ B.T. A [rank, rows] 0, B [out, rank] drawn from N(0, 1), both fp32, as peft has them.

    active False: base(tokens) alone."""

    active = True

    def __init__(self, base: Any, config: LoraConfig) -> None:
        super().__init__()
        packed = isinstance(base, PackedEmbedding)
        rows, out = (base.packed.out_features, base.packed.in_features) if packed else base.weight.shape
        device = base.packed.data.device if packed else base.weight.device
        self.base = base
        self.lora_embedding_A = nn.Parameter(torch.zeros(config.rank, rows, device=device))
        self.lora_embedding_B = nn.Parameter(torch.randn(out, config.rank, device=device))
        self.scale = config.scale

    @property
    def second(self) -> Tensor:
        """The matrix that is 0 until something is learnt."""
        return self.lora_embedding_A

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> [..., out]"""
        if not self.active:
            return self.base(tokens)
        update = F.linear(F.embedding(tokens, self.lora_embedding_A.T), self.lora_embedding_B)
        x = self.base(tokens)
        return x + (self.scale * update).to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Embedding:
        """One embedding with W + scale * (B A).T, computed in fp32."""
        base: Any = self.base
        weight = expand(base.packed) if isinstance(base, PackedEmbedding) else base.weight.float()
        weight = weight + self.scale * (self.lora_embedding_B @ self.lora_embedding_A).T
        found = nn.Embedding(weight.shape[0], weight.shape[1], device="meta").requires_grad_(False)
        found.weight = nn.Parameter(weight, requires_grad=False)
        return found


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
        base = model.get_submodule(name)
        if isinstance(base, (nn.Embedding, PackedEmbedding)):
            model.set_submodule(name, LoraEmbedding(base, config))
            continue
        if isinstance(base, PackedLinear) and name in HEADS:
            base = _expanded(base)
        model.set_submodule(name, LoraLinear(base, config))
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a tied head is the embedding's module
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, PackedLinear) and not isinstance(parent, (FrozenLinear, PackedEmbedding)):
            # The loss needs the head's matrix in each step, and expanding it there would take longer than using it.
            model.set_submodule(name, _expanded(module) if name in HEADS else FrozenLinear(module))
    for module in saved_modules(model).values():
        module.requires_grad_(True)
    return names


def target_names(model: nn.Module, targets: tuple[str, ...] | None) -> list[str]:
    names = layer_names(model)
    if targets is None:
        layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LAYERS))
        linear = (nn.Linear, PackedLinear)
        return [name for name in names if name.startswith(layers) and isinstance(model.get_submodule(name), linear)]
    absent = [t for t in targets if not any(fits(name, t) for name in names)]
    if absent:
        known = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(f"the model has no layer {', '.join(absent)} to adapt; it has {', '.join(known)}")
    return [name for name in names if any(fits(name, t) for t in targets)]


def layer_names(model: nn.Module) -> list[str]:
    """The names of all layers that can have an adapter, or have one."""
    adapted = (LoraLinear, LoraEmbedding)
    kinds = (nn.Linear, PackedLinear, FrozenLinear, nn.Embedding, PackedEmbedding, *adapted)
    inside = (*adapted, FrozenLinear, PackedEmbedding)
    return [
        name
        for name, module in model.named_modules(remove_duplicate=False)  # a tied packed head is the embedding's module
        if isinstance(module, kinds) and not isinstance(model.get_submodule(name.rpartition(".")[0]), inside)
    ]


def fits(name: str, target: str) -> bool:
    """As peft matches target_modules."""
    return name == target or name.endswith(f".{target}")


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of the head that are trained whole, by name."""
    heads = next((names for kind, names in _HEADS.items() if isinstance(model, kind)), ())
    return {name: module for name, module in model.named_modules() if any(fits(name, head) for head in heads)}


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear | LoraEmbedding]]:
    for name, module in model.named_modules():
        if isinstance(module, (LoraLinear, LoraEmbedding)):
            yield name, module


def stored_names(module: LoraLinear | LoraEmbedding) -> dict[str, str]:
    """The adapter's parameters, and what peft calls them in a file."""
    if isinstance(module, LoraEmbedding):
        return {"lora_embedding_A": "lora_embedding_A", "lora_embedding_B": "lora_embedding_B"}
    return {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def merge_lora(model: nn.Module) -> nn.Module:
    """Puts each adapter into its layer, in place; the model as it was before add_lora, with other weights. A head and an embedding that
    were one matrix are two if one of them had an adapter."""
    whole: Any = model
    found = dict(adapters(model))
    for alias, name in list(getattr(whole, "tied", {}).items()):
        if alias.removesuffix(".weight") in found or name.removesuffix(".weight") in found:
            del whole.tied[alias]
            whole.config = dataclasses.replace(whole.config, tied=False)
    for name, module in found.items():
        model.set_submodule(name, module.merged())
    return model
