"""What GGUF metadata says beside the sizes: rotary scaling, pre-tokenizers, the beginning of a text, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("gguf")

from foveate.files.checked import CheckpointError
from foveate.models import load_model, open_checkpoint
from foveate.tokenizer.gguf import pre_tokenizer
from gguf_files import write_llama


@pytest.mark.parametrize("fields, factor", [
    ({"llama.rope.scaling.factor": 4.0}, 4.0), ({"llama.rope.scale_linear": 2.0}, 2.0),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, 1.0), ({}, 1.0),
], ids=str)  # fmt: skip
def test_a_factor_without_a_type_scales_linearly(fields, factor, tmp_path):
    model = load_model(write_llama(tmp_path / "m.gguf", fields=fields))
    cos, sin = model.rotary.tables(torch.device("cpu"), torch.float32)
    frequency = 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    angle = torch.arange(20)[:, None].double() / factor * frequency
    torch.testing.assert_close(cos[:20].double(), angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[:20].double(), angle.sin(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fields, sentence", [
    ({"llama.expert_count": 4}, "lacks llama.expert_used_count"),
    ({"llama.embedding_length": 3, "llama.attention.head_count": 4}, "embedding_length=3 for 4 heads"),
    ({"llama.attention.value_length": 8}, "attention.value_length=8 and keys of 16; values of another length"),
    ({"llama.rope.dimension_count": 8}, "rope.dimension_count=8 and keys of 16; the rotated part of keys of another length"),
], ids=str)  # fmt: skip
def test_what_is_not_supported_is_named(fields, sentence, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(write_llama(tmp_path / "m.gguf", fields=fields))


@pytest.mark.parametrize(
    "pre, begins", [("gpt-2", False), ("qwen2", False), ("llama-bpe", True), ("llama-v3", True), ("tekken", True)]
)
def test_a_text_begins_with_bos_where_llama_cpp_adds_it(pre, begins, tmp_path):
    ids = open_checkpoint(write_llama(tmp_path / "m.gguf", pre=pre)).tokenizer().encode("9")
    assert ids == [1] * begins + [9]


@pytest.mark.parametrize("names", [
    ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "smaug-bpe"), ("qwen2", "deepseek-r1-qwen", "megrez", "kormo"),
])  # fmt: skip
def test_names_of_the_same_pre_tokenizer(names):
    text = "Don't STOP  at 12345 caf\u00e9s!\n\n  x"
    assert len({str(pre_tokenizer(name).pre_tokenize_str(text)) for name in names}) == 1


def test_tekken_parts_capitals_and_digits():
    pieces = [piece for piece, _ in pre_tokenizer("tekken").pre_tokenize_str("HelloWorld ABCdef 123 a/b")]
    assert pieces == ["Hello", "World", "\u0120ABCdef", "\u0120", "1", "2", "3", "\u0120a", "/b"]


def test_an_unknown_pre_tokenizer_is_named(tmp_path):
    with pytest.raises(
        CheckpointError, match="asks for the pre-tokenizer 'odd-bpe'; known are gpt-2, smollm.*tokenizer.json"
    ):
        open_checkpoint(write_llama(tmp_path / "m.gguf", pre="odd-bpe")).tokenizer()
