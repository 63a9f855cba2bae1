"""T5 v1.0 and v1.1 against transformers: forward, gradients, incremental decoding, and no [H, S, S] bias in memory."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate.models.t5 as t5_module
from compare import assert_as_good_as_torch
from foveate.bench.tolerance import model_floor
from foveate.models import load_model
from foveate.models.encoder_decoder import DecoderCache
from model_cases import assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, B, S, ST = 71, 3, 13, 9
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "v1.0": {"feed_forward_proj": "relu"},
    "v1.1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "tied-gated": {"feed_forward_proj": "gated-silu"},
}


def theirs(kind: str, std: float = 0.2) -> Any:
    changes = KINDS[kind]
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(**SIZES, **changes, attn_implementation="eager")
    )
    if (
        kind == "v1.1"
    ):  # transformers 5 ties new models always, and unties those whose checkpoints have a head of their own
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB, 32))
    randomize(model, std)
    return model.eval()


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    model = theirs(request.param)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) == (request.param == "v1.1")
    return model, load_model(tmp_path)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, mask (one text padded on the right, one on the left), decoder tokens"""
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, 8:] = False
    mask[2, :4] = False
    return torch.randint(2, VOCAB, (B, S)), mask, torch.randint(2, VOCAB, (B, ST))


def test_logits_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    tokens, mask, target = batch()
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target)
        assert_logits_close(ours.encode(tokens, mask)[mask], expected.encoder_last_hidden_state[mask])
        assert_logits_close(ours(tokens, target, mask), expected.logits)
        assert_logits_close(ours(tokens, target), model(input_ids=tokens, decoder_input_ids=target).logits)


def test_gradients_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    """Those of the two tables of relative positions above all."""
    model, ours = pair
    tokens, mask, target = batch()
    upstream = torch.randn(B, ST, VOCAB)
    (model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target).logits * upstream).sum().backward()
    (ours(tokens, target, mask) * upstream).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    names = [name for name, _ in ours.named_parameters()]
    assert sorted(names) == sorted(grads)
    assert sum("relative_attention_bias" in name for name in names) == 2
    for name, p in ours.named_parameters():
        assert (p.grad - grads[name]).abs().max() <= 1e-4 * grads[name].abs().max(), name
        assert grads[name].any(), name


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_is_as_good_as_transformers_bf16(kind: str, tmp_path: Path) -> None:
    model = theirs(kind).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokens, mask, target = batch()
    with torch.no_grad():
        exact = load_model(tmp_path, dtype=torch.float64)(tokens, target, mask)
        ours = load_model(tmp_path)(tokens, target, mask)
        assert ours.dtype is torch.bfloat16
        peer = model(input_ids=tokens, attention_mask=mask.long(), decoder_input_ids=target).logits
        assert_as_good_as_torch(ours, exact, peer, floor=model_floor(exact, 48, 5, torch.bfloat16))


def test_decoding_step_by_step_is_one_pass(pair: tuple[Any, Any]) -> None:
    """In steps of 2, 1, 1, ...: past the first growth of the cache, 16 tokens."""
    _, ours = pair
    tokens, mask, _ = batch()
    target = torch.randint(2, VOCAB, (B, 40))
    with torch.no_grad():
        whole = ours(tokens, target, mask)
        cache = DecoderCache(ours, ours.encode(tokens, mask), mask)
        pieces = [target[:, :2], *target[:, 2:].split(1, 1)]
        steps = [ours.logits(ours.decode(piece, cache)) for piece in pieces]
    assert_logits_close(torch.cat(steps, 1), whole)


def test_cross_attention_is_computed_once_and_shared_by_beams(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ours = pair
    tokens, mask, target = batch()
    beams = torch.randint(2, VOCAB, (2 * B, 6))
    with torch.no_grad():
        expected = ours(tokens.repeat_interleave(2, 0), beams, mask.repeat_interleave(2, 0))
        calls = []
        for block in ours.decoder.block:
            block.layer[1].EncDecAttention.k.register_forward_hook(lambda *_: calls.append(1))
        cache = DecoderCache(ours, ours.encode(tokens, mask), mask)
        got = torch.cat([ours.logits(ours.decode(piece, cache)) for piece in beams.split(2, 1)], 1)
        assert_logits_close(got, expected)
        assert len(calls) == 3
        assert all(k.shape[0] == B for k, _ in cache.cross)
        # each beam of a text goes on from the other one's past
        rows = torch.tensor([1, 0, 3, 2, 5, 4])
        cache.reorder(rows)
        new = torch.randint(2, VOCAB, (2 * B, 1))
        after = ours.logits(ours.decode(new, cache))[:, 0]
        whole = ours(tokens.repeat_interleave(2, 0), torch.cat([beams[rows], new], 1), mask.repeat_interleave(2, 0))
        assert_logits_close(after, whole[:, -1])


def test_relative_bias_is_the_small_table(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every self-attention gets the first layer's table, cross-attention none, and nothing of the size [S, S] is passed."""
    _, ours = pair
    seen = []
    original = t5_module.attend

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options)
        return original(*args, **options)

    monkeypatch.setattr(t5_module, "attend", spy)
    tokens, mask, target = batch()
    ours(tokens, target, mask)
    tables = [None if o.get("relative_bias") is None else o["relative_bias"].table for o in seen]
    encoder = ours.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    decoder = ours.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert [t is encoder for t in tables[:2]] == [True] * 2
    assert [t is decoder for t in tables[2::2]] == [True] * 3 and tables[3::2] == [None] * 3
    assert all(o.get("bias") is None and (o.get("mask") is None or o["mask"].numel() == B * S) for o in seen)


def test_files_as_they_are_on_the_hub(tmp_path: Path) -> None:
    """v1.1: tie_word_embeddings false and no scale_decoder_outputs; copies of the embedding are ignored, not missed."""
    from safetensors.torch import save_file

    model = theirs("v1.1")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("scale_decoder_outputs", None)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(tmp_path / "model.safetensors")
    copies = {f"{side}.embed_tokens.weight": weights["shared.weight"].clone() for side in ("encoder", "decoder")}
    copies["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)
    save_file(weights | copies, tmp_path / "model.safetensors")
    ours = load_model(tmp_path)
    assert not ours.config.tied and not ours.config.scaled
    tokens, mask, target = batch()
    with torch.no_grad():
        assert_logits_close(ours(tokens, target), model(input_ids=tokens, decoder_input_ids=target).logits)


def test_shift_right_is_that_of_transformers(pair: tuple[Any, Any]) -> None:
    model, ours = pair
    labels = torch.tensor([[5, 6, 1, -100, -100], [7, 8, 9, 10, 1]])
    expected = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(ours.shift_right(labels), expected)


def test_dropout_only_in_training(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    tokens, mask, target = batch()
    assert torch.equal(ours(tokens, target), ours(tokens, target))
    ours.train()
    assert not torch.equal(ours(tokens, target), ours(tokens, target))


def test_unknown_feed_forward_is_named(tmp_path: Path) -> None:
    theirs("v1.0").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"feed_forward_proj": "mixed-gelu"}))
    with pytest.raises(ValueError, match="feed_forward_proj='mixed-gelu' is not understood"):
        load_model(tmp_path)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_float16_does_not_overflow(feed_forward: str, tmp_path: Path) -> None:
    """A channel of the stream grows beyond float16's largest number, as in the large T5s; transformers keeps `wo` in fp32 too."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj=feed_forward,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for block in [*model.encoder.block, *model.decoder.block]:
            part = block.layer[-1].DenseReluDense
            part.wo.weight.normal_(0, 0.05)
            part.wo.weight[0] *= 4e4
            for name in ("wi", "wi_0", "wi_1"):
                if hasattr(part, name):
                    getattr(part, name).weight.normal_(0, 1)
    model.half().save_pretrained(tmp_path)
    source, target = torch.randint(2, 64, (1, 12)), torch.randint(2, 64, (1, 5))

    def logits(dtype: torch.dtype) -> torch.Tensor:
        theirs = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype).eval()
        return theirs(input_ids=source, decoder_input_ids=target).logits.float()

    with torch.no_grad():
        exact, peer = logits(torch.float32), logits(torch.float16)
        ours = load_model(tmp_path)
        found = ours(source, target)
    assert (
        found.dtype is torch.float16 and ours.encoder.block[0].layer[-1].DenseReluDense.wo.weight.dtype is torch.float32
    )
    assert (
        peer.isfinite().all()
        and (found.float() - exact).abs().max() <= 2 * (peer - exact).abs().max() + 1e-3 * exact.abs().max()
    )


def test_mt5_is_a_t5(tmp_path: Path) -> None:
    config = transformers.MT5Config(
        **SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False, attn_implementation="eager"
    )
    model = transformers.MT5ForConditionalGeneration(config).eval()
    randomize(model, 0.2)
    model.save_pretrained(tmp_path)
    source, target = torch.randint(3, 40, (2, 9)), torch.randint(3, 40, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=source, decoder_input_ids=target).logits
        assert_logits_close(load_model(tmp_path)(source, target), expected)
