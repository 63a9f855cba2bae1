"""Encoders in GGUF files as llama.cpp's converter writes them, against transformers' models and tokenizers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate
from foveate.models import load_model, open_checkpoint
from foveate.models.conversion.gguf_tensors import gguf_architecture
from model_cases import assert_logits_close, randomize

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "ada",
    "lives",
    "in",
    "paris",
    "##s",
    "##e",
    ".",
    "a",
    "b",
    "rome",
]
TEXTS = ["Ada lives in Paris.", "", "  romes ", "b, lives\u4e2d in"]
BERT_NAMES = (
    ("embeddings.word_embeddings", "token_embd"), ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"), ("embeddings.LayerNorm", "token_embd_norm"), ("encoder.layer.", "blk."),
    ("layers.", "blk."), ("attention.self.query", "attn_q"), ("attention.self.key", "attn_k"), ("attention.self.value", "attn_v"),
    ("attention.output.dense", "attn_output"), ("attention.output.LayerNorm", "attn_output_norm"), ("intermediate.dense", "ffn_up"),
    ("output.dense", "ffn_down"), ("output.LayerNorm", "layer_output_norm"), ("self_attn.o_proj", "attn_output"),
    ("mlp.up_proj", "ffn_up"), ("mlp.gate_proj", "ffn_gate"), ("mlp.down_proj", "ffn_down"),
    ("post_attention_layernorm", "attn_output_norm"), ("post_mlp_layernorm", "layer_output_norm"),
)  # fmt: skip


def written(file: Path, arch: str, model: Any, add_tokenizer: Any, pooling: int, theta: float | None = None) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(str(file), arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    if theta is not None:
        writer.add_rope_freq_base(theta)
    add_tokenizer(writer)
    weights = {name: value for name, value in model.state_dict().items() if "pooler" not in name and "_ids" not in name}
    for i in range(config.num_hidden_layers):
        names = [f"layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]
        if names[0] in weights:
            weights[f"blk.{i}.attn_qkv.weight"] = torch.cat([weights.pop(name) for name in names])
    for name, value in weights.items():
        for old, new in BERT_NAMES:
            name = name.replace(old, new)
        writer.add_tensor(name, value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def word_pieces(writer: Any) -> None:
    marked = [w if w.startswith("[") else w[2:] if w.startswith("##") else "\u2581" + w for w in WORDS]
    writer.add_tokenizer_model("bert")
    writer.add_token_list(marked)
    writer.add_token_types([3] * 5 + [1] * (len(WORDS) - 5))
    for key, number in (("unknown", 1), ("padding", 0), ("cls", 2), ("seperator", 3), ("mask", 4)):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)


def test_bert(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    randomize(model)
    file = written(tmp_path / "bert.gguf", "bert", model, word_pieces, pooling=2)
    tokens = torch.tensor([[2, 5, 6, 7, 8, 11, 3]])
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        assert_logits_close(load_model(file)(tokens), expected)
    embed = foveate.Embedder(file)
    assert embed.pooling == "cls_token"
    assert embed.tokenizer.encode("Ada lives in Paris.") == tokens[0].tolist()
    torch.testing.assert_close(embed.encode("Ada lives in Paris."), expected[0, 0], atol=1e-4, rtol=1e-4)
    theirs = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)})
    for text in TEXTS:
        assert embed.tokenizer.encode(text) == theirs(text).input_ids
    pair = embed.tokenizer.backend.encode("ada", "rome")
    assert (pair.ids, pair.type_ids) == (theirs("ada", "rome").input_ids, theirs("ada", "rome").token_type_ids)


PIECES = [("<s>", 0.0, 3), ("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2)] + [
    (piece, -float(i), 1) for i, piece in enumerate(["\u2581ada", "\u2581lives", "\u2581in", "\u2581", "a", "b", "."])
]


def unigram_pieces(writer: Any) -> None:
    texts, scores, kinds = zip(*PIECES)
    writer.add_tokenizer_model("t5")
    writer.add_token_list(list(texts))
    writer.add_token_scores(list(scores))
    writer.add_token_types(list(kinds))
    writer.add_remove_extra_whitespaces(True)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def test_nomic_bert_with_unigram_pieces(tmp_path: Path) -> None:
    config = transformers.NomicBertConfig(
        vocab_size=len(PIECES), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=24,
    )  # fmt: skip
    model = transformers.NomicBertModel(config).eval()
    randomize(model)
    theta = config.rope_parameters["rope_theta"]
    file = written(tmp_path / "nomic.gguf", "nomic-bert", model, unigram_pieces, pooling=1, theta=theta)
    embed = foveate.Embedder(file)
    tokenizer = open_checkpoint(file).tokenizer()
    assert tokenizer is not None and embed.pooling == "mean_tokens"
    assert tokenizer.backend.encode("  ada   lives ").tokens == ["<s>", "\u2581ada", "\u2581lives", "</s>"]
    assert tokenizer.backend.encode("in", "ab.").ids == [0, 6, 2, 2, 7, 8, 9, 10, 2]
    assert tokenizer.encode("") == [0, 2] and tokenizer.decode(tokenizer.encode("ada in")) == "ada in"
    tokens = torch.tensor([tokenizer.encode("ada lives in.")])
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        assert_logits_close(load_model(file)(tokens), expected)
    torch.testing.assert_close(embed.encode("ada lives in."), expected[0].mean(0), atol=1e-4, rtol=1e-4)


def test_a_tokenizer_without_separators_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=3, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, max_position_embeddings=24,
    )  # fmt: skip

    def few(writer: Any) -> None:
        writer.add_tokenizer_model("bert")
        writer.add_token_list(["[UNK]", "[CLS]", "\u2581ada"])

    file = written(tmp_path / "bert.gguf", "bert", transformers.BertModel(config), few, pooling=1)
    with pytest.raises(ValueError, match=r"neither tokenizer\.ggml\.seperator_token_id nor a token \[SEP\]"):
        open_checkpoint(file).tokenizer()


@pytest.mark.parametrize("model_type", ["bert", "nomic_bert"])
def test_they_are_read_but_not_written(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"a {model_type} cannot be written as GGUF"):
        gguf_architecture(model_type)
