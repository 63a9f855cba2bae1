"""GGUF files: config, tokenizer and weights under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, check
from foveate.models.checkpoint.base import Blocks, Checkpoint, Weights
from foveate.models.checkpoint.gguf_file import GgufFile
from foveate.models.checkpoint.schemas import GGUF, GGUF_MODEL
from foveate.quantization.gguf_types import BLOCKS, FLOATS, PACKED, REPACKED, expand, loaded_bytes
from foveate.tokenizer import Tokenizer
from foveate.tokenizer.gguf import CONTROL, read_tokenizer

# Special tokens after which it is the other's turn, in Llama 3, ChatML (Qwen, SmolLM2) and Gemma.
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>")

_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_LAYER = _LLAMA_LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_LLAMA_OTHER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_OTHER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
# architecture: (names outside of the layers, prefix of a layer, names in a layer)
_NAMES = dict.fromkeys(("llama", "qwen2", "qwen3"), (_LLAMA_OTHER, "model.layers.", _LLAMA_LAYER)) | {
    "gemma2": (_LLAMA_OTHER, "model.layers.", _GEMMA_LAYER),
    "gpt2": (_GPT2_OTHER, "transformer.h.", _GPT2_LAYER),
}


@dataclass
class GgufCheckpoint(Checkpoint):
    file: GgufFile | None = None

    def tokenizer(self) -> Tokenizer:
        assert self.file is not None
        backend = read_tokenizer(self.file.fields, self.path)
        return Tokenizer(backend, config=self.config, chat_template=self.chat_template)

    def weights(self) -> Weights:
        return GgufWeights(self)


def open_gguf(path: Path) -> GgufCheckpoint:
    """CheckpointError for a damaged file and for an architecture that is not in the table of names."""
    file = GgufFile(path)
    check(file.fields, GGUF, path)
    parts = file.fields.get("split.count", 1)
    if parts > 1:
        raise CheckpointError(
            f"{path} is one of {parts} parts of a model; join them with llama.cpp's llama-gguf-split --merge"
        )
    arch = _value(file, "general.architecture")
    if arch not in _NAMES:
        raise CheckpointError(f"{path} holds the architecture {arch!r}; known in GGUF files are {', '.join(_NAMES)}")
    check(file.fields, {f"{arch}.{key}": rule for key, rule in GGUF_MODEL.items()}, path)
    config = _gpt2_config(file) if arch == "gpt2" else _llama_config(file, arch)
    config["bos_token_id"] = _value(file, "tokenizer.ggml.bos_token_id", None)
    config["pad_token_id"] = _value(file, "tokenizer.ggml.padding_token_id", None)
    config["eos_token_id"] = _end_ids(file)
    template = _value(file, "tokenizer.chat_template", None)
    return GgufCheckpoint(path=path, config=config, chat_template=template, file=file)


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


def _llama_config(file: GgufFile, arch: str) -> dict[str, Any]:
    def value(key: str, default: Any = _REQUIRED) -> Any:
        return _value(file, f"{arch}.{key}", default)

    if value("expert_count", 0):
        raise CheckpointError(
            f"{file.path} is a mixture of {value('expert_count')} experts, which is not supported; take a dense model"
        )
    hidden, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    head_dim = value("attention.key_length", hidden // heads)
    for key, meaning in (("attention.value_length", "values"), ("rope.dimension_count", "the rotated part of keys")):
        if value(key, head_dim) != head_dim:
            raise CheckpointError(
                f"{file.path} has {arch}.{key}={value(key)} and keys of {head_dim}; {meaning} of another length than the keys cannot be "
                "computed: take another model"
            )
    config = {
        "model_type": arch,
        "vocab_size": _vocab_size(file),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, arch),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "sliding_window": value("attention.sliding_window", None),
    }
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_output.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
        if config["sliding_window"] is not None:
            config["model_type"] = "mistral"
    if arch == "gemma2":
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["attn_logit_softcapping"] = value("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = value("final_logit_softcapping", 30.0)
        # Not in the file. The 27B model, told by its 46 layers, divides by hidden / heads, the others by the head dim.
        config["query_pre_attn_scalar"] = hidden // heads if layers == 46 else config["head_dim"]
    return config


def _rope_scaling(file: GgufFile, arch: str) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:  # Llama 3.1's scaling, worked out by the converter
        stored = file.tensors["rope_freqs.weight"]
        if stored.kind != "F32" or len(stored.shape) != 1:
            raise CheckpointError(
                f"{file.path} has rope_freqs.weight of type {stored.kind}, {list(stored.shape)}; it must be a row of F32"
            )
        return {"rope_type": "divisors", "divisors": stored.data.view(torch.float32).tolist()}
    factor = _value(file, f"{arch}.rope.scaling.factor", _value(file, f"{arch}.rope.scale_linear", 1.0))
    kind = _value(file, f"{arch}.rope.scaling.type", "linear")  # files from before the type was written scale linearly
    if kind in ("none", "default") or (kind == "linear" and factor == 1):
        return None
    first_context = _value(file, f"{arch}.rope.scaling.original_context_length", None)
    return {"rope_type": kind, "factor": factor, "original_max_position_embeddings": first_context}


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


class GgufWeights:
    linear_layout = True

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        file, config = checkpoint.file, checkpoint.config
        assert file is not None
        self.arch = _value(file, "general.architecture")
        self.heads: dict[str, Any] = {
            "attn_q": config.get("num_attention_heads"),
            "attn_k": config.get("num_key_value_heads"),
        }
        self.path = checkpoint.path
        self.expanded: dict[str, int] = {}  # bytes of types that have no packed kernel, among those that were read
        weights = [tensor for name, tensor in file.tensors.items() if name != "rope_freqs.weight"]
        self.tensors = {huggingface_name(tensor.name, self.arch): tensor for tensor in weights}
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
            # Gemma's converter adds the 1 of 1 + weight to the norms.
            return data - 1 if self.arch == "gemma2" and tensor.name.endswith("norm.weight") else data
        if kind in BLOCKS:
            if len(shape) != 2:
                raise CheckpointError(
                    f"{self.path} has {tensor.name} of type {kind} in shape {list(shape)}; only matrices have blocks"
                )
            if kind in PACKED:
                return Blocks(rows(data.view(shape[0], -1)), PACKED[kind], shape[1])
            if kind in REPACKED:
                format, convert = REPACKED[kind]
                return Blocks(rows(convert(data.view(shape[0], -1))), format, shape[1])
            self.expanded[kind] = self.expanded.get(kind, 0) + data.nbytes
            return rows(expand(data, kind, shape))
        supported = ", ".join(BLOCKS)
        raise CheckpointError(
            f"the tensor {tensor.name} of {self.path} is of type {kind}; supported are {supported}: requantise the file "
            "(llama.cpp's llama-quantize) or take another of the model's files"
        )

    def _row_order(self, stored: str) -> Callable[[Tensor], Tensor]:
        """For architecture "llama" the rows of attn_q and attn_k are stored with the two of a rotary pair side by side."""
        part = ".".join(stored.split(".")[-2:-1])
        if self.arch != "llama" or part not in ("attn_q", "attn_k"):
            return lambda x: x
        heads, rows = self.heads[part], self.tensors[huggingface_name(stored, self.arch)].shape[0]
        if rows % (2 * heads):
            raise CheckpointError(f"{self.path} has {stored} of {rows} rows, which are not {heads} heads of pairs")
        return lambda x: unpermute(x, heads)


def unpermute(x: Tensor, heads: int) -> Tensor:
    """Rows [heads * D, ...] from the order of pairs (2c, 2c + 1) to that of pairs (c, c + D / 2), in each head.

    A row of blocks moves as a whole, so nothing is quantised again. Rows left as they are would give a model that still talks,
    at three times the perplexity.
    """
    D = x.shape[0] // heads
    return x.view(heads, D // 2, 2, -1).transpose(1, 2).reshape(x.shape)


def huggingface_name(name: str, arch: str) -> str:
    """blk.7.attn_q.weight -> model.layers.7.self_attn.q_proj.weight; names outside of the table stay as they are."""
    others, prefix, parts = _NAMES[arch]
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
        layer, part, kind = match.groups()
        return f"{prefix}{layer}.{parts[part]}.{kind}" if part in parts else name
    part, _, kind = name.rpartition(".")
    return f"{others[part]}.{kind}" if part in others else name
