"""Every family of encoder-decoders against transformers with the same random weights: whole, packed, with a cache; gradients; files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compare import assert_as_good_as_torch
from encoder_decoder_toys import CASES, PAD, START, VOCAB, theirs
from foveate.bench.tolerance import model_floor
from foveate.models import load_model
from foveate.models.encoder_decoder import DecoderCache
from foveate.models.encoder_decoder_families import FAMILIES
from foveate.models.registry import model_types
from foveate.models.sequences import PackedSequences
from model_cases import assert_logits_close

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = 22  # of the smaller vocabulary of all cases
LENGTHS = (13, 8, 10)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens and their mask, padded on the right, and decoder tokens"""
    tokens = torch.full((3, 13), PAD)
    for row, length in zip(tokens, LENGTHS):
        row[:length] = torch.randint(3, IDS, (length,))
    return tokens, tokens != PAD, torch.randint(3, IDS, (3, 19))


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    model = theirs(request.param)
    model.save_pretrained(tmp_path)
    return model, load_model(tmp_path)


def test_every_family_has_a_case() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(model_types(encoder_decoder=True))


def test_logits_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    """Padded on the right, packed, whole targets and targets in steps of 5, 1, 1, ... past the cache's first growth."""
    model, ours = pair
    tokens, mask, target = batch()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target)
        encoded = ours.encode(tokens, mask)
        assert_logits_close(encoded[mask], expected.encoder_last_hidden_state[mask])
        assert_logits_close(ours(tokens, target, mask), expected.logits)
        assert_logits_close(ours(tokens[:1], target[:1]), expected.logits[:1])
        cache = DecoderCache(ours, encoded, mask)
        steps = [ours.logits(ours.decode(part, cache)) for part in (target[:, :5], *target[:, 5:].split(1, 1))]
        assert_logits_close(torch.cat(steps, 1), expected.logits)
        sources = PackedSequences.of(LENGTHS)
        packed = ours.encode(tokens[mask][None], None, sources)
        assert_logits_close(packed[0], expected.encoder_last_hidden_state[mask])
        cache = DecoderCache(ours, packed, None, keep=False, packed=sources)
        out = ours.logits(ours.decode(target.reshape(1, -1), cache, PackedSequences.of([19, 19, 19])))
        assert_logits_close(out.view(3, 19, -1), expected.logits)


def test_texts_padded_on_the_left(tmp_path: Path) -> None:
    """M2M-100 counts positions from the first token that is none of padding."""
    model = theirs("m2m_100")
    model.save_pretrained(tmp_path)
    tokens, mask, target = batch()
    tokens, mask = tokens.flip(1), mask.flip(1)
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target).logits
        assert_logits_close(load_model(tmp_path)(tokens, target, mask), expected)


def test_beams_share_the_keys_of_their_text(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    tokens, mask, _ = batch()
    target = torch.randint(3, IDS, (6, 4))
    with torch.no_grad():
        cache = DecoderCache(ours, ours.encode(tokens, mask), mask)
        assert cache.cross[0][0].shape[0] == 3
        found = ours.logits(ours.decode(target, cache))
        twice = {"input_ids": tokens.repeat_interleave(2, 0), "attention_mask": mask.long().repeat_interleave(2, 0)}
        assert_logits_close(found, model(**twice, decoder_input_ids=target).logits)
        cache.reorder(torch.tensor([1, 1, 2, 3, 5, 4]))
        found = ours.logits(ours.decode(target[:, :1], cache))
        whole = torch.cat([target[[1, 1, 2, 3, 5, 4]], target[:, :1]], 1)
        assert_logits_close(found[:, -1], model(**twice, decoder_input_ids=whole).logits[:, -1])


def test_loss_and_gradients_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    """From labels, of which padding is -100; what transformers does not train has no gradient here either."""
    model, ours = pair
    tokens, mask, _ = batch()
    labels = torch.randint(3, IDS, (3, 9))
    labels[1, 6:] = -100
    inputs = ours.shift_right(labels)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        assert torch.equal(inputs, model.prepare_decoder_input_ids_from_labels(labels))
    expected = model(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
    logits = ours(tokens, inputs, mask)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    expected.backward()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert set(trained) == set(grads)
    for name, grad in trained.items():
        assert (grad - grads[name]).abs().max() <= 1e-4 * grads[name].abs().max() + 1e-6, name


@pytest.mark.parametrize("case", ["bart", "mbart", "pegasus", "m2m_100", "umt5", "longt5"])
def test_bf16_is_as_good_as_transformers_bf16(case: str, tmp_path: Path) -> None:
    model = theirs(case, std=0.2).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokens, mask, target = batch()
    with torch.no_grad():
        exact = load_model(tmp_path, dtype=torch.float64)(tokens, target, mask)
        ours = load_model(tmp_path)(tokens, target, mask)
        assert ours.dtype is torch.bfloat16
        peer = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target).logits
        assert_as_good_as_torch(ours, exact, peer, floor=model_floor(exact, 48, 5, torch.bfloat16))


def test_state_dicts_move_both_ways(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    stored = ours.state_dict()
    computed = {name for name in model.state_dict() if "embed_positions" in name} - set(stored)
    copies = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # of T5
    assert set(model.state_dict()) - computed - copies == set(stored) - copies
    with torch.no_grad():
        before = model(input_ids=torch.tensor([[5, 6, 1]]), decoder_input_ids=torch.tensor([[START, 4]])).logits
        for name, p in model.named_parameters():
            if name not in computed:
                p.zero_()
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert set(missing) <= computed | copies and not unexpected
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[5, 6, 1]]), decoder_input_ids=torch.tensor([[START, 4]])).logits
    assert torch.equal(found, before)


@pytest.mark.parametrize("kept", ["model.shared.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"])
def test_the_embedding_under_any_of_its_names(kept: str, tmp_path: Path) -> None:
    """Files keep one of the names that share the embedding, and not always the same; without final_logits_bias it is zeros."""
    model = theirs("bart")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    embedding = stored.pop("model.shared.weight")
    bias = stored.pop("final_logits_bias")
    save_file(stored | {kept: embedding}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens, mask, target = batch()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target).logits - bias
        ours = load_model(tmp_path)
        assert_logits_close(ours(tokens, target, mask), expected)
    assert not ours.final_logits_bias.requires_grad and not ours.final_logits_bias.any()


def test_a_head_and_embeddings_of_their_own(tmp_path: Path) -> None:
    """Fine-tuning may have untied them: what the file has counts."""
    model = theirs("m2m_100")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    own = {"lm_head.weight": torch.randn(VOCAB, 32), "model.decoder.embed_tokens.weight": torch.randn(VOCAB, 32)}
    save_file(stored | own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = load_model(tmp_path)
    for name, weight in own.items():
        assert torch.equal(ours.get_parameter(name), weight)
    assert torch.equal(ours.model.encoder.embed_tokens.weight, stored["model.shared.weight"]) and not ours.config.tied


def test_positions_end(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    positions = getattr(ours.config, "max_positions", None)
    tokens = torch.full((1, 70), 5)
    if positions is None:
        assert ours(tokens, tokens).isfinite().all()
        return
    with pytest.raises(ValueError, match=r"70 tokens do not fit the model's 60 positions; cut the text"):
        ours(tokens, tokens[:, :4])
    with pytest.raises(ValueError, match=r"70 tokens do not fit the model's 60 positions; lower max_new_tokens"):
        ours(tokens[:, :4], tokens)


@pytest.mark.parametrize(
    "case, changes, message",
    [
        ("bart", {"decoder_attention_heads": 3}, "d_model=32 is not a multiple of decoder_attention_heads=3"),
        ("bart", {"pad_token_id": 24}, "pad_token_id=24 is not one of the 24 ids"),
        ("bart", {"encoder_ffn_dim": None}, "the config of this bart has no 'encoder_ffn_dim'"),
        ("bart", {"decoder_layers": 9}, "lacks layers: the config says 9, and there are weights of 3"),
        ("bart", {"model_type": "mbart"}, "lacks model.decoder.layer_norm"),
        ("pegasus", {"d_model": 2, "encoder_attention_heads": 1, "decoder_attention_heads": 1}, "must be even, and at least 4"),
        ("bart", {"architectures": ["BartForSequenceClassification"]}, "lacks classification_head.dense.bias, "),
        ("bart", {"architectures": ["BartForCausalLM"]}, "BartForCausalLM is not supported: of bart only whole models"),
        ("t5", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel is not supported"),
        ("longt5", {"encoder_attention_type": "transient-global"}, "encoder_attention_type='transient-global' is not supported"),
        ("bart", {"model_type": "pegasus_x"}, "the architecture 'pegasus_x' .* is not supported, but 'pegasus' is"),
        ("bart", {"scale_embedding": "yes"}, "scale_embedding"),
    ],
)  # fmt: skip
def test_what_is_refused(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    theirs(case).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_defaults_are_those_of_transformers() -> None:
    """Of the keys that a config.json may leave out."""
    import transformers

    for model_type, family in FAMILIES.items():
        config = transformers.AutoConfig.for_model(model_type).to_dict()
        for key, value in family.defaults.items():
            if key in config:
                assert config[key] == value, (model_type, key)


def test_dropout_only_in_training(tmp_path: Path) -> None:
    theirs("bart", dropout=0.3).save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    tokens, mask, target = batch()
    assert torch.equal(ours(tokens, target, mask), ours(tokens, target, mask))
    ours.train()
    assert not torch.equal(ours(tokens, target, mask), ours(tokens, target, mask))
