"""Decoders with a head of classes: logits, TextClassifier and Reranker against transformers with the same random weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate
from foveate.models import load_model
from foveate.models.sequences import PackedSequences
from generation_toys import tokenizer
from model_cases import assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 336
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def saved(kind: str, folder: Path, labels: int = 3, **options: Any) -> Any:
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**(SIZES | options), num_labels=labels))
    randomize(model, 0.3)
    model.eval().save_pretrained(folder)
    tokenizer().backend.save(str(folder / "tokenizer.json"))
    return model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Mistral", "Phi3"])
def test_logits(kind: str, tmp_path: Path) -> None:
    theirs = saved(f"{kind}ForSequenceClassification", tmp_path, head_dim=8)
    ours = load_model(tmp_path)
    lengths = (5, 17, 1)
    texts = [torch.randint(3, VOCAB, (length,)) for length in lengths]
    row, packed = torch.cat(texts)[None], PackedSequences.of(lengths)
    with torch.inference_mode():
        got = ours(row, packed=packed)
        for i, text in enumerate(texts):
            assert_logits_close(got[i : i + 1], theirs(text[None]).logits)
            assert_logits_close(ours(text[None]), theirs(text[None]).logits)


def test_classifier_and_reranker(tmp_path: Path) -> None:
    theirs = saved("Qwen2ForSequenceClassification", tmp_path / "three")
    classify = foveate.TextClassifier(tmp_path / "three")
    texts = ["a short text", "another, which is longer", "x"]
    with torch.inference_mode():
        ids = [torch.tensor([classify.tokenizer.encode(text)]) for text in texts]
        expected = torch.cat([theirs(row).logits for row in ids])
    assert_logits_close(classify.logits(texts), expected)
    assert [found["label"] for found in classify(texts)] == [f"LABEL_{i}" for i in expected.argmax(-1).tolist()]
    theirs = saved("Qwen2ForSequenceClassification", tmp_path / "one", labels=1)
    rank = foveate.Reranker(tmp_path / "one")
    found = rank("a query", ["one", "two and more"], raw=True)
    pairs = [rank.tokenizer.backend.encode("a query", text).ids for text in ("one", "two and more")]
    with torch.inference_mode():
        scores = [theirs(torch.tensor([pair])).logits.item() for pair in pairs]
    assert [entry["index"] for entry in found] == sorted(range(2), key=lambda i: -scores[i])
    assert [entry["score"] for entry in found] == pytest.approx(sorted(scores, reverse=True), rel=1e-4, abs=1e-5)


def test_what_it_is_not_for(tmp_path: Path) -> None:
    saved("LlamaForSequenceClassification", tmp_path / "classes")
    with pytest.raises(ValueError, match=r"has no language-model head|is a LlamaForSequenceClassification"):
        foveate.LLM(tmp_path / "classes").generate("a")
    with pytest.raises(ValueError, match="whose head is not 'masked-lm'"):
        load_model(tmp_path / "classes", head="masked-lm")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.save_pretrained(tmp_path / "text")
    tokenizer().backend.save(str(tmp_path / "text/tokenizer.json"))
    with pytest.raises(
        ValueError,
        match="'sequence-classification' for checkpoints of llama that have it; this llama is a LlamaForCausalLM",
    ):
        foveate.TextClassifier(tmp_path / "text")
    config = json.loads((tmp_path / "classes/config.json").read_text())
    (tmp_path / "classes/config.json").write_text(json.dumps(config | {"id2label": {"0": "a"}, "num_labels": None}))
    with pytest.raises(ValueError, match="score.weight"):
        load_model(tmp_path / "classes")
