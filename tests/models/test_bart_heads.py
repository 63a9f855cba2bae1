"""BART as a classifier and for questions, against transformers: padded, packed, and in the pipelines with RoBERTa's frame of a pair."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate
from foveate.models import load_model
from foveate.models.sequences import PackedSequences
from model_cases import assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (7, 11, 4)
PAD, EOS = 1, 2
KINDS = {
    "Bart": {"decoder_start_token_id": EOS},
    "MBart": {"scale_embedding": True},  # whose decoder begins with the last token of the text
    "PLBart": {},
}


def theirs(kind: str, head: str, **options: Any) -> Any:
    sizes = {
        "vocab_size": 60, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40, "max_position_embeddings": 90, "pad_token_id": PAD,
        "eos_token_id": EOS, "bos_token_id": 0, "num_labels": 3,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}{head}")(
        getattr(transformers, f"{kind}Config")(**sizes | KINDS[kind] | options)
    )
    randomize(model)
    return model.eval()


def texts(kind: str) -> list[torch.Tensor]:
    """Each ends with EOS; mBART's with their language behind it."""
    rows = [torch.randint(4, 60, (length,)) for length in LENGTHS]
    for row in rows:
        row[-2 if kind == "MBart" else -1] = EOS
    rows[1][3] = EOS if kind != "MBart" else rows[1][3]
    rows[0][1] = rows[2][1] = EOS if kind != "MBart" else 5  # transformers wants as many of them in each row
    return rows


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForQuestionAnswering"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_padded_and_packed(kind: str, head: str, tmp_path: Path) -> None:
    if not hasattr(transformers, f"{kind}{head}"):
        pytest.skip("transformers has no such class")
    model = theirs(kind, head)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    rows = texts(kind)
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask, lengths = tokens != PAD, torch.tensor(LENGTHS, dtype=torch.int32)
    given = [
        (tokens, {"attention_mask": mask}),
        (tokens, {"kv_lens": lengths}),
        (torch.cat(rows)[None], {"packed": PackedSequences.of(LENGTHS)}),
    ]
    with torch.no_grad():
        out = model(tokens, attention_mask=mask.long())
        for row, options in given:
            found = ours(row, **options)
            if head == "ForSequenceClassification":
                assert_logits_close(found, out.logits)
                continue
            for logits, expected in zip(found, (out.start_logits, out.end_logits)):
                assert_logits_close(logits[0] if "packed" in options else logits[mask], expected[mask])


def test_gradients(tmp_path: Path) -> None:
    model = theirs("Bart", "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path).requires_grad_()
    rows = texts("Bart")
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    weights = torch.randn(3, 3)
    (model(tokens, attention_mask=(tokens != PAD).long()).logits * weights).sum().backward()
    (ours(torch.cat(rows)[None], packed=PackedSequences.of(LENGTHS)) * weights).sum().backward()
    found = dict(ours.named_parameters())
    for name, p in model.named_parameters():
        grad = found[name].grad
        assert grad is not None and p.grad is not None, name
        assert (grad - p.grad).abs().max() < 1e-4 * p.grad.abs().max() + 1e-6, name


def test_refusals(tmp_path: Path) -> None:
    theirs("Bart", "ForSequenceClassification").save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    with pytest.raises(ValueError, match="2 of 3 texts have no token 2, the eos_token_id"):
        ours(torch.tensor([[5, 6, 7, 2, 8, 9]]), packed=PackedSequences.of((2, 2, 2)))
    with pytest.raises(ValueError, match="1 of 2 texts have no token 2"):
        ours(torch.tensor([[5, 2], [5, 6]]))
    with pytest.raises(
        ValueError, match="the checkpoint is a BartForSequenceClassification, whose head is not 'question-answering'"
    ):
        load_model(tmp_path, head="question-answering")
    with pytest.raises(ValueError, match="packed sequences have no padding"):
        ours(torch.tensor([[5, 2]]), attention_mask=torch.ones(1, 2), packed=PackedSequences.of((2,)))
    theirs("Bart", "ForConditionalGeneration").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="that have it; this bart is a BartForConditionalGeneration"):
        load_model(tmp_path, head="sequence-classification")


def byte_level() -> Any:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["ada lives in paris", "bob in rome"] * 3, trainer)
    backend.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", cls_token="<s>",
        sep_token="</s>", mask_token="<mask>", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def test_zero_shot_classification(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    model = theirs(
        "Bart",
        "ForSequenceClassification",
        vocab_size=len(tokenizer),
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )
    model.save_pretrained(tmp_path)
    ask = transformers.pipeline("zero-shot-classification", model=model, tokenizer=tokenizer, device="cpu")
    found = foveate.ZeroShotClassifier(tmp_path)
    for multi_label in (False, True):
        expected = ask("Ada lives in Paris.", ["travel", "a house", "bob"], multi_label=multi_label)
        answer = found("Ada lives in Paris.", ["travel", "a house", "bob"], multi_label=multi_label)
        assert answer["labels"] == expected["labels"]
        assert answer["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    classify = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    assert foveate.TextClassifier(tmp_path)("bob in rome")["label"] == classify("bob in rome")[0]["label"]
    with pytest.raises(TypeError, match="Text2Text takes .* got BartForSequenceClassification"):
        foveate.Text2Text(tmp_path)


@pytest.mark.parametrize("kind", ["Bart", "Roberta"])
def test_answers_between_two_separators(kind: str, tmp_path: Path) -> None:
    """The best span of the logits over transformers' own encoding of the pair."""
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    if kind == "Bart":
        model = theirs(kind, "ForQuestionAnswering", vocab_size=len(tokenizer))
    else:
        config = transformers.RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=90, type_vocab_size=1, pad_token_id=PAD,
        )  # fmt: skip
        model = transformers.RobertaForQuestionAnswering(config).eval()
        randomize(model)
    model.save_pretrained(tmp_path)
    question, context = "who lives?", "Ada lives in Paris, bob in rome."
    pair = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    inside = torch.tensor([i for i, text in enumerate(pair.sequence_ids(0)) if text == 1])
    with torch.no_grad():
        out = model(pair.input_ids)
    wanted = torch.cat([torch.tensor([0]), inside])
    start, end = (x[0, wanted].softmax(0)[1:] for x in (out.start_logits, out.end_logits))
    scores = (start[:, None] * end).triu().tril(14)
    first, last = divmod(int(scores.argmax()), len(inside))
    offsets = pair.offset_mapping[0][inside]
    found = foveate.QuestionAnswerer(tmp_path)(question, context, align_to_words=False)
    expected = context[int(offsets[first, 0]) : int(offsets[last, 1])]
    assert found["answer"] == expected and found["score"] >= float(scores.max()) - 1e-4
