"""Every decoder family against transformers with the same random weights: one pass, with a cache in unequal steps, packed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate
from foveate.models import load_model
from foveate.models.decoder_families import FAMILIES
from foveate.models.sequences import PackedSequences

try:
    from foveate.models.native_decoder import NativeDecoder
except ImportError:
    NativeDecoder = None  # type: ignore[assignment,misc]
from model_cases import assert_logits_close, new_cache, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, S = 97, 21
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 9 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)], "original_max_position_embeddings": 32,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "num_key_value_heads": 4,
    "head_dim": 8,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# The case's name begins with the family's model_type; what differs from Llama is switched on.
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": YARN},
    "llama:dynamic": {"rope_parameters": DYNAMIC},
    "llama:yarn-factors": {"rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2, "truncate": False}},
    "mistral": {"sliding_window": 5},
    "ministral": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {"rope_parameters": YARN | {"factor": 2.0}},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 7, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {
        "sliding_window": 6, "query_pre_attn_scalar": 24, "final_logit_softcapping": 4.0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "phi3": {"sliding_window": 6, "resid_pdrop": 0.0},
    "phi3:longrope": {"rope_parameters": LONG, "original_max_position_embeddings": 32},
    "phi3:partial": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    "qwen3_moe": MOE | {"num_experts": 5, "moe_intermediate_size": 32, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen2_moe": MOE | {"num_experts": 5, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40},
    "mixtral": MOE | {"num_local_experts": 4, "sliding_window": 6},
    "gpt_oss": MOE | {"num_local_experts": 4, "sliding_window": 6, "rope_parameters": YARN | {"truncate": False}},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": {"sliding_window": 6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "olmoe": MOE | {"num_experts": 4, "clip_qkv": 2.0},
    "granite": {
        "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0, "attention_bias": True,
    },
    "granitemoe": MOE | {"num_local_experts": 4, "attention_multiplier": 0.3, "residual_multiplier": 0.4, "logits_scaling": 2.0},
    "deepseek_v2": LATENT | {
        "num_experts": 6, "n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "q_lora_rank": None,
        "first_k_dense_replace": 1, "n_shared_experts": 2, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
        "routed_scaling_factor": 1.5,
        "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    },
    "deepseek_v3": LATENT | {
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 2, "moe_intermediate_size": 32,
        "num_experts_per_tok": 3, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek_v3:halves": LATENT | {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "moe_intermediate_size": 32,
        "num_experts_per_tok": 2, "rope_interleave": False, "attention_bias": True,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "cohere:plain": {"attention_bias": True},
    "cohere2": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "stablelm": {"use_qkv_bias": True},
    "stablelm:parallel": {"use_parallel_residual": True, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    "phi": {"qk_layernorm": True},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "gpt_neox:serial": {"use_parallel_residual": False},
    "starcoder2": {"sliding_window": 6},
    "ernie4_5": {"use_bias": True},
    "seed_oss": {"attention_out_bias": False},
    "nemotron": {"attention_bias": True},
    "arcee": {"mlp_bias": True},
    "exaone4": {"sliding_window": 6, "sliding_window_pattern": 2},
    "hunyuan_v1_dense": {"attention_bias": True},
    "hunyuan_v1_dense:alpha": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    "glm": {},
    "glm4": {"attention_bias": False},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "bloom": {"n_layer": 4, "n_head": 4},
    "bloom:six": {"n_layer": 2, "n_head": 6, "hidden_size": 48},
    "mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4, "attn_config": {"clip_qkv": 2.0, "softmax_scale": 0.3}},
    "gptj": {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64, "rotary_dim": 8},
    "gpt_neo": {
        "hidden_size": 64, "num_layers": 4, "num_heads": 4, "window_size": 5, "attention_types": [[["global", "local"], 2]],
        "max_position_embeddings": 64,
    },
    "falcon": {},
    "falcon:groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon:serial": {"multi_query": False, "parallel_attn": False, "bias": True},
}  # fmt: skip
OWN_NAMES = ("bloom", "mpt", "gptj", "gpt_neo")


def theirs(case: str) -> Any:
    model_type = case.partition(":")[0]
    config_class = transformers.AutoConfig.for_model(model_type).__class__
    sizes = SIZES if hasattr(config_class(), "head_dim") else {k: v for k, v in SIZES.items() if k != "head_dim"}
    if model_type in OWN_NAMES:  # of sizes
        sizes = {key: value for key, value in sizes.items() if key in ("vocab_size", "bos_token_id", "eos_token_id")}
    if model_type == "falcon":
        sizes = {
            key: value
            for key, value in sizes.items()
            if key not in ("head_dim", "num_key_value_heads", "intermediate_size")
        }
    if model_type == "bloom":
        sizes["hidden_size"] = 64
    config = config_class(**(sizes | CASES[case]), attn_implementation="eager")
    model = getattr(transformers, FAMILIES[model_type].name)(config)
    randomize(model, 0.2)
    return model.eval()


def test_every_family_has_a_case() -> None:
    assert {case.partition(":")[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_a_family_equals_transformers(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(1, VOCAB, (2, S))
    with torch.inference_mode():
        expected = model(tokens).logits
        assert_logits_close(ours(tokens), expected)
        lengths = (13, S)
        packed = PackedSequences.of(lengths)
        row = torch.cat([tokens[i, :length] for i, length in enumerate(lengths)])[None]
        got = ours.logits(ours.hidden(row, packed=packed))[0].split(lengths)
        for i, length in enumerate(lengths):
            assert_logits_close(got[i], expected[i, :length])
        cache = new_cache(ours.config)
        a, b = cache.create(), cache.create()

        def step(seqs: list[int], new: torch.Tensor) -> torch.Tensor:
            cache.append(seqs, new.shape[1])
            return ours(new, foveate.CacheView(cache, seqs, new.shape[1]))

        steps_a, steps_b = [step([a], tokens[:1, :7]), step([a], tokens[:1, 7:12])], [step([b], tokens[1:, :9])]
        for i in range(9):  # b is three tokens behind
            both = step([b, a], torch.stack([tokens[1, 9 + i], tokens[0, 12 + i]])[:, None])
            steps_b.append(both[:1])
            steps_a.append(both[1:])
        assert_logits_close(torch.cat(steps_a, 1), expected[:1])
        assert_logits_close(torch.cat(steps_b, 1), expected[1:, :18])


@pytest.mark.parametrize(
    "case", [case for case in CASES if FAMILIES[case.partition(":")[0]].trains and ":" not in case]
)
def test_gradients_of_the_families_that_train(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(1, VOCAB, (2, S))
    upstream = torch.randn(2, S, VOCAB)
    (model(tokens).logits * upstream).sum().backward()
    (ours(tokens) * upstream).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert sorted(name for name, _ in ours.named_parameters()) == sorted(expected)
    for name, p in ours.named_parameters():
        assert (p.grad - expected[name]).abs().max() <= 2e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("case", CASES)
def test_the_native_decoder_equals_transformers(case: str, tmp_path: Path) -> None:
    """Each family in one native call a step."""
    if NativeDecoder is None:
        pytest.skip("this build has no native decoder")
    model = theirs(case)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    reason = NativeDecoder.unsupported(ours)
    if ours.config.latent is not None:
        assert reason == "NativeDecoder has no latent attention (MLA); call the model itself"
        return
    assert reason is None
    tokens = torch.randint(1, VOCAB, (2, S))
    with torch.inference_mode():
        expected = model(tokens).logits
        decoder = NativeDecoder(ours)
        cache = new_cache(ours.config)
        seqs = [cache.create(), cache.create()]
        for first, end in ((0, 9), (9, 10), (10, S)):
            cache.append(seqs, end - first)
            got = decoder(tokens[:, first:end], foveate.CacheView(cache, seqs, end - first))
            assert_logits_close(got, expected[:, first:end])


def test_factors_for_long_texts(tmp_path: Path) -> None:
    """Beyond the first context all positions have the long factors: in one pass as transformers, with a cache if it was said before."""
    model = theirs("phi3:longrope")
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(1, VOCAB, (1, 40))  # of a first context of 32
    with torch.inference_mode():
        expected = model(tokens).logits
        assert_logits_close(ours(tokens), expected)
        for wanted, context in ((None, 32), (20, 20), (60, 60)):
            assert ours.set_context(wanted) == context
            cache = new_cache(ours.config)
            seq = cache.create()
            cache.append([seq], 30)
            got = ours(tokens[:, :30], foveate.CacheView(cache, [seq], 30))
            if wanted == 60:
                assert_logits_close(got, expected[:, :30])
            else:
                assert_logits_close(got, model(tokens[:, :30]).logits)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 must be between 1 and the 4 experts"),
        ("mixtral", {"num_local_experts": 9}, "is a mixture of 9 experts by its config, and there are weights of 4"),
        ("mixtral", {"num_local_experts": None}, "the config of this mixtral has no 'num_local_experts'"),
        ("gpt_oss", {"num_local_experts": 60000}, "is of 4 experts, and the config says 60000"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention', which is not supported"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported for gemma3_text"),
        ("phi3", {"num_attention_heads": 8}, r"qkv_proj.weight in .* cannot be divided: it has shape \[128, 64\]"),
        ("phi3:longrope", {"rope_parameters": LONG | {"long_factor": [1.0]}}, "long_factor in rope_scaling has 1 values; RoPE needs 8"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1.0}}, "rope_theta=1.0 with rope_scaling of type 'yarn' must be above 1"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": "x"}}, "rope_parameters.beta_fast='x'; it must be a number"),
        ("stablelm", {"partial_rotary_factor": 0.1, "rope_parameters": None}, "partial_rotary_factor=0.1 of head_dim=16 is 1 elements"),
        ("granite", {"logits_scaling": 0.0}, "logits_scaling is 0"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4 layers"),
    ],
)  # fmt: skip
def test_wrong_configs_are_named(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_experts_stored_one_by_one_and_together(tmp_path: Path) -> None:
    """Checkpoints of Qwen3-MoE have a matrix for each expert or one for all; an expert's output is the same alone and in a batch."""
    model = theirs("qwen3_moe")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tokens = torch.randint(1, VOCAB, (2, S))
    stacked = any(name.endswith("experts.gate_up_proj") for name in weights)
    for layer in range(4):
        place = f"model.layers.{layer}.mlp.experts"
        if stacked and f"{place}.gate_up_proj" in weights:
            both, down = weights.pop(f"{place}.gate_up_proj"), weights.pop(f"{place}.down_proj")
            for i in range(5):
                gate, up = both[i].chunk(2)
                for name, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", down[i])):
                    weights[f"{place}.{i}.{name}.weight"] = value.clone()
        elif not stacked and f"{place}.0.gate_proj.weight" in weights:
            parts = {
                kind: [weights.pop(f"{place}.{i}.{kind}_proj.weight") for i in range(5)]
                for kind in ("gate", "up", "down")
            }
            both = [torch.cat(pair) for pair in zip(parts["gate"], parts["up"])]
            weights |= {f"{place}.gate_up_proj": torch.stack(both), f"{place}.down_proj": torch.stack(parts["down"])}
    with torch.inference_mode():
        before = load_model(tmp_path)(tokens)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours = load_model(tmp_path)
        assert torch.equal(ours(tokens), before)
        mlp, x = ours.model.layers[0].mlp, torch.randn(1, 6, 64)
        assert_logits_close(mlp(x[:, 2:3]), mlp(x)[:, 2:3], 1e-6)
        packed = load_model(tmp_path, quantization="q8_0")
        assert (packed(tokens) - before).abs().max() < 0.2 * before.abs().max()
        assert isinstance(packed.model.layers[0].mlp.experts[0].up_proj, foveate.nn.PackedLinear)


def _mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[experts, out, in] -> blocks, scales, and the weight as they have it, by the format's own definition."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = weight.unflatten(-1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-20, 10)
    scaled = groups / torch.exp2(exponents)[..., None]
    nearest = (scaled.abs()[..., None] - values).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    rounded = values[nearest] * scaled.sign() * torch.exp2(exponents)[..., None]
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks, (exponents + 127).to(torch.uint8), rounded.flatten(-2)


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """Experts in MXFP4 stay packed, with exactly their weights."""
    model = theirs("gpt_oss")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in list(weights):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, rounded = _mxfp4(weights.pop(name).transpose(1, 2))
            weights |= {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales.contiguous()}
            model.get_parameter(name).data.copy_(rounded.transpose(1, 2))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(1, VOCAB, (2, S))
    with torch.inference_mode():
        expected = model(tokens).logits
        expanded = load_model(tmp_path, quantization="none")
        assert_logits_close(expanded(tokens), expected)
        packed = load_model(tmp_path)
        assert (packed(tokens) - expected).abs().max() < 0.2 * expected.abs().max()
    for i in range(4):
        for part in ("gate_proj", "up_proj", "down_proj"):
            ours = packed.model.layers[1].mlp.experts[i].get_submodule(part)
            assert isinstance(ours, foveate.nn.PackedLinear)
            assert torch.equal(ours.dequantize(), expanded.model.layers[1].mlp.experts[i].get_submodule(part).weight)
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    for wrong, message in (
        (weights[scales][:, :, :1], "MXFP4 needs uint8"),
        (weights[scales] | 255, r"scales beyond 2\*\*-24"),
    ):
        save_file(weights | {scales: wrong.contiguous()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_the_text_part_of_a_model_of_pictures(tmp_path: Path) -> None:
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    plain = CASES["gemma3_text"] | {
        "final_logit_softcapping": None
    }  # which transformers' model of pictures passes over
    text = transformers.Gemma3TextConfig(**(SIZES | plain))
    whole = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, attn_implementation="eager"
    )
    model = transformers.Gemma3ForConditionalGeneration(whole).eval()
    randomize(model, 0.2)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(3, VOCAB, (2, S))
    with (
        torch.inference_mode(),
        pytest.warns(UserWarning, match="'gemma3', which reads more than text; its text part, a gemma3_text"),
    ):
        assert_logits_close(load_model(tmp_path)(tokens), model(tokens).logits)
    weights = load_file(tmp_path / "model.safetensors")  # as transformers 5 names them inside
    moved = {
        (
            f"model.{name.replace('language_model.model.', 'language_model.')}" if "language_model" in name else name
        ): weight
        for name, weight in weights.items()
    }
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.inference_mode(), pytest.warns(UserWarning, match="its text part"):
        assert_logits_close(load_model(tmp_path)(tokens), model(tokens).logits)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = "x"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="text_config in .* has eos_token_id='x'; it must be"):
        load_model(tmp_path)
