"""Small whole checkpoints to be damaged: a Llama as a Hugging Face folder and as a GGUF file, made without the readers under test."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HIDDEN, VOCAB, LAYERS = 32, 64, 2
TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "eos_token_id": 1, "bos_token_id": 0,
    "torch_dtype": "float32", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                               "original_max_position_embeddings": 32},
}  # fmt: skip


def vocabulary() -> list[str]:
    return ["<s>", "</s>", "<pad>", *map(chr, range(33, 33 + VOCAB - 4)), '!"']


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    parts = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": (32, 32),
             "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32), "mlp.down_proj": (32, 64),
             "input_layernorm": (32,), "post_attention_layernorm": (32,)}  # fmt: skip
    for i in range(LAYERS):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in parts.items()}
    return found | {"model.norm.weight": (32,)}


def llama_folder(folder: Path, **config: Any) -> Path:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    save_file({n: 0.2 * torch.randn(s, generator=generator) for n, s in shapes().items()}, folder / "model.safetensors")
    put(folder / "config.json", CONFIG | config)
    put(
        folder / "generation_config.json",
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "eos_token_id": [1], "do_sample": True},
    )
    put(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE},
    )
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary())}, [("!", '"')]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def put(file: Path, value: Any) -> Path:
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    return file


def _string(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def field(value: Any) -> bytes:
    """Type and value as GGUF writes them; bytes stay what they are."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<IQ", 10, value) if value >= 0 else struct.pack("<Iq", 11, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    if not value or isinstance(value[0], (str, bytes)):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value[0], float):
        return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)
    return struct.pack(f"<IIQ{len(value)}i", 9, 5, len(value), *value)


Tensors = dict[str, tuple[list[int], int, int | None]]  # shape with the fastest first, type, offset


def gguf_file(file: Path, change: Callable[[dict[str, Any], Tensors], Any] | None = None) -> Path:
    """Of the model of llama_folder with other weights, in F32."""
    fields: dict[str, Any] = {
        "general.architecture": "llama", "llama.context_length": 64, "llama.embedding_length": HIDDEN, "llama.block_count": LAYERS,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": vocabulary(), "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (VOCAB - 3),
        "tokenizer.ggml.merges": ['! "'], "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }  # fmt: skip
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    tensors: Tensors = {}
    for name, shape in shapes().items():
        short = (
            name.replace("model.layers.", "blk.")
            .replace("model.embed_tokens", "token_embd")
            .replace("lm_head", "output")
        )
        short = short.replace("model.norm", "output_norm")
        for theirs, ours in names.items():
            short = short.replace(theirs, ours)
        tensors[short] = (list(reversed(shape)), 0, None)
    if change is not None:
        change(fields, tensors)
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields))
    out += b"".join(_string(key) + field(value) for key, value in fields.items())
    data = bytearray()
    for name, (shape, kind, offset) in tensors.items():
        out += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        out += struct.pack("<IQ", kind, len(data) if offset is None else offset)
        if offset is None:
            data += struct.pack("<f", 0.01) * torch.Size(shape).numel()
            data += b"\0" * (-len(data) % 32)
    file.write_bytes(out + b"\0" * (-len(out) % 32) + data)
    return file
