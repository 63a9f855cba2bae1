"""Writes Hugging Face folders: config.json, the tokenizer's files, and safetensors in shards, one of which is in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.files.checked import CheckpointError, is_there
from foveate.models.checkpoint.base import Blocks, Checkpoint
from foveate.models.checkpoint.gguf import GgufCheckpoint
from foveate.models.loading import match_names, unfilled_model
from foveate.models.registry import architecture_of
from foveate.models.rotary import Rotary
from foveate.quantization.gguf_blocks import dequantize

SHARD = 4 * 10**9  # bytes
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "generation_config.json", "modules.json", "config_sentence_transformers.json",
    "sentence_bert_config.json",
)  # fmt: skip
# What only the loader's own config has, or what has been done away with.
_OWN_KEYS = ("quantization_config", "compression_config", "use_bias", "use_qk_norm", "attention_out_bias")
# Llama 3.1's, 3.2's and 3.3's settings, of which GGUF files keep only what follows from them.
_LLAMA3 = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]


def write_folder(checkpoint: Checkpoint, out: Path, dtype: torch.dtype, advance: Callable[[int], None]) -> None:
    """All of a checkpoint in `out`, an empty folder: floating-point weights in dtype, packed ones expanded to it."""
    config, tensors = _from_gguf(checkpoint) if isinstance(checkpoint, GgufCheckpoint) else _from_folder(checkpoint)
    config = {
        key: value
        for key, value in config.items()
        if (value is not None or key.endswith("_token_id")) and key not in _OWN_KEYS
    }
    name = str(dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": name}
    _write_json(out / "config.json", config)
    _write_tokenizer(checkpoint, out)
    _write_shards(out, tensors, dtype, advance)


def _from_folder(checkpoint: Checkpoint) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Under the names that the folder has. Other libraries' quantised weights come expanded from `weights`."""
    unfilled_model(checkpoint)  # refuses what cannot be read, before anything is written
    weights = checkpoint.weights()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in weights.names():
            value = weights.get(name)
            yield name, dequantize(value.blocks, value.format) if isinstance(value, Blocks) else value

    return dict(checkpoint.config), tensors()


def _from_gguf(checkpoint: GgufCheckpoint) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Under the names of the modules here, which for these families are Hugging Face's."""
    config = dict(checkpoint.config)
    architecture = architecture_of(config)
    kind = config["model_type"]
    if architecture.names or (architecture.fused and kind not in ("phi3", "qwen2_moe", "qwen3_moe")):
        raise CheckpointError(f"a GGUF file of {kind} cannot be written as a folder yet; --to gguf requantises it")
    model, weights = unfilled_model(checkpoint)
    sources = match_names(model, weights, str(checkpoint.path))
    config["architectures"] = [architecture.exported_as[kind]]
    if (scaling := config.get("rope_scaling")) and scaling.get("rope_type") == "divisors":
        config["rope_scaling"] = _llama3_settings(scaling["divisors"], config)
    elif scaling:
        config["rope_scaling"] = {key: value for key, value in scaling.items() if value is not None}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        fused: dict[str, list[Tensor]] = {}
        for name, stored in sources.items():
            if name in model.tied:
                continue
            value = weights.get(stored)
            tensor = dequantize(value.blocks, value.format) if isinstance(value, Blocks) else value
            if model.transposed is not None and model.transposed.fullmatch(name) and tensor.dim() == 2:
                tensor = tensor.t().contiguous()
            whole = _fused_name(name) if kind == "phi3" else None
            if whole is None:
                yield name, tensor
                continue
            fused.setdefault(whole, []).append(tensor)
            if len(fused[whole]) == (3 if "qkv" in whole else 2):
                yield whole, torch.cat(fused.pop(whole))

    return config, tensors()


_PHI3_FUSED = {
    "self_attn.q_proj": "self_attn.qkv_proj", "self_attn.k_proj": "self_attn.qkv_proj", "self_attn.v_proj": "self_attn.qkv_proj",
    "mlp.gate_proj": "mlp.gate_up_proj", "mlp.up_proj": "mlp.gate_up_proj",
}  # fmt: skip


def _fused_name(name: str) -> str | None:
    """What Phi-3 calls the module that this one is a part of."""
    return next((name.replace(part, whole) for part, whole in _PHI3_FUSED.items() if f".{part}." in name), None)


def _llama3_settings(divisors: list[float], config: dict[str, Any]) -> dict[str, Any]:
    rotated, theta = 2 * len(divisors), config["rope_theta"]
    plain = 1.0 / theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated)
    for settings in _LLAMA3:
        found = plain / Rotary(rotated, config["max_position_embeddings"], theta, settings).frequencies
        if torch.allclose(found, torch.tensor(divisors), rtol=1e-3):
            return settings
    raise CheckpointError(
        "the file's rope_freqs.weight is none of Llama 3.1's to 3.3's, so that config.json has no words for it"
    )


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(checkpoint: Checkpoint, out: Path) -> None:
    if not isinstance(checkpoint, GgufCheckpoint):
        for name in _COPIED:
            if is_there(checkpoint.path / name):
                shutil.copyfile(checkpoint.path / name, out / name)
        if (checkpoint.path / "1_Pooling").is_dir():
            shutil.copytree(checkpoint.path / "1_Pooling", out / "1_Pooling")
        return
    tokenizer = checkpoint.tokenizer()
    tokenizer.backend.save(str(out / "tokenizer.json"))
    named: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special}
    if tokenizer.pad_id is not None:
        named["pad_token"] = tokenizer.backend.id_to_token(tokenizer.pad_id)
    _write_json(out / "tokenizer_config.json", named | {"clean_up_tokenization_spaces": False})
    if checkpoint.chat_template:
        (out / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": sorted(tokenizer.eos_ids) or None,
        "pad_token_id": tokenizer.pad_id,
    }
    _write_json(out / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def _write_shards(
    out: Path, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, advance: Callable[[int], None]
) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size, total = 0, 0

    def flush() -> None:
        nonlocal size
        if held:
            shards.append(list(held))
            save_file(held, str(out / f"model-{len(shards):05}.safetensors"), metadata={"format": "pt"})
            held.clear()
            size = 0

    for name, tensor in tensors:
        value = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if held and size + value.nbytes > SHARD:
            flush()
        held[name] = (
            value.contiguous().clone()
            if value.data_ptr() in {t.data_ptr() for t in held.values()}
            else value.contiguous()
        )
        size, total = size + value.nbytes, total + value.nbytes
        advance(value.numel())
    flush()
    if len(shards) == 1:
        (out / "model-00001.safetensors").rename(out / "model.safetensors")
        return
    places: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        (out / f"model-{i:05}.safetensors").rename(out / file)
        places |= dict.fromkeys(names, file)
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
