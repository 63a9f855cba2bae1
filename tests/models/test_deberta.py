"""DeBERTa's own: what its versions switch on, its tokenizer, its tasks and its training, against transformers."""

from __future__ import annotations

import io
import json
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers.convert_slow_tokenizer import DebertaV2Converter

import foveate
from foveate.models import load_model, open_checkpoint
from foveate.models.disentangled import DisentangledAttention
from foveate.models.sequences import PackedSequences
from model_cases import MULTILINGUAL, assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 83, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 40, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
V3 = {
    "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p",
    "position_biased_input": False, "type_vocab_size": 0, "max_relative_positions": -1,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "v3": V3,
    "v2-xlarge": V3 | {"conv_kernel_size": 3, "conv_act": "gelu", "conv_groups": 2},
    "own-projections": V3
    | {"share_att_key": False, "norm_rel_ebd": "none", "type_vocab_size": 2, "embedding_size": 20},
    "c2p": {"relative_attention": True, "pos_att_type": ["c2p"], "max_relative_positions": 6},
    "p2c": {"relative_attention": True, "pos_att_type": ["p2c"], "legacy": False},
    "no-distances": {"pos_att_type": ["p2c"]},
}
LENGTHS = (7, 31, 4, 30, 18, 1)


def theirs(head: str, kind: str = "DebertaV2", **options: Any) -> Any:
    model = getattr(transformers, f"{kind}{head}")(getattr(transformers, f"{kind}Config")(**SIZES | options))
    randomize(model)
    return model.eval()


def texts() -> list[torch.Tensor]:
    return [torch.randint(3, 83, (length,)) for length in LENGTHS]


def batch(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("name", OPTIONS)
def test_logits_padded_and_packed(name: str, tmp_path: Path) -> None:
    """Sequences of lengths that share a group and such that do not; buckets reach beyond their half at 31 tokens."""
    model = theirs("ForMaskedLM", **OPTIONS[name])
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    rows = texts()
    tokens, lengths = batch(rows), torch.tensor(LENGTHS, dtype=torch.int32)
    mask = tokens != 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask.long()).logits[mask]
        assert_logits_close(ours(tokens, kv_lens=lengths)[mask], expected)
        assert_logits_close(ours(tokens, attention_mask=mask)[mask], expected)
        assert_logits_close(ours(torch.cat(rows)[None], packed=PackedSequences.of(LENGTHS))[0], expected)


def test_gradients_of_packed_sequences(tmp_path: Path) -> None:
    model = theirs("ForTokenClassification", **OPTIONS["v2-xlarge"])
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path).requires_grad_()
    rows = texts()
    tokens = batch(rows)
    mask = tokens != 0
    weights = torch.randn(int(mask.sum()), 3)
    (model(tokens, attention_mask=mask.long()).logits[mask] * weights).sum().backward()
    (ours(torch.cat(rows)[None], packed=PackedSequences.of(LENGTHS))[0] * weights).sum().backward()
    found = {name: p.grad for name, p in ours.named_parameters()}
    for name, p in model.named_parameters():
        assert_logits_close(found[name], p.grad, 1e-4)


def test_bfloat16(tmp_path: Path) -> None:
    """No further from fp32 than twice what transformers in bf16 is."""
    model = theirs("ForSequenceClassification", **V3)
    model.save_pretrained(tmp_path)
    rows = texts()
    tokens = batch(rows)
    mask = tokens != 0
    with torch.no_grad():
        exact = model(tokens, attention_mask=mask.long()).logits
        other = model.bfloat16()(tokens, attention_mask=mask.long()).logits.float()
        ours = load_model(tmp_path, dtype="bfloat16")(torch.cat(rows)[None], packed=PackedSequences.of(LENGTHS)).float()
    scale = exact.abs().max()
    assert (ours - exact).abs().max() <= max(2 * (other - exact).abs().max(), 2**-8 * scale)


def test_texts_beyond_the_positions(tmp_path: Path) -> None:
    """Without absolute positions distances are only clamped; with them there is an end."""
    model = theirs("Model", **V3)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(3, 83, (1, 70))
    with torch.no_grad():
        assert_logits_close(load_model(tmp_path)(tokens), model(tokens).last_hidden_state)
    theirs("Model", **OPTIONS["c2p"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="70 tokens do not fit the model's 40 positions"):
        load_model(tmp_path)(tokens)


@pytest.mark.parametrize("kind", ["DebertaV2", "Bert", "Roberta", "DistilBert", "MPNet", "Albert"])
def test_multiple_choice(kind: str, tmp_path: Path) -> None:
    options = dict(V3) if kind == "DebertaV2" else {"max_position_embeddings": 60}
    if kind == "DistilBert":
        options |= {"dim": 32, "n_heads": 4, "hidden_dim": 48, "n_layers": 3}
    sizes = {**SIZES, **options, "pad_token_id": 1}
    if kind == "DistilBert":
        sizes = {k: v for k, v in sizes.items() if not k.startswith(("hidden_size", "num_h", "num_a", "inter"))}
    model = getattr(transformers, f"{kind}ForMultipleChoice")(getattr(transformers, f"{kind}Config")(**sizes))
    randomize(model)
    model.eval().save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    rows = texts()
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1).view(2, 3, -1)
    mask = tokens != 1
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask.long()).logits
        assert_logits_close(ours(tokens, attention_mask=mask), expected)
        packed = ours(torch.cat(rows)[None], packed=PackedSequences.of(LENGTHS))
        assert_logits_close(packed.view(2, 3), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type has 'p2p'; known are c2p, p2c"),
        ({"conv_kernel_size": 4}, "conv_kernel_size=4 must be odd"),
        ({"position_buckets": 16}, r"rel_embeddings.weight in .* has shape \[16, 32\], the config asks for \[32, 32\]"),
        ({"attention_head_size": 16}, "attention_head_size=16 must be 8"),
        ({"conv_groups": "two"}, "conv_groups"),
        ({"pooler_hidden_size": 8}, "pooler_hidden_size=8 must be hidden_size=32"),
        ({"legacy": False, "embedding_size": 20}, "embedding_size=20 must be hidden_size=32"),
    ],
)
def test_configs_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs("Model", **V3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def pieces(folder: Path) -> None:
    """An spm.model with DeBERTa's order of special tokens, without [MASK]."""
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = ["hello world house", "ada lives in paris", "neu alt 12345 67890", "abcdefghijklmnopqrstuvwxyz .,:!"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, pad_piece="[PAD]", bos_id=1, bos_piece="[CLS]", eos_id=2, eos_piece="[SEP]", unk_id=3, unk_piece="[UNK]",
        user_defined_symbols=["<x>"],
    )  # fmt: skip
    (folder / "spm.model").write_bytes(model.getvalue())
    (folder / "config.json").write_text(json.dumps({"model_type": "deberta-v2"}))


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": True, "split_by_punct": True}], ids=["plain", "changed"])
def test_the_tokenizer_of_an_spm_model_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("google.protobuf")  # which the converter of transformers needs
    pieces(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = open_checkpoint(tmp_path).tokenizer()
    assert ours is not None
    ids = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    asked = {"do_lower_case": False, "split_by_punct": False, "add_prefix_space": True} | settings
    old = types.SimpleNamespace(vocab_file=str(tmp_path / "spm.model"), convert_tokens_to_ids=ids.__getitem__, **asked)
    converted = DebertaV2Converter(old).converted()
    for text in [
        "Ada lives in Paris.",
        "",
        "  two   spaces ",
        "\ufb01 \u2460 \uff37ide <x>house",
        MULTILINGUAL.replace("\x00", ""),
    ]:
        found, expected = ours.backend.encode(text), converted.encode(text)
        assert found.ids == expected.ids and found.offsets == expected.offsets
    pair = ours.backend.encode("hello", "house")
    assert pair.tokens[0] == "[CLS]" and pair.tokens.count("[SEP]") == 2 and pair.type_ids[-2:] == [1, 1]
    assert ours.vocab_size == converted.get_vocab_size() + 1 and ours.encode("a [MASK]")[-2] == ours.vocab_size - 1


def test_damaged_pieces(tmp_path: Path) -> None:
    pieces(tmp_path)
    whole = (tmp_path / "spm.model").read_bytes()
    for damaged in (whole[: len(whole) // 2 + 1], b"", b"\xff" * 40, b"\x0a\x02\x10", b"\x08" + b"\xff" * 9 + b"\x01"):
        (tmp_path / "spm.model").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"spm\.model"):
            open_checkpoint(tmp_path).tokenizer()


def saved(folder: Path, head: str, **config: Any) -> Any:
    """A random model with the tokenizer of its folder; transformers' pipelines with both."""
    pieces(folder)
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer is not None
    torch.manual_seed(0)
    sizes = (
        {k: v for k, v in SIZES.items() if k != "num_labels"}
        | V3
        | {"vocab_size": tokenizer.vocab_size, "initializer_range": 0.5}
    )
    sizes["max_position_embeddings"] = 90
    model = getattr(transformers, f"DebertaV2{head}")(transformers.DebertaV2Config(**sizes | config)).eval()
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend).from_str(tokenizer.backend.to_str()), pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip
    return lambda task, **options: transformers.pipeline(task, model=model, tokenizer=fast, device="cpu", **options)


def test_zero_shot_and_masks(tmp_path: Path) -> None:
    labels = {0: "entailment", 1: "neutral", 2: "contradiction"}
    ask = saved(tmp_path, "ForSequenceClassification", id2label=labels, label2id={v: k for k, v in labels.items()})
    text, choices = "ada lives in paris.", ["house", "world", "ada"]
    for multi_label in (False, True):
        expected = ask("zero-shot-classification")(text, candidate_labels=choices, multi_label=multi_label)
        found = foveate.ZeroShotClassifier(tmp_path)(text, choices, multi_label=multi_label)
        assert found["labels"] == expected["labels"] and found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    ask = saved(tmp_path, "ForMaskedLM")
    [best, *_] = foveate.FillMask(tmp_path)("ada lives in [MASK].")
    assert best["score"] == pytest.approx(ask("fill-mask")("ada lives in [MASK].")[0]["score"], abs=1e-4)


def test_reranker_answers_and_entities(tmp_path: Path) -> None:
    ask = saved(tmp_path, "ForSequenceClassification", num_labels=1)
    query, documents = "where does ada live", ["ada lives in paris.", "a house", "12345"]
    expected = [ask("text-classification")({"text": query, "text_pair": text})["score"] for text in documents]
    found = foveate.Reranker(tmp_path)(query, documents)
    assert {hit["index"]: hit["score"] for hit in found} == pytest.approx(dict(enumerate(expected)), abs=1e-4)
    saved(tmp_path, "ForQuestionAnswering", num_labels=2)
    answer = foveate.QuestionAnswerer(tmp_path)(query, documents[0])
    assert documents[0][answer["start"] : answer["end"]] == answer["answer"]
    ask = saved(tmp_path, "ForTokenClassification", num_labels=3)
    expected = ask("token-classification")(documents[0])
    found = foveate.TokenClassifier(tmp_path)(documents[0])
    assert [e["entity"] for e in found] == [e["entity"] for e in expected]


def test_what_it_looks_at(tmp_path: Path) -> None:
    """The recorded weights are those that transformers returns."""
    model = theirs("Model", **V3)
    model.config._attn_implementation = "eager"
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(3, 83, (1, 12))
    with torch.no_grad():
        expected = model(tokens, output_attentions=True).attentions
    found: list[torch.Tensor] = []

    class Watched(PackedSequences):
        def attend_batch(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
            found.append(foveate.attention_weights(q, k, rows=list(range(12)), **options))
            return super().attend_batch(q, k, v, **options)

    packed = PackedSequences.of([12])
    ours(tokens, packed=Watched(packed.cu_seqlens, packed.positions, packed.longest))
    assert len(found) == 3 and any(isinstance(module, DisentangledAttention) for module in ours.modules())
    for weights, other in zip(found, expected):
        assert_logits_close(weights, other)
