"""Safetensors that other libraries have quantised: exactly their weights, packed, and the text of the expanded model."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from foveate import LLM, SamplingParams
from foveate.models import convert, load_model
from foveate.nn import PackedLinear
from foveate.quantization.integers import unpack_words
from model_cases import assert_logits_close, randomize
from quantized_files import (
    awq,
    bitsandbytes_4bit,
    bitsandbytes_8bit,
    fp8,
    fp8_tiles,
    gptq,
    int8,
    mlx,
    pack_quantized,
    quantize_folder,
    words,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = torch.arange(3, 19)[None]


def saved(
    path: Path, kind: Any = transformers.LlamaForCausalLM, config: Any = transformers.LlamaConfig, **changes: Any
) -> Path:
    torch.manual_seed(0)
    model = kind(config(**LLAMA | changes))
    randomize(model, 0.1)
    model.save_pretrained(path)
    return path


def ct(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "strategy": "group", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
# name: (how, the config's settings, the packed format)
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "gptq": (gptq, GPTQ, "q4_0"),
    "gptq asymmetric": (partial(gptq, symmetric=False), GPTQ | {"sym": False}, "q4_z"),
    "gptq v2": (partial(gptq, symmetric=False, v2=True), GPTQ | {"checkpoint_format": "gptq_v2"}, "q4_z"),
    "gptq groups of 64": (partial(gptq, group=64), GPTQ | {"group_size": 64}, "q4_0"),
    "gptq one group": (partial(gptq, group=-1), GPTQ | {"group_size": -1}, "q4_0"),
    "gptq 8 bits": (partial(gptq, bits=8), GPTQ | {"bits": 8}, "q8_0"),
    "gptq 8 bits asymmetric": (partial(gptq, bits=8, symmetric=False), GPTQ | {"bits": 8}, "q8_z"),
    "gptq 3 bits": (partial(gptq, bits=3), GPTQ | {"bits": 3}, "q4_0"),
    "gptq 2 bits": (partial(gptq, bits=2, symmetric=False), GPTQ | {"bits": 2}, "q4_z"),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, "q4_z"),
    "w4a16": (pack_quantized, ct("pack-quantized", symmetric=True, group_size=32), "q4_0"),
    "w4a16 asymmetric": (partial(pack_quantized, symmetric=False), ct("pack-quantized", symmetric=False), "q4_z"),
    "w8a16": (partial(pack_quantized, bits=8, group=128), ct("pack-quantized", num_bits=8, group_size=128), "q8_0"),
    "w8a8": (int8, ct("int-quantized", num_bits=8, strategy="channel"), "q8_z"),
    "w8a8 of fp16 scales": (partial(int8, dtype=torch.float16), ct("int-quantized", num_bits=8, strategy="channel"), "q8_0"),
    "fp8 of rows": (fp8, ct("float-quantized", num_bits=8, type="float", strategy="channel"), "f8"),
    "fp8 of tensors": (partial(fp8, of="tensor"), FP8, "f8"),
    "fp8 of tiles": (fp8_tiles, FP8 | {"weight_block_size": [128, 128]}, "f8"),
    "nf4": (partial(bitsandbytes_4bit, nested=False), {"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
    "nf4 nested": (bitsandbytes_4bit, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4"),
    "fp4 of 128": (partial(bitsandbytes_4bit, kind="fp4", size=128), {"quant_method": "bitsandbytes"}, "fp4"),
    "llm.int8": (bitsandbytes_8bit, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "q8_z"),
    "mlx": (mlx, {"bits": 4, "group_size": 64}, "q4_1"),
    "mlx 8 bits": (partial(mlx, bits=8), {"bits": 8, "group_size": 64}, "q8_m"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_weights_stay_packed_and_are_exactly_those_of_the_file(name: str, tmp_path: Path) -> None:
    make, settings, format = CASES[name]
    folder = saved(tmp_path / "m")
    expected = quantize_folder(folder, make, settings, key="quantization" if "mlx" in name else "quantization_config")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = load_model(folder, dtype=torch.float32)
    whole = load_model(folder, dtype=torch.float32, quantization="none")
    for stored, weight in expected.items():
        layer = packed.get_submodule(stored.removesuffix(".weight"))
        # In rows of 256 the scale of 8 bits fits blocks of 256.
        allowed = {format, "q8_k"} if format == "q8_z" and layer.in_features == 256 else {format}
        assert isinstance(layer, PackedLinear) and layer.format in allowed, (stored, layer.format)
        torch.testing.assert_close(layer.dequantize(), weight, rtol=2e-7, atol=0)
        assert torch.equal(whole.get_parameter(stored), layer.dequantize())
    assert isinstance(packed.lm_head, torch.nn.Linear)  # was not converted
    exact = format in ("f8", "nf4", "fp4")  # rows stay floats
    assert_logits_close(packed(TOKENS), whole(TOKENS), 1e-4 if exact else 0.05)


@pytest.mark.parametrize("name", ["gptq", "awq", "w8a8", "fp8 of tiles", "nf4 nested"])
def test_the_text_is_that_of_the_expanded_model(name: str, tmp_path: Path) -> None:
    make, settings, _ = CASES[name]
    folder = saved(tmp_path / "m")
    quantize_folder(folder, make, settings)
    prompt, params = (
        {"prompt_token_ids": TOKENS[0].tolist()},
        SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
    )
    llm = LLM(folder, dtype=torch.float32, num_pages=16)
    assert "native" in llm.runs_on
    tokens = list(llm.generate([prompt], params)[0].outputs[0].token_ids)
    whole = load_model(folder, dtype=torch.float32, quantization="none")
    logits = whole(torch.tensor([TOKENS[0].tolist() + tokens]))[0, TOKENS.shape[1] - 1 : -1]
    chosen, best = logits[range(12), tokens], logits.max(1).values
    # Rows that are rounded to 8 bits may choose another of two tokens that are all but equal.
    assert ((best - chosen) <= (0 if "fp8" in name or "nf4" in name else 0.05) * logits.std(1)).all()


def test_act_order_is_expanded_and_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    expected = quantize_folder(folder, partial(gptq, order=True, symmetric=False), GPTQ | {"desc_act": True})
    with pytest.warns(
        UserWarning, match="has tensors of GPTQ in the order of activations, .* expanded to torch.float32"
    ):
        model = load_model(folder, dtype=torch.float32)
    for stored, weight in expected.items():
        torch.testing.assert_close(model.get_parameter(stored).data, weight, rtol=2e-7, atol=0)


def test_rows_that_are_no_whole_blocks_are_expanded_and_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", intermediate_size=112)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    expected = quantize_folder(folder, partial(bitsandbytes_4bit, size=64), settings)
    with pytest.warns(UserWarning, match="has tensors of nf4 in rows or blocks that are no multiple of 64"):
        model = load_model(folder, dtype=torch.float32)
    name = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(model.get_parameter(name).data, expected[name], rtol=2e-7, atol=0)
    assert model.model.layers[0].mlp.up_proj.format == "nf4"


def test_tiles_at_the_edge_are_smaller(tmp_path: Path) -> None:
    folder = saved(
        tmp_path / "m",
        hidden_size=192,
        intermediate_size=320,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
    )
    expected = quantize_folder(folder, fp8_tiles, FP8 | {"weight_block_size": [128, 128]})
    model = load_model(folder, dtype=torch.float32)
    for stored, weight in expected.items():
        layer = model.get_submodule(stored.removesuffix(".weight"))
        assert layer.format == "f8"
        torch.testing.assert_close(layer.dequantize(), weight, rtol=2e-7, atol=0)


def test_fused_projections_and_experts_are_divided(tmp_path: Path) -> None:
    phi = saved(tmp_path / "phi", transformers.Phi3ForCausalLM, transformers.Phi3Config, pad_token_id=0)
    expected = quantize_folder(phi, awq, CASES["awq"][1])
    model = load_model(phi, dtype=torch.float32)
    fused = expected["model.layers.0.self_attn.qkv_proj.weight"]
    parts = [model.model.layers[0].self_attn.get_submodule(f"{part}_proj") for part in "qkv"]
    assert {part.format for part in parts} == {"q4_z"}
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), fused)
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    moe = saved(tmp_path / "moe", transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig, **sizes)
    names = [name for name in load_file(moe / "model.safetensors") if "experts.1" in name]
    assert names, "experts have weights of their own in files"
    expected = quantize_folder(moe, fp8_tiles, FP8 | {"weight_block_size": [128, 128]})
    model = load_model(moe, dtype=torch.float32)
    up = model.model.layers[1].mlp.experts[1].up_proj
    assert up.format == "f8"
    assert torch.equal(up.dequantize(), expected["model.layers.1.mlp.experts.1.up_proj.weight"])
    assert "native" in LLM(moe, dtype=torch.float32, num_pages=8).runs_on


def test_a_converted_folder_has_the_expanded_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    expected = quantize_folder(folder, gptq, GPTQ)
    out = convert(folder, tmp_path / "out", dtype=torch.float32)
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    for stored, weight in expected.items():
        assert torch.equal(model.get_parameter(stored), weight)
    assert_logits_close(load_model(folder, dtype=torch.float32, quantization="none")(TOKENS), model(TOKENS).logits)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_unpacked_bit_by_bit(bits: int) -> None:
    q = torch.randint(0, 2**bits, (64, 5), generator=torch.Generator().manual_seed(bits))
    packed = words(q.numpy(), bits)
    assert torch.equal(unpack_words(packed, bits, 0), q.to(torch.uint8))
    assert torch.equal(unpack_words(packed.t().contiguous(), bits, 1), q.t().to(torch.uint8))


def test_older_files_beside_the_weights_count(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    quantize_folder(folder, gptq, {})
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False}))
    assert load_model(folder).model.layers[0].mlp.up_proj.format == "q4_0"


@pytest.mark.parametrize("settings, message", [
    ({"quant_method": "hqq"}, "is quantised by 'hqq', which cannot be read; gptq, .* take such a file of the model, a GGUF file"),
    (GPTQ | {"bits": 5}, "is GPTQ with bits=5; 2, 3, 4 and 8 can be read"),
    (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'; gptq and gptq_v2 can be read"),
    ({"quant_method": "awq", "version": "gemv"}, "is AWQ with version='gemv'"),
    (GPTQ | {"group_size": 64}, "the config says groups of 64 columns, and there are . scales for"),
    ({"quant_method": "bitsandbytes"}, "none of its weights are; take the config of these weights"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_said(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    quantize_folder(folder, gptq, settings)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_damaged_files_are_said(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m")
    quantize_folder(folder, gptq, GPTQ)
    whole = load_file(folder / "model.safetensors")
    module = "model.layers.0.mlp.up_proj"

    def refused(message: str, **parts: torch.Tensor | None) -> None:
        changed = {f"{module}.{part}": value for part, value in parts.items()}
        kept = {name: value for name, value in (whole | changed).items() if value is not None}
        save_file(kept, folder / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_model(folder)

    refused(f"has {module}.qweight without {module}.scales; download it again", scales=None)
    refused("scales has numbers that are not finite", scales=torch.full_like(whole[f"{module}.scales"], torch.inf))
    refused(
        r".qzeros is \[4, 31\]; 4 groups of 256 features need \[4, 32\]",
        qzeros=whole[f"{module}.qzeros"][:, :31].contiguous(),
    )
    refused(".qweight is torch.float32", qweight=torch.zeros(16, 256))
    refused(".g_idx has 128 groups of 0 to 3", g_idx=torch.full((128,), 7, dtype=torch.int32))
    codes = {f"{module}.weight": torch.ones(256, 128).to(torch.float8_e4m3fn)}
    save_file({n: v for n, v in whole.items() if not n.startswith(module)} | codes, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is torch.float8_e4m3fn and has no scale beside it"):
        load_model(folder)
