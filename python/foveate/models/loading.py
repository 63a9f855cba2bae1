"""load_model: builds a checkpoint's model on the meta device and fills it, one tensor after the other."""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.files.checked import CheckpointError
from foveate.models import bert, decoder_classifier, llama
from foveate.models.checkpoint.base import Blocks, Checkpoint, Weights
from foveate.models.checkpoint.open import TEXT_NAMES, TEXT_PART, TEXT_WEIGHTS, open_checkpoint
from foveate.models.checkpoint.reading import check_layers, read_config
from foveate.models.checkpoint.renamed import RenamedWeights
from foveate.models.layers import PackedEmbedding
from foveate.models.quantizing import check_quantization, importance_of, quantize_model
from foveate.models.registry import Architecture, architecture_of
from foveate.nn import PackedLinear
from foveate.progress import ProgressBar
from foveate.quantization.gguf_blocks import TABLES, dequantize, table_to_q8_0
from foveate.quantization.k_blocks import K_FORMATS
from foveate.quantization.names import QUANTISABLE
from foveate.quantization.scaled_blocks import SCALED

_TENSORFLOW_NORM = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")  # as Google's BERT checkpoints name them
_NORM_NAMES = {"gamma": "weight", "beta": "bias"}
_LARGE = 256 * 2**20  # bytes from which loading takes a second or more


def model_class(config: dict[str, Any], head: str | None = None, new_head: bool = False) -> type[nn.Module]:
    """The class for a config.json's `model_type`; head, new_head: see `load_model`."""
    architecture = architecture_of(config)
    if architecture.heads:
        return _class_with_head(architecture, config, head, new_head)
    name = next((name for name in config.get("architectures") or () if isinstance(name, str)), "")
    for known, kind in architecture.readers.items():
        if name.endswith(_head_of(kind)):
            if head not in (None, known):
                raise ValueError(f"the checkpoint is a {name}, whose head is not {head!r}")
            return kind
    if head is not None:
        others = " and ".join(map(repr, architecture.readers))
        raise ValueError(
            f"head={head!r} is for encoders such as BERT"
            + (f", and {others} for checkpoints of {config['model_type']} that have it" if others else "")
            + f"; this {config['model_type']} is a {name or 'model that writes text'}"
        )
    if architecture.encoder_decoder:
        _check_whole(config)
    return architecture.model


def _head_of(kind: type[nn.Module]) -> str:
    """What the names of a head's classes end with, such as "ForSequenceClassification"."""
    return kind.__name__[kind.__name__.index("For") :]


def _check_whole(config: dict[str, Any]) -> None:
    """CheckpointError for an encoder-decoder with another head than that of generation, or half of one."""
    named = str((config.get("architectures") or [""])[0])
    if named.endswith((*_CLASSIFIERS, "ForQuestionAnswering", "ForCausalLM", "EncoderModel")):
        raise CheckpointError(
            f"{named} is not supported: of {config['model_type']} only whole models that write text are, named ForConditionalGeneration"
        )


def _class_with_head(
    architecture: Architecture, config: dict[str, Any], head: str | None, new_head: bool
) -> type[nn.Module]:
    named = [name for name in config.get("architectures") or () if isinstance(name, str)]
    stored = architecture.named_heads.get(named[0]) if named else None
    if head is None:
        if named and stored is None:
            raise CheckpointError(
                f"the head of {named[0]} is not supported; known are {', '.join(architecture.named_heads)}: load the encoder alone by "
                "head='encoder'"
            )
        return stored or architecture.model
    if head not in architecture.heads:
        raise ValueError(f"head={head!r} is not one of {', '.join(architecture.heads)}")
    kind = architecture.heads[head]
    if not new_head and _has_another_classifier(config, kind):
        raise ValueError(
            f"the checkpoint is a {named[0]}, whose head is not {head!r}; new_head=True draws a new head to be fine-tuned"
        )
    return kind


# These heads call their weights alike, whose shapes may be equal too: only the config tells them apart.
_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")


def _has_another_classifier(config: dict[str, Any], kind: type[nn.Module]) -> bool:
    names = [name for name in (config.get("architectures") or ())[:1] if name.endswith(_CLASSIFIERS)]
    return bool(names) and kind.__name__.endswith(_CLASSIFIERS) and not names[0].endswith(_head_of(kind))


class _WithoutClassifier:
    """Weights of which a model with another head takes the encoder only."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.linear_layout, self.nbytes, self.loaded_bytes = weights.linear_layout, weights.nbytes, weights.loaded_bytes

    def names(self) -> Iterator[str]:
        return (name for name in self._weights.names() if not name.startswith("classifier."))

    def get(self, name: str) -> Tensor | Blocks:
        return self._weights.get(name)


def checked_device(device: torch.device | str | None) -> torch.device:
    """The CPU if None; ValueError for a device that this machine or this torch does not have."""
    try:
        device = torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(
            f"the device {device!r} is none that torch knows; choose 'cpu', or 'cuda' for a GPU of NVIDIA or AMD"
        ) from error
    if device.type not in ("cpu", "meta"):
        try:
            torch.empty(0, device=device)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ValueError(f"the device {device} cannot be used here: {reason}; choose device='cpu'") from error
    return device


_DTYPE_NAMES = {
    "float32": torch.float32, "fp32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16, "half": torch.float16, "float64": torch.float64, "auto": None,
}  # fmt: skip


def checked_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of weights by its name too; "auto" is None, the checkpoint's own. TypeError and ValueError for others."""
    if isinstance(dtype, str):
        name = dtype.removeprefix("torch.")
        if name not in _DTYPE_NAMES:
            raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_DTYPE_NAMES)}")
        return _DTYPE_NAMES[name]
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype={dtype!r} is a {type(dtype).__name__}; it must be a torch.dtype or its name")
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize < 2):
        raise ValueError(
            f"dtype={dtype} cannot hold weights; choose float32, bfloat16 or float16, or pass quantization='q8_0'"
        )
    return dtype


def unfilled_model(checkpoint: Checkpoint, head: str | None = None, new_head: bool = False) -> tuple[Any, Weights]:
    """The model on the meta device, and the weights under its names or those of `match_names`; see `load_model`."""
    kind: Any = model_class(checkpoint.config, head, new_head)
    config = read_config(kind, checkpoint.config, checkpoint.path)
    weights: Weights = checkpoint.weights()
    architecture = architecture_of(checkpoint.config)
    names, fused = architecture.names, architecture.fused
    only = None
    if checkpoint.config.get(TEXT_PART):
        names, only = (*TEXT_NAMES, *names), TEXT_WEIGHTS
    if weights.linear_layout:  # GGUF, which has its own table of names
        names, fused = (), getattr(weights, "fused", {})
    if names or fused:
        weights = RenamedWeights(weights, names, str(checkpoint.path), fused, config, only)
    check_layers(config, weights.names(), checkpoint.path)
    with torch.device("meta"):
        model = kind(config)
    if isinstance(model, llama.Llama) and str((checkpoint.config.get("architectures") or [""])[0]).endswith("Model"):
        setattr(model, "optional", ("lm_head",))  # noqa: B010 - an embedding model's checkpoint
    if new_head and _has_another_classifier(checkpoint.config, kind):
        weights = _WithoutClassifier(weights)
    return model, weights


def load_model(
    checkpoint: Checkpoint | str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    imatrix: str | Path | None = None,
    progress: bool | None = None,
    head: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """The model of a checkpoint (or of what `open_checkpoint` takes), filled, in eval mode.

    device: the CPU if None. dtype of the weights, or its name: if None or "auto" the checkpoint's, and float32 for GGUF files.
    quantization: None keeps what the file has: GGUF blocks, and what GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes, MLX and MXFP4 have
    quantised, stay packed, in `foveate.nn.PackedLinear`. "q8_0", "q4_0", "q4_1",
    "q4_k", "q5_k", "q6_k" or "iq4_nl" quantises every linear layer, a tied head too, but not the embedding; the head has 6 bits or more,
    as its 4-bit errors would reach every token (SmolLM2: perplexity 49.9 against 45.8). Rows that are no multiple of 256 take "q4_1" for
    "q4_k", and "q8_0" for the other two. "none" expands everything to dtype.
    imatrix: a text, or the path of a file with one, that a decoder reads before "q4_1", "q4_k", "q5_k", "q6_k" and "iq4_nl": errors are
    then weighted by the mean square of what comes in at each column. It takes a pass over at most 65536 tokens.
    progress: a bar on stderr; None shows it in a terminal for files of 256 MB or more.
    head: for BERT "encoder", "masked-lm", "sequence-classification", "token-classification" or "question-answering"; None: what the
    config names.
    new_head: draws the weights of a head that the file does not have from N(0, 0.02), biases 0, to be fine-tuned.

    Weights that need no conversion stay views of the memory-mapped file. ValueError for an unknown architecture, missing,
    unexpected or misshapen weights, truncated files, pickles.
    """
    dtype = checked_dtype(dtype)
    check_quantization(quantization, imatrix)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    model, weights = unfilled_model(checkpoint, head, new_head)
    dtype = dtype or _dtype_of(checkpoint, weights)
    device = checked_device(device)
    shown = weights.nbytes >= _LARGE and sys.stderr.isatty() if progress is None else progress
    name = f"loading {checkpoint.path.name}"
    with ProgressBar(name, "bar", "bytes", "speed", total=weights.nbytes, shown=shown) as bar:
        if new_head:
            _draw_head(model, weights, device, dtype)
        _fill(model, weights, device, dtype, quantization, bar.advance, str(checkpoint.path))
        if quantization is None:
            _say_what_was_expanded(weights, dtype, str(checkpoint.path))
    if quantization in QUANTISABLE:
        model.eval()
        found = None if imatrix is None else importance_of(model, checkpoint.tokenizer(), imatrix, shown)
        count = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        with ProgressBar(f"packing as {quantization}", "bar", "remaining", total=count, shown=shown) as bar:
            quantize_model(model, quantization, found, bar.advance)
    return model.eval()


def _dtype_of(checkpoint: Checkpoint, weights: Weights) -> torch.dtype:
    if weights.linear_layout:  # GGUF: its matrices are blocks, so there is no dtype to keep
        return torch.float32
    name = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if name is not None and (dtype := checked_dtype(name)) is not None:
        return dtype
    for stored in weights.names():
        tensor = weights.get(stored)
        if tensor.is_floating_point():  # type: ignore[union-attr]
            return tensor.dtype  # type: ignore[union-attr]
    return torch.float32


def _fill(
    model: Any, weights: Weights, device: torch.device, dtype: torch.dtype, quantization: str | None,
    advance: Callable[[int], None], where: str,
) -> None:  # fmt: skip
    sources = match_names(model, weights, where)
    shapes = {name: tuple(model.get_parameter(name).shape) for name in sources}
    for name, stored in sources.items():
        value = weights.get(stored)
        advance(value.nbytes)
        if (
            isinstance(value, Tensor)
            and value.dim() == 2
            and not weights.linear_layout
            and _fits(model.transposed, name)
        ):
            value = value.t().contiguous()
        if tuple(value.shape) != shapes[name]:
            raise CheckpointError(
                f"{_stored_name(weights, stored)} in {where} has shape {list(value.shape)}, the config asks for {list(shapes[name])}"
            )
        if isinstance(value, Blocks):
            module = model.get_submodule(name.removesuffix(".weight"))
            kept = quantization is None or (quantization == value.format and isinstance(module, nn.Linear))
            if kept and device.type != "cpu" and value.format in TABLES:
                value = Blocks(table_to_q8_0(value.blocks, value.format), "q8_0", value.in_features)
            if kept and device.type != "cpu" and value.format in (*K_FORMATS, *SCALED):
                weights.expanded[value.format.upper()] = weights.expanded.get(value.format.upper(), 0) + value.nbytes  # type: ignore[attr-defined]
                kept = False
            if kept:
                _set_blocks(model, name, value, device, dtype)
                continue
            value = dequantize(value.blocks, value.format)
        wide = dtype is torch.float16 and _fits(getattr(model, "fp32_beside_fp16", None), name)
        _set_parameter(model, name, value.to(device=device, dtype=torch.float32 if wide else dtype))
    for name, p in list(model.named_parameters()):
        if _fits(_constants(model), name):
            value = torch.zeros(p.shape, device=device, dtype=dtype) if p.is_meta else p.data
            _set_parameter(model, name, nn.Parameter(value, requires_grad=False))
    tie_weights(model)


def _constants(model: Any) -> Any:
    """The pattern of weights that are never trained, and zeros where a checkpoint has none."""
    return getattr(model, "constants", None)


def _stored_name(weights: Weights, name: str) -> str:
    return weights.stored_name(name) if isinstance(weights, RenamedWeights) else name


def _say_what_was_expanded(weights: Weights, dtype: torch.dtype, where: str) -> None:
    expanded: dict[str, int] = getattr(weights, "expanded", {})
    if expanded:
        warnings.warn(
            f"{where} has tensors of {', '.join(sorted(expanded))}, {sum(expanded.values()) / 1e6:.0f} MB, for which there is no packed "
            f"kernel here: they were expanded to {dtype}; quantization='q8_0' packs them again, rounded once more, and 'none' expands all",
            stacklevel=3,
        )


def tie_weights(model: Any) -> None:
    """Makes each name of model.tied the same tensor as the one that it stands for."""
    for alias, name in model.tied.items():
        path, _, leaf = name.rpartition(".")
        source = model.get_submodule(path)
        if isinstance(source, PackedEmbedding):
            model.set_submodule(alias.removesuffix(".weight"), source.packed)
        else:
            _set_parameter(model, alias, getattr(source, leaf))


def match_names(model: Any, weights: Weights, where: str) -> dict[str, str]:
    """{parameter's name: stored name}. Checkpoints write the names with or without the model's prefix."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sources: dict[str, str] = {}
    unexpected = []
    for stored in weights.names():
        plain = _TENSORFLOW_NORM.sub(lambda match: _NORM_NAMES[match[1]], stored)
        names = (plain, model.prefix + plain, plain.removeprefix(model.prefix))
        name = next((name for name in names if name in parameters), None)
        if name is not None:
            sources[name] = stored
        elif not _fits(model.ignored, stored):
            unexpected.append(stored)
    _untie(model, weights, sources)
    for part in getattr(model, "optional", ()):
        if not any(name.startswith(f"{part}.") for name in (*sources, *model.tied)):
            setattr(model, part, None)
            parameters = {name: p for name, p in parameters.items() if not name.startswith(f"{part}.")}
    missing = sorted(
        name
        for name, p in parameters.items()
        if p.is_meta and name not in sources and name not in model.tied and not _fits(_constants(model), name)
    )
    if missing:
        head = isinstance(model, bert.BertWithHead) and not any(name.startswith(model.prefix) for name in missing)
        cure = "; load_model(..., new_head=True) draws a new head to be fine-tuned" if head else ""
        raise CheckpointError(f"{where} lacks {_list(missing)}, which {type(model).__name__} needs by the config{cure}")
    if unexpected:
        unknown = _list([_stored_name(weights, name) for name in unexpected])
        raise CheckpointError(
            f"{where} has {unknown}, which {type(model).__name__} does not know by the config: "
            "another architecture, or a config that does not belong to these weights"
        )
    return sources


def _untie(model: Any, weights: Weights, sources: dict[str, str]) -> None:
    """Settles tied names that the file has: the second copy is not read, unless it differs, when the two are not tied at all."""
    for alias, name in list(model.tied.items()):
        if alias not in sources:
            continue
        stored = sources.pop(alias)
        if name not in sources:
            sources[name] = stored
        elif not _equal(weights.get(stored), weights.get(sources[name])):
            sources[alias] = stored
            del model.tied[alias]
            model.config = dataclasses.replace(model.config, tied=False)


def _equal(a: Tensor | Blocks, b: Tensor | Blocks) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _draw_head(model: Any, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
    if isinstance(model, decoder_classifier.LlamaForSequenceClassification):
        if "score.weight" not in weights.names():
            _set_parameter(
                model,
                "score.weight",
                torch.empty(model.score.weight.shape, device=device, dtype=dtype).normal_(0, 0.02),
            )
        return
    if not isinstance(model, bert.BertWithHead):
        raise ValueError(f"new_head=True is for BERT's heads; {type(model).__name__} has none that can be missing")
    stored = {name.removeprefix(model.prefix) for name in weights.names()}
    for name, p in list(model.named_parameters()):
        part = name.removeprefix(model.prefix)
        if part in stored or name in model.tied or not (part == name or part.startswith("pooler.")):
            continue
        value = torch.zeros(p.shape, device=device, dtype=dtype)
        if name.endswith("LayerNorm.weight"):
            value.fill_(1)
        elif name.endswith("weight"):
            value.normal_(0, 0.02)
        _set_parameter(model, name, value)


def _list(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _fits(pattern: Any, name: str) -> bool:
    return pattern is not None and pattern.fullmatch(name) is not None


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if isinstance(module, PackedLinear):
        module.bias = value.float()
    else:
        setattr(module, leaf, value if isinstance(value, nn.Parameter) else nn.Parameter(value))


def _set_blocks(model: nn.Module, name: str, value: Blocks, device: torch.device, dtype: torch.dtype) -> None:
    where = name.removesuffix(".weight")
    module = model.get_submodule(where)
    packed = PackedLinear.from_blocks(value.blocks, value.format, value.in_features).to(device)
    if isinstance(module, nn.Embedding):
        model.set_submodule(where, PackedEmbedding(packed, dtype))
        return
    if isinstance(module.bias, Tensor) and not module.bias.is_meta:  # it came before the weight
        packed.bias = module.bias.detach().float()
    model.set_submodule(where, packed)
