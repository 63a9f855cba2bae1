"""Every encoder family and head against transformers with the same random weights: padded, packed, from the folder that it saves."""

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
from foveate.models.encoder_families import FAMILIES
from foveate.models.registry import model_types
from foveate.models.sequences import PackedSequences
from model_cases import assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, PAD = 83, 1
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 24, "type_vocab_size": 2, "pad_token_id": PAD, "num_labels": 3,
}  # fmt: skip
# What is switched on beside the sizes, so that the family differs from BERT.
CHANGES: dict[str, dict[str, Any]] = {
    "bert": {"hidden_act": "relu"},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1, "pad_token_id": 3},
    "camembert": {"type_vocab_size": 1},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4},
    "mpnet": {},  # transformers has 32 buckets whatever the config says
    "electra": {"embedding_size": 20},
    "albert": {"embedding_size": 20, "num_hidden_groups": 2, "hidden_act": "gelu_new"},
    "nomic_bert": {"pad_token_id": 0, "hidden_act": "silu", "head_dim": 8},
    "deberta": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": 6,
        "pad_token_id": 0,
    },
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": "p2c|c2p",
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
        "pad_token_id": 0,
    },
    "modernbert": {
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "decoder_bias": True,
        "classifier_pooling": "mean",
    },
}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
OWN_CLASSES = {"deberta": "Deberta", "deberta-v2": "DebertaV2", "modernbert": "ModernBert"}
LENGTHS = (7, 11, 4)


def theirs(model_type: str, head: str) -> Any:
    sizes = SIZES | CHANGES[model_type]
    if model_type == "distilbert":
        sizes = {k: v for k, v in sizes.items() if k not in ("hidden_size", "intermediate_size", "type_vocab_size")}
        sizes = {k: v for k, v in sizes.items() if not k.startswith("num_") or k == "num_labels"}
    classes = FAMILIES[model_type].classes if model_type in FAMILIES else OWN_CLASSES[model_type]
    if not hasattr(transformers, f"{classes}{head}"):
        pytest.skip(f"transformers has no {classes}{head}")
    sizes["num_labels"] = 2 if head == "ForQuestionAnswering" else 3
    config = transformers.AutoConfig.for_model(model_type, **sizes, attn_implementation="eager")
    model = getattr(transformers, f"{classes}{head}")(config)
    randomize(model)
    return model.eval()


def test_every_family_has_a_case() -> None:
    assert set(CHANGES) == {*FAMILIES, *OWN_CLASSES} == set(model_types(heads=True))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("model_type", CHANGES)
def test_outputs_are_those_of_transformers(model_type: str, head: str, tmp_path: Path) -> None:
    model = theirs(model_type, head)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    pad = model.config.pad_token_id
    texts = [torch.randint(4, VOCAB, (length,)) for length in LENGTHS]
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=pad)
    mask = tokens != pad
    lengths = torch.tensor(LENGTHS, dtype=torch.int32)
    packed = PackedSequences.of(LENGTHS)
    with torch.no_grad():
        out = model(tokens, attention_mask=mask.long())
        got = [
            ours(tokens, kv_lens=lengths),
            ours(tokens, attention_mask=mask),
            ours(torch.cat(texts)[None], packed=packed),
        ]
    if head == "ForSequenceClassification":
        for logits in got:
            assert_logits_close(logits, out.logits)
        return
    if head == "ForQuestionAnswering":
        expected = torch.stack([out.start_logits, out.end_logits], -1)
        got = [torch.stack(pair, -1) for pair in got]
    else:
        expected = out.last_hidden_state if head == "Model" else out.logits
    assert_logits_close(got[0][mask], expected[mask])
    assert_logits_close(got[1][mask], expected[mask])
    assert_logits_close(got[2][0], expected[mask])


@pytest.mark.parametrize("model_type", CHANGES)
def test_the_encoder_of_a_checkpoint_with_a_head(model_type: str, tmp_path: Path) -> None:
    """With the names as they are and without the family's prefix, as sentence-transformers stores them; a pooler beside the head."""
    model = theirs(model_type, "ForMaskedLM")
    model.save_pretrained(tmp_path)
    tokens = torch.randint(4, VOCAB, (2, 9))
    with torch.no_grad():
        expected = model.base_model(tokens).last_hidden_state
        assert_logits_close(load_model(tmp_path, head="encoder")(tokens), expected)
        weights = load_file(tmp_path / "model.safetensors")
        bare = {name.removeprefix(f"{model.base_model_prefix}."): weight for name, weight in weights.items()}
        save_file(bare, tmp_path / "model.safetensors", metadata={"format": "pt"})
        assert_logits_close(load_model(tmp_path, head="encoder")(tokens), expected)
    other = theirs(model_type, "ForSequenceClassification")
    other.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    spare = {f"{model.base_model_prefix}.pooler.dense.{kind}": torch.ones(32) for kind in ("weight", "bias")}
    if model_type not in OWN_CLASSES and not any("pooler" in name for name in weights):
        save_file(weights | spare, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert_logits_close(load_model(tmp_path)(tokens), other(tokens).logits)


def test_nomic_bert_as_it_is_published(tmp_path: Path) -> None:
    """With the config and the names of the code beside the weights of nomic-embed-text-v1.5."""
    model = theirs("nomic_bert", "Model")
    model.save_pretrained(tmp_path)
    weights = {}
    for name, value in model.state_dict().items():
        for new, old in (
            (r"layers.", "encoder.layers."), ("embeddings.LayerNorm", "emb_ln"), ("self_attn.o_proj", "attn.out_proj"),
            ("up_proj", "fc11"), ("gate_proj", "fc12"), ("down_proj", "fc2"), ("post_attention_layernorm", "norm1"),
            ("post_mlp_layernorm", "norm2"),
        ):  # fmt: skip
            name = name.replace(new, old)
        weights[name] = value
    for i in range(4):
        parts = [weights.pop(f"encoder.layers.{i}.self_attn.{part}_proj.weight") for part in "qkv"]
        weights[f"encoder.layers.{i}.attn.Wqkv.weight"] = torch.cat(parts)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "nomic_bert", "architectures": ["NomicBertModel"], "n_embd": 32, "n_head": 4, "n_inner": 48, "n_layer": 4,
        "n_positions": 24, "vocab_size": VOCAB, "type_vocab_size": 2, "layer_norm_epsilon": 1e-12, "activation_function": "swiglu",
        "rotary_emb_base": model.config.rope_parameters["rope_theta"], "rotary_emb_fraction": 1.0, "rotary_emb_interleaved": False,
        "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "prenorm": False, "parallel_block": False, "causal": False,
        "qkv_proj_bias": False, "mlp_fc1_bias": False, "mlp_fc2_bias": False, "use_rms_norm": False, "resid_pdrop": 0.0,
        "attn_pdrop": 0.0, "num_labels": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.randint(4, VOCAB, (2, 9))
    with torch.no_grad():
        assert_logits_close(load_model(tmp_path)(tokens), model(tokens).last_hidden_state)
    for changes, message in (
        ({"prenorm": True}, "prenorm=True is not supported for NomicBERT"),
        ({"num_experts": 8}, "num_experts=8 is not supported for NomicBERT"),
        (
            {"activation_function": "gelu"},
            "activation_function='gelu' is not supported for NomicBERT; swiglu and geglu are",
        ),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_the_discriminator_of_electra(tmp_path: Path) -> None:
    model = theirs("electra", "ForPreTraining")
    model.save_pretrained(tmp_path)
    tokens = torch.randint(4, VOCAB, (2, 9))
    with torch.no_grad():
        assert_logits_close(load_model(tmp_path)(tokens), model(tokens).logits)
        assert_logits_close(load_model(tmp_path, head="encoder")(tokens), model.electra(tokens).last_hidden_state)


def test_positions_are_counted_from_the_padding_token_on(tmp_path: Path) -> None:
    model = theirs("roberta", "Model")
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.max_positions == 24 - (PAD + 1)
    tokens = torch.randint(4, VOCAB, (2, 9))
    tokens[0, :3] = PAD  # padding on the left
    mask = tokens != PAD
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask.long()).last_hidden_state
        assert_logits_close(ours(tokens, attention_mask=mask)[mask], expected[mask])
    with pytest.raises(ValueError, match="23 tokens do not fit the model's 22 positions"):
        ours(torch.full((1, 23), 5))


@pytest.mark.parametrize(
    "model_type, changes, message",
    [
        (
            "roberta",
            {"max_position_embeddings": 2},
            "max_position_embeddings=2 leaves no position after pad_token_id=1",
        ),
        ("albert", {"inner_group_num": 2}, "inner_group_num=2 is not supported for ALBERT"),
        ("albert", {"num_hidden_groups": 9}, "num_hidden_groups=9 must be between 1 and num_hidden_layers=4"),
        ("distilbert", {"n_layers": 40}, "lacks layers: the config says 40, and there are weights of 4"),
        ("electra", {"embedding_size": 21}, r"embeddings.* in .* has shape \[.*20\], the config asks for \[.*21\]"),
        ("mpnet", {"relative_attention_num_buckets": "many"}, "relative_attention_num_buckets"),
    ],
)
def test_configs_that_do_not_belong_to_the_weights(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    theirs(model_type, "Model").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_two_names_for_one_weight_are_refused(tmp_path: Path) -> None:
    theirs("roberta", "ForTokenClassification").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"classifier.out_proj.bias": torch.zeros(3)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(
        ValueError, match=r"has both classifier.bias and classifier.out_proj.bias, which are one weight"
    ):
        load_model(tmp_path)


def _byte_level(folder: Path) -> Any:
    """A RoBERTa tokenizer of the bytes and a few merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["ada lives in paris", "bob in rome"] * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in names.items()},
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


TEXTS = ["Ada lives in Paris, Bob in Rome.", "a", "Zoe \u4e2d lives in xyz"]


def _saved(folder: Path, head: str, **config: Any) -> Any:
    tokenizer = _byte_level(folder)
    torch.manual_seed(0)
    model = getattr(transformers, f"Roberta{head}")(
        transformers.RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=90, type_vocab_size=1, pad_token_id=1, initializer_range=0.5, **config,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(folder)
    return lambda task, **options: transformers.pipeline(
        task, model=str(folder), tokenizer=tokenizer, device="cpu", **options
    )


def _same(ours: Any, expected: Any) -> None:
    if isinstance(expected, list):
        assert len(ours) == len(expected)
        for a, b in zip(ours, expected):
            _same(a, b)
        return
    # transformers decodes a byte-level token with its space
    assert ours == pytest.approx({k: float(v) if k == "score" else v for k, v in expected.items()}, abs=1e-4)


def test_pipelines_with_roberta_and_its_tokenizer(tmp_path: Path) -> None:
    """Masks, classes and pairs with byte-level tokens, two separators between texts and positions from 2 on."""
    pipeline = _saved(tmp_path, "ForMaskedLM")
    texts = ["ada lives<mask> paris.", "a<mask>"]
    _same(foveate.FillMask(tmp_path)(texts), pipeline("fill-mask")(texts))
    pipeline = _saved(tmp_path, "ForSequenceClassification", num_labels=3)
    classify = foveate.TextClassifier(tmp_path)
    _same(classify(TEXTS), pipeline("text-classification")(TEXTS))
    pair = {"text": TEXTS[0], "text_pair": TEXTS[2]}
    _same(classify(TEXTS[0], TEXTS[2]), pipeline("text-classification")(pair))


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "max"])
def test_token_classification_with_roberta(strategy: str, tmp_path: Path) -> None:
    tags = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    pipeline = _saved(tmp_path, "ForTokenClassification", id2label=dict(enumerate(tags)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers: the tokenizer does not mark words
        expected = pipeline("token-classification", aggregation_strategy=strategy)(TEXTS)
    found = foveate.TokenClassifier(tmp_path, aggregation_strategy=strategy)(TEXTS)
    assert any(found)
    _same(found, expected)
