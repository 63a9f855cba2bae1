"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685) beside a causal model, one for each sequence of a step or none."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.backend import native
from foveate.cache.view import CacheView
from foveate.files.checked import CheckpointError, is_there, read_json
from foveate.models.checkpoint.adapters import CONFIG, PREFIX, check_adapter, stored_weights
from foveate.models.checkpoint.renamed import RenamedWeights
from foveate.models.checkpoint.schemas import ADAPTER
from foveate.models.native_adapter import NativeAdapter
from foveate.models.native_decoder import NativeDecoder
from foveate.models.registry import Architecture
from foveate.nn import PackedLinear

_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


@dataclass(eq=False)
class Adapter:
    """name: what requests call it. root: where its pages begin in the prefix cache, since other adapters' keys are others.

    pairs: of each adapted layer A [rank, in] and scale * B [out, rank], whose rows do not depend on their batch. native: the same for a
    NativeDecoder; None where it cannot run it.
    """

    name: str
    folder: Path
    rank: int
    root: int
    pairs: dict[str, tuple[nn.Module, nn.Module]] = field(repr=False)
    native: NativeAdapter | None = field(default=None, repr=False)


class _Updates:
    """B of each adapted layer as the weights of a checkpoint, to be renamed and divided as its layers are."""

    linear_layout, nbytes, loaded_bytes = False, 0, 0

    def __init__(self, stored: dict[str, Tensor]) -> None:
        self._stored = stored

    def names(self) -> Iterable[str]:
        return self._stored

    def get(self, name: str) -> Tensor:
        return self._stored[name]


def modules_of(model: Any) -> Any:
    """The torch modules behind what an engine runs: a NativeDecoder's model, or the model itself."""
    return model if isinstance(model, nn.Module) else getattr(model, "model", model)


class Adapters:
    """Those that are loaded beside `model`, a Llama or GPT2 of foveate.models, maybe with packed layers."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.architecture: Architecture | None = (
            None  # of its checkpoint, whose names an adapter has; None: those of the modules
        )
        self._loaded: dict[str, Adapter] = {}
        self._roots = itertools.count(-1, -1)
        self._hooked: set[str] = set()
        self._step = threading.local()  # rows: of the step that runs in this thread

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def __getitem__(self, name: str) -> Adapter:
        """ValueError, with those that there are."""
        adapter = self._loaded.get(name)
        if adapter is None:
            raise ValueError(
                f"there is no adapter {name!r}; there are {', '.join(self._loaded) or 'none'}: load_adapter"
            )
        return adapter

    def load(self, name: str, folder: str | Path) -> None:
        """`read`, then `add`."""
        self.add(self.read(name, folder))

    def add(self, adapter: Adapter) -> None:
        """In place of another of its name, between two steps. Requests that run keep the one that they began with."""
        for layer in adapter.pairs:
            self._hook(layer)
        self._loaded[adapter.name] = adapter

    def read(self, name: str, folder: str | Path) -> Adapter:
        """From a folder of peft's format; also while steps run.

        CheckpointError for what is not LoRA, is another model's, or adapts the head or the embedding: those change what all share.
        """
        folder = Path(folder).expanduser()
        if not is_there(folder / CONFIG):
            raise CheckpointError(f"{folder} has no adapter: it has no {CONFIG}")
        settings = read_json(folder / CONFIG, ADAPTER)
        check_adapter(settings, folder)
        rank = settings.get("r") or 8
        scale = (settings.get("lora_alpha") or 8) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        stored = {key.removeprefix(PREFIX): value for key, value in stored_weights(folder).items()}
        wrong = [key for key in stored if not key.endswith((_LORA_A, _LORA_B)) or key.startswith("lm_head")]
        if wrong:
            raise CheckpointError(
                f"{folder} has {wrong[0]}: served beside its base, an adapter may adapt the layers of attention and MLP only; serve it as "
                "a model of its own, which merges it, or train one without the head and the embedding"
            )
        layers = sorted(key.removesuffix(_LORA_A) for key in stored if key.endswith(_LORA_A))
        if not layers:
            raise CheckpointError(f"{folder} has no weights of an adapter (*{_LORA_A})")
        pairs = {}
        for layer, a, b in self._ours(layers, stored, folder):
            pairs[layer] = self._pair(layer, a, b, rank, scale, folder)
        runs = native.missing_reason is None and NativeAdapter.unsupported(self.model, pairs) is None
        return Adapter(name, folder, rank, next(self._roots), pairs, NativeAdapter(self.model, pairs) if runs else None)

    def unload(self, name: str) -> None:
        self._loaded.pop(self[name].name)

    def _ours(
        self, layers: list[str], stored: dict[str, Tensor], folder: Path
    ) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Each layer by this model's name, with A and B. One that is several here (Phi-3's qkv_proj) is its parts, which share A."""
        updates = _Updates(
            {f"{layer}.weight": b for layer in layers if (b := stored.get(f"{layer}{_LORA_B}")) is not None}
        )
        known = self.architecture
        renamed = None
        if known is not None and (known.names or known.fused):
            renamed = RenamedWeights(updates, known.names, str(folder), known.fused, self.model.config)
        for layer in layers:
            if f"{layer}{_LORA_B}" not in stored:
                yield layer, stored[f"{layer}{_LORA_A}"], None
        for name in updates.names() if renamed is None else renamed.names():
            theirs = name if renamed is None else renamed.stored_name(name)
            part = (updates if renamed is None else renamed).get(name)
            if isinstance(part, Tensor):
                yield name.removesuffix(".weight"), stored[theirs.removesuffix(".weight") + _LORA_A], part

    def _pair(
        self, layer: str, a: Tensor, b: Tensor | None, rank: int, scale: float, folder: Path
    ) -> tuple[nn.Module, nn.Module]:
        module = dict(self.model.named_modules()).get(layer)
        if not isinstance(module, nn.Linear | PackedLinear):
            raise CheckpointError(
                f"{folder} adapts {layer}, which {type(self.model).__name__} does not have: another model's adapter"
            )
        if b is None or list(a.shape) != [rank, module.in_features] or list(b.shape) != [module.out_features, rank]:
            shapes = f"{list(a.shape)} and {None if b is None else list(b.shape)}"
            raise CheckpointError(
                f"{folder} adapts {layer} with A and B of shapes {shapes}; r={rank} in {CONFIG} and the layer need "
                f"{[rank, module.in_features]} and {[module.out_features, rank]}: damaged, or another model's adapter"
            )
        return self._linear(a.float()), self._linear(scale * b.float())

    def _linear(self, weight: Tensor) -> nn.Module:
        device = next(itertools.chain(self.model.parameters(), self.model.buffers())).device
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta").requires_grad_(False)
        linear.weight = nn.Parameter(weight.to(device), requires_grad=False)
        return PackedLinear.from_linear(linear) if device.type == "cpu" else linear

    def _hook(self, layer: str) -> None:
        """Once for each layer. Outside `hidden`, and where the model does not run through its modules, it does nothing."""
        if layer in self._hooked:
            return
        self._hooked.add(layer)

        def update(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for adapter, rows in getattr(self._step, "rows", ()):
                pair = adapter.pairs.get(layer)
                if pair is not None:
                    a, b = pair
                    output[rows] += b(a(args[0][rows].float())).to(output.dtype)
            return output

        self.model.get_submodule(layer).register_forward_hook(update)

    def hidden(self, plain: Any, tokens: Tensor, view: CacheView, chosen: Sequence[Adapter | None]) -> Tensor:
        """As plain.hidden(tokens, view), with the adapter of each row, in one pass of a NativeDecoder that can run all of them.

        Elsewhere those with adapters run on the model's modules, all of them in one pass, and the others on `plain`. Either way rows
        without one have the bits that they have without others.
        """
        if isinstance(plain, NativeDecoder) and all(a is None or a.native is not None for a in chosen):
            return self._native(plain, tokens, view, chosen)
        with_one = [i for i, adapter in enumerate(chosen) if adapter is not None]
        if plain is self.model or len(with_one) == len(chosen):
            return self._adapted(tokens, view, chosen)
        without = [i for i, adapter in enumerate(chosen) if adapter is None]
        parts = [
            CacheView(view.cache, [view.seqs[i] for i in rows], view.new, view.prompt) for rows in (without, with_one)
        ]
        hidden = plain.hidden(tokens[without], parts[0])
        adapted = self._adapted(tokens[with_one], parts[1], [chosen[i] for i in with_one])
        rows_hidden = hidden.new_empty(len(chosen), *hidden.shape[1:])
        rows_hidden[without], rows_hidden[with_one] = hidden, adapted.to(hidden.dtype)
        return rows_hidden

    @staticmethod
    def _native(plain: NativeDecoder, tokens: Tensor, view: CacheView, chosen: Sequence[Adapter | None]) -> Tensor:
        """Rows in the order that the native code takes: without an adapter first, then each adapter's together."""
        roots = [0 if adapter is None else -adapter.root for adapter in chosen]
        order = sorted(range(len(chosen)), key=roots.__getitem__)
        groups = [list(rows) for _, rows in itertools.groupby(order, key=roots.__getitem__)]
        parts = [
            (adapter.native, len(rows))
            for rows in groups
            if (adapter := chosen[rows[0]]) is not None and adapter.native is not None
        ]
        if order == list(range(len(chosen))):
            return plain.hidden(tokens, view, parts)
        sorted_view = CacheView(view.cache, [view.seqs[i] for i in order], view.new, view.prompt)
        sorted_hidden = plain.hidden(tokens[order], sorted_view, parts)
        hidden = torch.empty_like(sorted_hidden)
        hidden[order] = sorted_hidden
        return hidden

    def _adapted(self, tokens: Tensor, view: CacheView, chosen: Sequence[Adapter | None]) -> Tensor:
        rows: dict[Adapter, list[int]] = {}
        for i, adapter in enumerate(chosen):
            if adapter is not None:
                rows.setdefault(adapter, []).append(i)
        self._step.rows = [(adapter, torch.tensor(of, device=tokens.device)) for adapter, of in rows.items()]
        try:
            return self.model.hidden(tokens, view)
        finally:
            self._step.rows = []
