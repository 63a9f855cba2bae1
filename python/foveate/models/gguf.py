"""GGUF files, through the gguf library's memory-mapped reader: config, tokenizer and weights under Hugging Face's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.models.checkpoint import NEED_MODELS, Blocks, Checkpoint, Weights
from foveate.models.gguf_tokenizer import read_tokenizer
from foveate.tokenizer import Tokenizer

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCKS = {"Q8_0": "q8_0", "Q4_0": "q4_0", "Q4_1": "q4_1"}

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
    reader: Any = None

    def tokenizer(self) -> Tokenizer:
        backend = read_tokenizer(self.reader)
        return Tokenizer(backend, config=self.config, chat_template=self.chat_template)

    def weights(self) -> Weights:
        return GgufWeights(self)


def open_gguf(path: Path) -> GgufCheckpoint:
    """ValueError for a truncated file and for an architecture that is not in the table of names."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"gguf {NEED_MODELS}") from error
    try:
        # copy on write: tensors are views of the file that can be written without changing it
        reader = gguf.GGUFReader(path, "c")
    except Exception as error:  # whatever the reader stumbles over
        raise ValueError(
            f"{path} is truncated or damaged: reading it as GGUF failed with {error!r}; download it again"
        ) from error
    arch = _value(reader, "general.architecture")
    if arch not in _NAMES:
        raise ValueError(f"{path} holds the architecture {arch!r}; known in GGUF files are {', '.join(_NAMES)}")
    config = _gpt2_config(reader) if arch == "gpt2" else _llama_config(reader, arch)
    for key in ("bos", "eos", "padding"):
        config[f"{key.removesuffix('ding')}_token_id"] = _value(reader, f"tokenizer.ggml.{key}_token_id", None)
    template = _value(reader, "tokenizer.chat_template", None)
    return GgufCheckpoint(path=path, config=config, chat_template=template, reader=reader)


_REQUIRED: Any = object()


def _value(reader: Any, key: str, default: Any = _REQUIRED) -> Any:
    if key in reader.fields:
        return reader.fields[key].contents()
    if default is _REQUIRED:
        raise ValueError(f"the GGUF file lacks {key}")
    return default


def _shape(reader: Any, name: str) -> list[int]:
    """GGUF lists the fastest dimension first."""
    tensor = next((t for t in reader.tensors if t.name == name), None)
    if tensor is None:
        raise ValueError(f"the GGUF file lacks the tensor {name}")
    return [int(n) for n in reversed(tensor.shape)]


def _has(reader: Any, name: str) -> bool:
    return any(t.name == name for t in reader.tensors)


def _llama_config(reader: Any, arch: str) -> dict[str, Any]:
    def value(key: str, default: Any = _REQUIRED) -> Any:
        return _value(reader, f"{arch}.{key}", default)

    hidden, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    config = {
        "model_type": arch,
        "vocab_size": _shape(reader, "token_embd.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(reader, arch),
        "tie_word_embeddings": not _has(reader, "output.weight"),
        "sliding_window": value("attention.sliding_window", None),
    }
    if arch == "llama":
        config["attention_bias"] = _has(reader, "blk.0.attn_output.bias")
        config["mlp_bias"] = _has(reader, "blk.0.ffn_down.bias")
        if config["sliding_window"] is not None:
            config["model_type"] = "mistral"
    if arch == "gemma2":
        config["hidden_activation"] = "gelu_pytorch_tanh"
        config["attn_logit_softcapping"] = value("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = value("final_logit_softcapping", 30.0)
        # Not in the file. The 27B model, told by its 46 layers, divides by hidden / heads, the others by the head dim.
        config["query_pre_attn_scalar"] = hidden // heads if layers == 46 else config["head_dim"]
    return config


def _rope_scaling(reader: Any, arch: str) -> dict[str, Any] | None:
    if _has(reader, "rope_freqs.weight"):  # Llama 3.1's scaling, worked out by the converter
        tensor = next(t for t in reader.tensors if t.name == "rope_freqs.weight")
        return {"rope_type": "divisors", "divisors": [float(x) for x in tensor.data]}
    kind = _value(reader, f"{arch}.rope.scaling.type", "none")
    if kind in ("none", "default"):
        return None
    return {"rope_type": kind, "factor": _value(reader, f"{arch}.rope.scaling.factor", 1.0)}


def _gpt2_config(reader: Any) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": _shape(reader, "token_embd.weight")[0],
        "n_embd": _value(reader, "gpt2.embedding_length"),
        "n_inner": _value(reader, "gpt2.feed_forward_length"),
        "n_layer": _value(reader, "gpt2.block_count"),
        "n_head": _value(reader, "gpt2.attention.head_count"),
        "n_positions": _value(reader, "gpt2.context_length"),
        "layer_norm_epsilon": _value(reader, "gpt2.attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": not _has(reader, "output.weight"),
    }


class GgufWeights:
    linear_layout = True

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        reader, config = checkpoint.reader, checkpoint.config
        self.arch = _value(reader, "general.architecture")
        self.heads: dict[str, Any] = {
            "attn_q": config.get("num_attention_heads"),
            "attn_k": config.get("num_key_value_heads"),
        }
        self.path = checkpoint.path
        self.tensors = {huggingface_name(t.name, self.arch): t for t in reader.tensors if t.name != "rope_freqs.weight"}
        self.nbytes = sum(int(t.n_bytes) for t in self.tensors.values())

    def names(self) -> Iterable[str]:
        return self.tensors

    def get(self, name: str) -> Tensor | Blocks:
        tensor = self.tensors[name]
        kind = tensor.tensor_type.name
        rows = self._row_order(tensor.name)
        shape = [int(n) for n in reversed(tensor.shape)]
        data = torch.from_numpy(tensor.data)
        if kind in _FLOATS:
            data = rows(data.view(_FLOATS[kind]).view(shape))
            # Gemma's converter adds the 1 of 1 + weight to the norms.
            return data - 1 if self.arch == "gemma2" and tensor.name.endswith("norm.weight") else data
        if kind in _BLOCKS:
            return Blocks(rows(data.view(shape[0], -1)), _BLOCKS[kind], shape[1])
        supported = ", ".join([*_FLOATS, *_BLOCKS])
        raise ValueError(
            f"the tensor {tensor.name} of {self.path} is of type {kind}; supported are {supported}: requantise the file "
            "(llama.cpp's llama-quantize) or take another of the model's files"
        )

    def _row_order(self, stored: str) -> Callable[[Tensor], Tensor]:
        """For architecture "llama" the rows of attn_q and attn_k are stored with the two of a rotary pair side by side."""
        part = stored.split(".")[-2]
        if self.arch != "llama" or part not in ("attn_q", "attn_k"):
            return lambda x: x
        return lambda x: unpermute(x, self.heads[part])


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
