"""GGUF files of the other decoder families, written with the gguf library's names: the logits are those of transformers."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from foveate.models import load_model, open_checkpoint
from foveate.models.checkpoint.gguf_names import ARCHITECTURES
from foveate.models.decoder_families import FAMILIES
from foveate.nn import PackedLinear
from model_cases import assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, LAYERS = 97, 4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": True,
}  # fmt: skip
MOE = {"expert_count": 4, "expert_used_count": 2}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 9 for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)], "original_max_position_embeddings": 32, "partial_rotary_factor": 0.75,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
# architecture -> (transformers' settings, the file's own keys)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma": ({}, {}),
    "gemma3": (
        {
            "sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention"] * 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        {"attention.sliding_window": 6, "rope.scaling.factor": 8.0, "rope.scaling.type": "linear", "rope.freq_base": 1e6},
    ),
    "phi3": (
        {"rope_parameters": LONG, "original_max_position_embeddings": 32},
        {"rope.scaling.original_context_length": 32, "rope.dimension_count": 12},
    ),
    "qwen2moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
        MOE | {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    ),
    "qwen3moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
        MOE | {"expert_feed_forward_length": 32},
    ),
    "llama": ({"num_local_experts": 4, "num_experts_per_tok": 2}, MOE | {"rope.freq_base": 1e6}),  # Mixtral
    "gpt-oss": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "rope_parameters": YARN},
        MOE | {"expert_feed_forward_length": 96, "attention.sliding_window": 6, "rope.scaling.type": "yarn",
               "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 16},
    ),
    "olmo2": ({}, {}),
    "granite": (
        {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0},
        {"attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 2.0},
    ),
    "smollm3": ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e6}}, {"rope.freq_base": 2e6}),
    "command-r": ({"logit_scale": 0.3}, {"logit_scale": 0.3, "rope.freq_base": 5e5}),
    "cohere2": ({"sliding_window": 6}, {"attention.sliding_window": 6, "logit_scale": 0.0625}),
    "starcoder2": ({"use_bias": True}, {}),
    "ernie4_5": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {}),
    "seed_oss": ({}, {}),
    "arcee": ({}, {}),
}  # fmt: skip
LAYER_NORMS = ("command-r", "cohere2", "starcoder2")
Q = gguf.GGMLQuantizationType


def theirs(arch: str) -> Any:
    model_type = "mixtral" if arch == "llama" else ARCHITECTURES[arch].model_type
    config_class = transformers.AutoConfig.for_model(model_type).__class__
    sizes = SIZES if hasattr(config_class(), "head_dim") else {k: v for k, v in SIZES.items() if k != "head_dim"}
    model = getattr(transformers, FAMILIES[model_type].name)(
        config_class(**(sizes | CASES[arch][0]), attn_implementation="eager")
    )
    randomize(model, 0.2)
    return model.eval()


def converted(model: Any, arch: str) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter makes of the weights before it writes them: experts in one tensor for each projection."""
    weights = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        name = name.replace("mlp.experts.gate_up_proj_bias", "mlp.experts.gate_up_proj.bias")
        name = name.replace("mlp.experts.down_proj_bias", "mlp.experts.down_proj.bias")
        if arch == "gpt-oss" and "experts.gate_up_proj" in name:
            base, kind = name.partition("gate_up_proj")[0], "bias" if name.endswith("bias") else "weight"
            weight = weight if kind == "bias" else weight.transpose(1, 2)
            weights[f"{base}gate_proj.{kind}"], weights[f"{base}up_proj.{kind}"] = weight[:, ::2], weight[:, 1::2]
            continue
        if name.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, 1)
            weights[name.replace("gate_up_proj", "gate_proj.weight")] = gate
            weights[name.replace("gate_up_proj", "up_proj.weight")] = up
            continue
        if name.endswith("experts.down_proj"):
            weight = weight.transpose(1, 2) if arch == "gpt-oss" else weight
            name += ".weight"
        if ARCHITECTURES[arch].plus_one and name.endswith("norm.weight"):
            weight = weight + 1
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if ARCHITECTURES[arch].permuted and heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
        weights[name if name.endswith((".weight", ".bias")) else f"{name}.weight"] = weight
    return weights


def write(path: Path, model: Any, arch: str, kind: Q = Q.F32) -> None:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    eps = getattr(model.config, "layer_norm_eps", None) or getattr(model.config, "norm_epsilon", None)
    if arch in LAYER_NORMS:
        writer.add_layer_norm_eps(eps)
    else:
        writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    for key, value in CASES[arch][1].items():
        add = (
            writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_float32
        )
        add(f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), LAYERS)
    if arch == "phi3":
        for part in ("long", "short"):
            factors = torch.tensor(LONG[f"{part}_factor"])
            writer.add_tensor(f"rope_factors_{part}.weight", factors.numpy())
    for name, weight in converted(model, arch).items():
        matrix = weight.dim() > 1 and not re.search(
            r"\.(gate|router|shared_expert_gate)\.weight$|norm|experts.*bias", name
        )
        data = weight.contiguous().numpy()
        if name.endswith("shared_expert_gate.weight"):
            data = data[0]
        used = kind if matrix else Q.F32
        found = names.get_name(name, (".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, gguf.quants.quantize(data, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_architecture_has_a_case() -> None:
    tested_elsewhere = {"llama", "qwen2", "qwen3", "gemma2", "gpt2", "bert", "nomic-bert"}
    assert set(CASES) | tested_elsewhere == set(ARCHITECTURES)


@pytest.mark.parametrize("arch", CASES)
def test_a_file_equals_transformers(arch: str, tmp_path: Path) -> None:
    model = theirs(arch)
    write(tmp_path / "model.gguf", model, arch)
    ours = load_model(tmp_path / "model.gguf")
    tokens = torch.randint(1, VOCAB, (2, 21))
    with torch.inference_mode():
        expected = model(tokens).logits
        assert_logits_close(ours(tokens), expected)
        write(tmp_path / "blocks.gguf", model, arch, Q.Q8_0)
        packed = load_model(tmp_path / "blocks.gguf")
        expanded = load_model(tmp_path / "blocks.gguf", quantization="none")
    linears = {name: m for name, m in expanded.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = [name for name in linears if isinstance(packed.get_submodule(name), PackedLinear)]
    assert len(kept) >= 4 * LAYERS
    for name in kept:
        assert torch.equal(packed.get_submodule(name).dequantize(), linears[name].weight)


def test_a_damaged_mixture_is_named(tmp_path: Path) -> None:
    model = theirs("qwen3moe")
    CASES_BEFORE = dict(CASES["qwen3moe"][1])
    try:
        CASES["qwen3moe"][1]["expert_count"] = 6
        write(tmp_path / "model.gguf", model, "qwen3moe")
    finally:
        CASES["qwen3moe"][1].update(CASES_BEFORE)
    with pytest.raises(ValueError, match="is of 4 experts, and the config says 6"):
        load_model(open_checkpoint(tmp_path / "model.gguf"))
