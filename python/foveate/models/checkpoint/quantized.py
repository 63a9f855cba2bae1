"""Weights that other libraries have quantised: GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes and MLX, told apart by the config.

Each module's tensors become `Blocks` of a packed format with exactly its weights; where there is none, fp32, which the loader says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from foveate.files.checked import CheckpointError, is_there, read_json
from foveate.models.checkpoint import quantized_modules as modules
from foveate.models.checkpoint.base import Blocks, Weights
from foveate.models.checkpoint.quantized_modules import Expanded, Module

Read = Callable[[Module], "Blocks | Expanded"]


@dataclass(frozen=True)
class Layout:
    """How a method's files name a module's tensors. mark: the end of the name of what stands for its weight; needs: of what must be
    beside that, which also tells it from a plain weight if mark is ".weight"; may: of what can be."""

    mark: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    read: Read


# Scales of activations and of caches, for kernels that round these as the file says; here they stay floats, or are rounded as they come.
_UNUSED = (
    ".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".activation_scale", ".input_global_scale", ".k_scale",
    ".v_scale", ".q_scale", ".weight_format", ".g_idx_sort_indices", ".k_proj.output_scale", ".v_proj.output_scale",
)  # fmt: skip
_GPTQ = Layout(".qweight", (".qzeros", ".scales"), (".g_idx",), modules.gptq)
_AWQ = Layout(".qweight", (".qzeros", ".scales"), (), modules.awq)
_FLOATS = Layout(".weight", (".weight_scale",), (".weight_zero_point",), modules.scaled_weight)
_METHODS: dict[str, tuple[Layout, ...]] = {
    "gptq": (_GPTQ,), "gptqmodel": (_GPTQ,), "awq": (_AWQ,),
    "compressed-tensors": (
        Layout(
            ".weight_packed", (".weight_scale",),
            (".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale"), modules.packed_weight,
        ),
        _FLOATS,
    ),
    "fp8": (Layout(".weight", (".weight_scale_inv",), (), modules.scaled_weight), _FLOATS), "fbgemm_fp8": (_FLOATS,),
    "bitsandbytes": (
        Layout(
            ".weight", (".weight.quant_state.bitsandbytes__nf4", ".weight.absmax", ".weight.quant_map"),
            (".weight.nested_absmax", ".weight.nested_quant_map"), modules.bitsandbytes_4bit,
        ),
        Layout(
            ".weight", (".weight.quant_state.bitsandbytes__fp4", ".weight.absmax", ".weight.quant_map"),
            (".weight.nested_absmax", ".weight.nested_quant_map"), modules.bitsandbytes_4bit,
        ),
        Layout(".weight", (".SCB",), (), modules.bitsandbytes_8bit),
    ),
    "mlx": (Layout(".weight", (".scales", ".biases"), (), modules.mlx),),
}  # fmt: skip


def method_of(config: Mapping[str, Any], folder: Path) -> str | None:
    """The name of the library or scheme that has quantised a checkpoint, as the config or a file of older versions beside it has it."""
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            found = config[key].get("quant_method")
            if key == "compression_config" or found == "compressed_tensors":
                return "compressed-tensors"
            return str(found or "a method that the config does not name")
    if config.get("quantization"):
        return "mlx"
    older = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
    return next((name for file, name in older.items() if folder.is_dir() and is_there(folder / file)), None)


def settings_of(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What `method_of` found, as a mapping; {} where nothing says it."""
    for key in ("quantization_config", "compression_config", "quantization"):
        if config.get(key):
            return dict(config[key])
    for name in ("quantize_config.json", "quant_config.json"):
        if is_there(folder / name):
            return dict(read_json(folder / name))
    return {}


class QuantizedWeights:
    """`weights` with each module X that the method has quantised as X.weight, all others as they are."""

    linear_layout = False
    packed = True  # most of it stays as small as it is

    def __init__(
        self, weights: Weights, method: str, settings: dict[str, Any], where: Path, transposed: str | None = None
    ) -> None:
        """transposed: the model_type, of an architecture whose checkpoints have matrices as [in, out]."""
        self._weights, self._settings, self._where = weights, settings, where
        if method not in _METHODS:
            raise CheckpointError(
                f"{where} is quantised by {method!r}, which cannot be read; {', '.join(_METHODS)} and mxfp4 can: take such a file of the "
                "model, a GGUF file, or the unquantised weights, with quantization='q8_0' or 'q4_0' here"
            )
        if transposed is not None:
            raise CheckpointError(
                f"{where} is a {transposed} quantised by {method!r}, whose matrices lie the other way round; take a GGUF file of the model"
            )
        modules.check_settings(method, settings, where)
        self.nbytes, self.loaded_bytes = weights.nbytes, weights.nbytes + weights.nbytes // 8
        self.expanded: dict[str, int] = {}  # bytes of what has no packed format, among what was read
        stored = list(weights.names())
        known = set(stored)
        self._found: dict[str, tuple[Layout, dict[str, str]]] = {}
        hidden = {name for name in stored if name.endswith(_UNUSED)}
        for layout in _METHODS[method]:
            for name in stored:
                if not name.endswith(layout.mark) or name in hidden:
                    continue
                module = name.removesuffix(layout.mark)
                absent = [part for part in layout.needs if module + part not in known]
                if absent:
                    if layout.mark != ".weight":
                        raise CheckpointError(f"{where} has {name} without {module}{absent[0]}; download it again")
                    continue
                parts = {part: module + part for part in (*layout.needs, *layout.may) if module + part in known}
                parts[layout.mark] = name
                self._found[f"{module}.weight"] = (layout, parts)
                hidden |= set(parts.values())
        self._names = [*self._found, *(name for name in stored if name not in hidden)]
        if not self._found:
            raise CheckpointError(
                f"{where} is quantised by {method!r} by its config, and none of its weights are; take the config of these weights"
            )

    def names(self) -> Iterable[str]:
        return self._names

    def get(self, name: str) -> Tensor | Blocks:
        if name not in self._found:
            value = self._weights.get(name)
            if isinstance(value, Tensor) and value.dtype in modules.CODES and name.endswith("weight"):
                raise CheckpointError(
                    f"{name} in {self._where} is {value.dtype} and has no scale beside it; download it again"
                )
            return value
        layout, stored = self._found[name]
        module = Module(name.removesuffix(".weight"), self._tensors(stored), self._settings)
        try:
            found = layout.read(module)
        except CheckpointError as error:
            raise CheckpointError(f"{module.name} in {self._where} cannot be read: {error}") from None
        if isinstance(found, Blocks):
            return found
        self.expanded[found.why] = self.expanded.get(found.why, 0) + module.nbytes
        return found.weight

    def _tensors(self, stored: Mapping[str, str]) -> dict[str, Tensor]:
        found = {part: self._weights.get(name) for part, name in stored.items()}
        return {part: value for part, value in found.items() if isinstance(value, Tensor)}
