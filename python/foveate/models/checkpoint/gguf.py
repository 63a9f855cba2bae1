"""GGUF files: config, tokenizer and weights under Hugging Face's names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, check
from foveate.models.checkpoint.base import Blocks, Checkpoint, Weights
from foveate.models.checkpoint.gguf_file import GgufFile, GgufTensor
from foveate.models.checkpoint.gguf_names import ARCHITECTURES, ENCODERS, MIXTRAL, GgufArchitecture
from foveate.models.checkpoint.gguf_parts import read_gguf
from foveate.models.checkpoint.schemas import GGUF_MODEL
from foveate.quantization.gguf_types import BLOCKS, FLOATS, PACKED, REPACKED, expand, loaded_bytes
from foveate.tokenizer import Tokenizer
from foveate.tokenizer.gguf import CONTROL, read_tokenizer

# Special tokens after which it is the other's turn, in Llama 3, ChatML (Qwen, SmolLM2) and Gemma.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")


@dataclass(kw_only=True)
class GgufCheckpoint(Checkpoint):
    file: GgufFile
    architecture: GgufArchitecture

    def tokenizer(self) -> Tokenizer:
        backend = read_tokenizer(self.file.fields, self.path)
        return Tokenizer(backend, config=self.config, chat_template=self.chat_template)

    def weights(self) -> Weights:
        return GgufWeights(self)


def open_gguf(path: Path) -> GgufCheckpoint:
    """path: of a file, or of any part of a split one, whose path is then the first part's.

    CheckpointError for a damaged file and for an architecture that is not in the table of names.
    """
    file = read_gguf(path)
    path = file.path
    arch = _value(file, "general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds the architecture {arch!r}; known in GGUF files are {', '.join(ARCHITECTURES)}"
        )
    check(file.fields, {f"{arch}.{key}": rule for key, rule in GGUF_MODEL.items()}, path)
    mixtral = arch == "llama" and bool(_value(file, "llama.expert_count", 0))
    architecture = MIXTRAL if mixtral else ARCHITECTURES[arch]
    if architecture.model_type in ENCODERS:
        config = _bert_config(file, arch, architecture)
    else:
        config = _gpt2_config(file) if arch == "gpt2" else _llama_config(file, arch, architecture)
    config["bos_token_id"] = _value(file, "tokenizer.ggml.bos_token_id", None)
    config["pad_token_id"] = _value(file, "tokenizer.ggml.padding_token_id", None)
    config["eos_token_id"] = _end_ids(file)
    template = _value(file, "tokenizer.chat_template", None)
    return GgufCheckpoint(path=path, config=config, chat_template=template, file=file, architecture=architecture)


_REQUIRED: Any = object()


def _value(file: GgufFile, key: str, default: Any = _REQUIRED) -> Any:
    value = file.fields.get(key, default)
    if value is _REQUIRED:
        raise CheckpointError(f"{file.path} lacks {key} in its metadata")
    return value


def _vocab_size(file: GgufFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor token_embd.weight")
    shape = file.tensors["token_embd.weight"].shape
    if len(shape) != 2:
        raise CheckpointError(
            f"{file.path} has token_embd.weight of shape {list(shape)}; it must be [vocabulary, hidden]"
        )
    return shape[0]


def _end_ids(file: GgufFile) -> list[int]:
    """The end of a text and of a turn. Files often name the first only, and a chat model then would not stop: see _TURN_ENDS."""
    named = (_value(file, f"tokenizer.ggml.{key}_token_id", None) for key in ("eos", "eot", "eom"))
    tokens, kinds = (_value(file, f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type"))
    turns = (i for i, kind in enumerate(kinds[: len(tokens)]) if kind == CONTROL and tokens[i] in _TURN_ENDS)
    return list(dict.fromkeys([*(token for token in named if token is not None), *turns]))


def _llama_config(file: GgufFile, arch: str, architecture: GgufArchitecture) -> dict[str, Any]:
    def value(key: str, default: Any = _REQUIRED) -> Any:
        return _value(file, f"{arch}.{key}", default)

    hidden, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    head_dim = value("attention.key_length", hidden // heads)
    if hidden < heads:
        raise CheckpointError(
            f"{file.path} has {arch}.embedding_length={hidden} for {heads} heads: damaged, or not a model; download it again"
        )
    if value("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(
            f"{file.path} has {arch}.attention.value_length={value('attention.value_length')} and keys of {head_dim}; values of another "
            "length than the keys cannot be computed: take another model"
        )
    rotated = value("rope.dimension_count", head_dim)
    if rotated > head_dim or (rotated != head_dim and architecture.permuted):
        raise CheckpointError(
            f"{file.path} has {arch}.rope.dimension_count={rotated} and keys of {head_dim}; the rotated part of keys of another length "
            f"than the keys cannot be computed for {arch}: take another model"
        )
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length", None),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value(architecture.epsilon),
        "partial_rotary_factor": rotated / head_dim,
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, arch),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "sliding_window": value("attention.sliding_window", None),
    }
    for key, tensors in _BIASES.items():
        config[key] = any(f"blk.0.{tensor}.bias" in file.tensors for tensor in tensors)
    config |= {"use_bias": config["attention_bias"], "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors}
    if arch == "llama" and config["sliding_window"] is not None and architecture is not MIXTRAL:
        config["model_type"] = "mistral"
    config |= architecture.config(value)
    if config["intermediate_size"] is None:
        value("feed_forward_length")  # says that it lacks
    return config


# Which keys of config.json say that linear layers have biases, and tensors of the first layer that show it.
_BIASES = {
    "attention_bias": ("attn_output", "attn_q", "attn_qkv"),
    "attention_out_bias": ("attn_output",),
    "mlp_bias": ("ffn_down",),
}


def _rope_scaling(file: GgufFile, arch: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:  # Llama 3.1's scaling, worked out by the converter
        return {"rope_type": "divisors", "divisors": _floats(file, "rope_freqs.weight")}
    first_context = _value(file, f"{arch}.rope.scaling.original_context_length", None)
    if "rope_factors_long.weight" in file.tensors and "rope_factors_short.weight" in file.tensors:
        return {
            "rope_type": "longrope", "long_factor": _floats(file, "rope_factors_long.weight"),
            "short_factor": _floats(file, "rope_factors_short.weight"), "original_max_position_embeddings": first_context,
            "attention_factor": _value(file, f"{arch}.rope.scaling.attn_factor", None),
        }  # fmt: skip
    factor = _value(file, f"{arch}.rope.scaling.factor", _value(file, f"{arch}.rope.scale_linear", 1.0))
    kind = _value(file, f"{arch}.rope.scaling.type", "linear")  # files from before the type was written scale linearly
    if kind in ("none", "default") or (kind == "linear" and factor == 1):
        return None
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": first_context}


def _floats(file: GgufFile, name: str) -> list[float]:
    stored = file.tensors[name]
    if stored.kind != "F32" or len(stored.shape) != 1:
        raise CheckpointError(
            f"{file.path} has {name} of type {stored.kind}, {list(stored.shape)}; it must be a row of F32"
        )
    return stored.data.view(torch.float32).tolist()


def _gpt2_config(file: GgufFile) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": _vocab_size(file),
        "n_embd": _value(file, "gpt2.embedding_length"),
        "n_inner": _value(file, "gpt2.feed_forward_length"),
        "n_layer": _value(file, "gpt2.block_count"),
        "n_head": _value(file, "gpt2.attention.head_count"),
        "n_positions": _value(file, "gpt2.context_length"),
        "layer_norm_epsilon": _value(file, "gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


_POOLINGS = {1: "mean_tokens", 2: "cls_token", 3: "lasttoken"}  # by pooling_type


def _bert_config(file: GgufFile, arch: str, architecture: GgufArchitecture) -> dict[str, Any]:
    """Positions of RoBERTa's kind were stored without those before the first, so that the file is a BERT."""
    types = file.tensors.get("token_types.weight")
    return {
        "model_type": architecture.model_type,
        "vocab_size": _vocab_size(file),
        "hidden_size": _value(file, f"{arch}.embedding_length"),
        "intermediate_size": _value(file, f"{arch}.feed_forward_length"),
        "num_hidden_layers": _value(file, f"{arch}.block_count"),
        "num_attention_heads": _value(file, f"{arch}.attention.head_count"),
        "max_position_embeddings": _value(file, f"{arch}.context_length"),
        "layer_norm_eps": _value(file, f"{arch}.{architecture.epsilon}"),
        "rope_theta": _value(file, f"{arch}.rope.freq_base", 1000.0),
        "type_vocab_size": 0 if types is None else types.shape[0] if len(types.shape) == 2 else 1,
        "pooling": _POOLINGS.get(_value(file, f"{arch}.pooling_type", 0)),
    }


_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


class GgufWeights:
    linear_layout = True

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        file, config = checkpoint.file, checkpoint.config
        self.architecture = checkpoint.architecture
        self.fused = checkpoint.architecture.fused
        self.heads: dict[str, Any] = {
            "attn_q": config.get("num_attention_heads"),
            "attn_k": config.get("num_key_value_heads"),
        }
        self.path = checkpoint.path
        self.expanded: dict[str, int] = {}  # bytes of types that have no packed kernel, among those that were read
        weights = [tensor for name, tensor in file.tensors.items() if name not in _ROPE_TENSORS]
        self.tensors = {self.architecture.huggingface_name(tensor.name): tensor for tensor in weights}
        self.nbytes = sum(tensor.data.nbytes for tensor in weights)
        self.loaded_bytes = sum(loaded_bytes(tensor.kind, tensor.shape) for tensor in weights)

    def names(self) -> Iterable[str]:
        return self.tensors

    def get(self, name: str) -> Tensor | Blocks:
        tensor = self.tensors[name]
        kind, shape, data = tensor.kind, tensor.shape, tensor.data
        rows = self._row_order(tensor.name)
        if kind in FLOATS:
            data = rows(data.view(FLOATS[kind]).view(shape))
            if self.architecture.plus_one and tensor.name.endswith("norm.weight"):
                return data - 1
            return data[None] if tensor.name.endswith("ffn_gate_inp_shexp.weight") and data.dim() == 1 else data
        if kind not in BLOCKS:
            raise CheckpointError(
                f"the tensor {tensor.name} of {self.path} is of type {kind}; supported are {', '.join(BLOCKS)}: requantise the file "
                "(llama.cpp's llama-quantize) or take another of the model's files"
            )
        experts = len(shape) == 3 and name.rpartition(".")[0].endswith(tuple(self.fused))
        if len(shape) != 2 and not experts:
            raise CheckpointError(
                f"{self.path} has {tensor.name} of type {kind} in shape {list(shape)}; only matrices have blocks"
            )
        value = in_file_order(tensor)
        if isinstance(value, Blocks):
            return Blocks(rows(value.blocks), value.format, value.in_features)
        self.expanded[kind] = self.expanded.get(kind, 0) + data.nbytes
        return rows(value)

    def _row_order(self, stored: str) -> Callable[[Tensor], Tensor]:
        """In files of Llama and its like the rows of attn_q and attn_k are stored with the two of a rotary pair side by side."""
        part = ".".join(stored.split(".")[-2:-1])
        if not self.architecture.permuted or part not in ("attn_q", "attn_k"):
            return lambda x: x
        heads, rows = self.heads[part], self.tensors[self.architecture.huggingface_name(stored)].shape[0]
        if rows % (2 * heads):
            raise CheckpointError(f"{self.path} has {stored} of {rows} rows, which are not {heads} heads of pairs")
        return lambda x: unpermute(x, heads)


def in_file_order(tensor: GgufTensor) -> Tensor | Blocks:
    """Floats as they are; blocks, of several matrices one after the other, where a packed format has exactly their weights; else fp32."""
    kind, shape, data = tensor.kind, tensor.shape, tensor.data
    if kind in FLOATS:
        return data.view(FLOATS[kind]).view(shape)
    rows = data.view(math.prod(shape[:-1]), -1)
    if kind in PACKED:
        return Blocks(rows, PACKED[kind], shape[-1])
    if kind in REPACKED:
        format, convert = REPACKED[kind]
        with contextlib.suppress(ValueError):  # of scales that the format has no room for
            return Blocks(convert(rows), format, shape[-1])
    return expand(data, kind, shape)


def unpermute(x: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] from the order of pairs (2c, 2c + 1) to that of pairs (c, c + D / 2), in each head.

    A row of blocks moves as a whole, so nothing is quantised again. Rows left as they are would give a model that still talks,
    at three times the perplexity.
    """
    D = x.shape[0] // heads
    return x.view(heads, D // 2, 2, -1).transpose(1, 2).reshape(x.shape)
