"""foveate.models.convert: GGUF files that the gguf library and the loader here read back, folders that transformers opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.models import convert, load_model, open_checkpoint
from foveate.models.checkpoint.gguf_file import GgufFile
from model_cases import assert_logits_close, randomize

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

WORDS = ["the", " the", " cat", "a", "b", "c", " ", "t", "h", "e"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip


def byte_level() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("c", "a"), ("ca", "t")]
    vocab = {token: i for i, token in enumerate(["<s>", "<|im_end|>", *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    return tokenizer


def sentencepiece() -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("c", "a")]
    pieces += ["\u2581", "t", "h", "e", "c", "a", *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}, "tie_word_embeddings": True}),
    "yarn": ("Qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
                               "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 5}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "granite": ("Granite", {"attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 3.0}),
    "olmo2": ("Olmo2", {}),
    "starcoder2": ("Starcoder2", {"sliding_window": None}),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Any]:
    return make_folder(tmp_path / "model", *MODELS[request.param])


def make_folder(path: Path, kind: str, settings: dict[str, Any], tokenizer: Any = None) -> tuple[Path, Any]:
    torch.manual_seed(0)
    sizes = {key: value for key, value in (SIZES | settings).items() if kind != "GPT2"}
    if kind in ("Phi3", "Granite", "Olmo2", "Starcoder2", "Mixtral"):
        sizes.pop("head_dim")
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="eager")
    ).eval()
    randomize(model)
    model.save_pretrained(path)
    (tokenizer or byte_level()).save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "bos_token": "<s>"}))
    return path, model


@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_a_folder_as_gguf_and_back_has_its_logits(folder: tuple[Path, Any], tmp_path: Path) -> None:
    path, model = folder
    file = convert(path, tmp_path / "m.gguf", dtype="float32")
    tokens = torch.randint(300, (1, 30))
    with torch.no_grad():
        expected = model(tokens).logits
        assert_logits_close(load_model(file)(tokens), expected)
    read = gguf.GGUFReader(file)
    assert read.fields["tokenizer.ggml.pre"].contents() == "smollm"
    text = "the cat 123 <think> caf\u00e9<|im_end|>"
    ours, theirs = open_checkpoint(file), open_checkpoint(path)
    assert ours.tokenizer().encode(text) == theirs.tokenizer().encode(text)
    assert ours.chat_template == CHATML
    if model.config.model_type in ("mixtral", "starcoder2"):
        with pytest.raises(ValueError, match="cannot be written as a folder yet"):
            convert(file, tmp_path / "back", dtype="float32")
        assert not (tmp_path / "back").exists()
        return
    if "rope_freqs.weight" in GgufFile(file).tensors:
        assert model.config.rope_parameters["factor"] == 8
    back = convert(file, tmp_path / "back", dtype="float32")
    again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager").eval()
    with torch.no_grad():
        assert_logits_close(again(tokens).logits, expected)


def test_gpt2_has_turned_weights_and_learned_positions(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 300,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    randomize(model)
    model.save_pretrained(tmp_path / "model")
    byte_level().save(str(tmp_path / "model" / "tokenizer.json"))
    file = convert(tmp_path / "model", tmp_path / "m.gguf")
    back = convert(file, tmp_path / "back", dtype="float32")
    tokens = torch.randint(300, (1, 20))
    with torch.no_grad():
        expected = model(tokens).logits
        assert_logits_close(load_model(file)(tokens), expected)
        assert_logits_close(transformers.AutoModelForCausalLM.from_pretrained(back)(tokens).logits, expected)


def test_types_of_a_quantised_file(tmp_path: Path) -> None:
    """Matrices get the format, the head 6 bits or more, rows of no whole super-block their other format, and the rest fp32."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 288,
        "head_dim": 64,
        "tie_word_embeddings": False,
        "num_hidden_layers": 8,
    }
    path, model = make_folder(tmp_path / "model", "Llama", sizes)
    kinds = {
        "q4_k": ("Q4_K", "Q4_1", "Q6_K"), "q6_k": ("Q6_K", "Q8_0", "Q6_K"), "iq4_nl": ("IQ4_NL", "IQ4_NL", "Q8_0"),
        "q8_0": ("Q8_0", "Q8_0", "Q8_0"),
    }  # fmt: skip
    tokens = torch.randint(300, (1, 20))
    with torch.no_grad():
        expected = model(tokens).logits
    for quantization, (plain, short, head) in kinds.items():
        file = convert(path, tmp_path / "m.gguf", quantization=quantization, force=True)
        found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        assert found["blk.0.attn_q.weight"] == found["token_embd.weight"] == plain
        assert found["blk.0.ffn_down.weight"] == short and found["output.weight"] == head
        assert found["blk.0.attn_norm.weight"] == found["output_norm.weight"] == "F32"
        with torch.no_grad():
            logits = load_model(file)(tokens)
        assert ((logits - expected).norm() / expected.norm()) < 0.7
        written, in_memory = load_model(file), load_model(path, quantization=quantization)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"):
            assert torch.equal(written.get_submodule(name).data, in_memory.get_submodule(name).data)
    mixed = convert(path, tmp_path / "mixed.gguf", quantization="q4_k_m")
    found = [t.tensor_type.name for t in gguf.GGUFReader(mixed).tensors if t.name.endswith("attn_v.weight")]
    assert found.count("Q6_K") == 4 and found.count("Q4_K") == 4
    # what a GGUF file has is kept, or requantised
    same = convert(mixed, tmp_path / "same.gguf")
    assert _contents(same) == _contents(mixed)
    smaller = convert(mixed, tmp_path / "smaller.gguf", quantization="q4_0")
    assert {t.tensor_type.name for t in gguf.GGUFReader(smaller).tensors} == {"F32", "Q4_0", "Q8_0"}
    assert open_checkpoint(smaller).tokenizer().encode("the cat") == open_checkpoint(path).tokenizer().encode("the cat")


def _contents(file: Path) -> tuple[Any, Any]:
    read = GgufFile(file)
    return read.fields, {name: (t.kind, t.shape, bytes(t.data.numpy())) for name, t in read.tensors.items()}


def test_sentencepiece_keeps_its_merges(tmp_path: Path) -> None:
    path, _ = make_folder(tmp_path / "model", "Llama", {}, sentencepiece())
    file = convert(path, tmp_path / "m.gguf")
    ours, theirs = open_checkpoint(file).tokenizer(), open_checkpoint(path).tokenizer()
    for text in ("the cat", " the  the", "caf\u00e9 \U0001f600", "tthheec aca"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def test_an_importance_matrix_is_of_what_comes_in(tmp_path: Path) -> None:
    """What the layers give for the text is nearer; a file and its text are the same."""
    path, model = make_folder(tmp_path / "model", "Llama", {})
    text = "the cat the cat a cat " * 40
    (tmp_path / "text.txt").write_text(text)
    tokens = torch.tensor([open_checkpoint(path).tokenizer().encode(text)[:60]])
    plain, matched, from_file = (
        load_model(path, quantization="iq4_nl", imatrix=given).model.layers[0].self_attn.o_proj.dequantize()
        for given in (None, text, tmp_path / "text.txt")
    )
    assert torch.equal(matched, from_file) and not torch.equal(matched, plain)
    inputs: list[torch.Tensor] = []
    layer = model.model.layers[0].self_attn.o_proj
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach().flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    errors = [((inputs[0] @ (found - layer.weight.detach()).T).norm()) for found in (plain, matched)]
    assert errors[1] < errors[0]
    file = convert(path, tmp_path / "m.gguf", quantization="iq4_nl", imatrix=text)
    other = convert(path, tmp_path / "plain.gguf", quantization="iq4_nl")
    assert _contents(file)[1]["blk.1.ffn_down.weight"] != _contents(other)[1]["blk.1.ffn_down.weight"]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    path, _ = make_folder(tmp_path / "model", "Llama", {})
    out = tmp_path / "m.gguf"
    out.write_text("precious")
    with pytest.raises(FileExistsError, match="m.gguf is there already; .*--force"):
        convert(path, out)
    assert out.read_text() == "precious"
    assert GgufFile(convert(path, out, force=True)).tensors
    with pytest.raises(ValueError, match="safetensors has no place"):
        convert(path, tmp_path / "x", to="safetensors", quantization="q4_k")
    with pytest.raises(ValueError, match="is the model itself"):
        convert(path, path, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(FileExistsError, match="other things than a model"):
        convert(path, tmp_path / "other", force=True)
    with pytest.raises(ValueError, match="quantization='q3' is not one of"):
        convert(path, tmp_path / "x.gguf", quantization="q3")
    with pytest.raises(ValueError, match="weighs the errors"):
        convert(path, tmp_path / "x.gguf", quantization="q8_0", imatrix="a text")
    with pytest.raises(ValueError, match="has 2 tokens"):
        convert(path, tmp_path / "x.gguf", quantization="q4_k", imatrix="the the")
    scaled, _ = make_folder(
        tmp_path / "dynamic", "Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    )
    with pytest.raises(ValueError, match="rope_scaling of type 'dynamic' has no place in a GGUF file"):
        convert(scaled, tmp_path / "x.gguf")
    windows, _ = make_folder(
        tmp_path / "windows", "Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    )
    with pytest.raises(ValueError, match="windows of .* for which GGUF's metadata have no place"):
        convert(windows, tmp_path / "x.gguf")
    neox = transformers.GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
    )
    transformers.GPTNeoXForCausalLM(neox).save_pretrained(tmp_path / "neox")
    with pytest.raises(ValueError, match="a gpt_neox cannot be written as GGUF; known are arcee"):
        convert(tmp_path / "neox", tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dynamic", "m.gguf", "model", "neox", "other", "windows"]


def test_shards_and_dtypes_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.models.conversion import safetensors_writer

    path, model = make_folder(tmp_path / "model", "Llama", {"tie_word_embeddings": True})
    monkeypatch.setattr(safetensors_writer, "SHARD", 40_000)
    out = convert(path, tmp_path / "out", dtype="bfloat16")
    assert len(list(out.glob("*.safetensors"))) > 2 and (out / "model.safetensors.index.json").exists()
    tokens = torch.randint(300, (1, 20))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype is torch.bfloat16 and loaded(tokens).logits.isfinite().all()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16())
