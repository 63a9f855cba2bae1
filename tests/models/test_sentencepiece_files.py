"""Tokenizers from SentencePiece's files alone: ids and texts as transformers has them, for each family's order of ids."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest

from foveate.models import open_checkpoint
from foveate.pipelines.languages import find_languages
from model_cases import MULTILINGUAL

sentencepiece = pytest.importorskip("sentencepiece")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

TEXTS = [
    "Hello world, hello house!",
    "Das Haus ist klein.",
    "",
    "  two   spaces ",
    "neu: 12345 \u4f60\u597d",
    MULTILINGUAL.replace("\x00", ""),
]


def train(file: Path, kind: str = "unigram", seed: int = 0, **options: Any) -> None:
    """A model of a few words; control tokens in SentencePiece's usual places unless options say otherwise."""
    lines = [
        "hello world house " * 3,
        "das haus ist klein " * 3,
        "neu alt 12345 67890",
        "abcdefghijklmnopqrstuvwxyz .,:!",
    ][seed:]
    model = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines * 5), model_writer=model, vocab_size=60, model_type=kind, hard_vocab_limit=False,
            minloglevel=2, **options,
        )  # fmt: skip
    file.write_bytes(model.getvalue())


def folder_of(folder: Path, kind: str, model_type: str, **settings: Any) -> Any:
    """The tokenizer of the folder."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": kind, "eos_token": "</s>", **settings})
    )
    return open_checkpoint(folder).tokenizer()


def marian(folder: Path, target: bool = False) -> Any:
    train(folder / "source.spm")
    train(folder / "target.spm", seed=1)
    pieces = []
    for name in ("source.spm", "target.spm"):
        model = sentencepiece.SentencePieceProcessor(model_proto=(folder / name).read_bytes())
        pieces += [model.id_to_piece(i) for i in range(3, model.get_piece_size())]
    tokens = ["</s>", "<unk>", *sorted(set(pieces))[1:], ">>deu<<", ">>fra<<", "<pad>"]  # one piece is not known
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    return folder_of(folder, "MarianTokenizer", "marian", unk_token="<unk>", pad_token="<pad>")


def test_marian(tmp_path: Path) -> None:
    ours = marian(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
    theirs.punc_normalizer = lambda text: text
    for text in [*TEXTS, ">>deu<< hello world"]:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids, text
        first = text.startswith(">>")  # which transformers takes for text
        assert ours.decode(ids) == theirs.decode(ids[first:], skip_special_tokens=True)
    languages = find_languages("marian", ours, {"tokenizer_class": "MarianTokenizer"})
    assert languages is not None and languages.codes == ["deu", "fra"]
    assert languages.source("hello world", None, "fra") == ours.encode(">>fra<< hello world")
    assert pickle.loads(pickle.dumps(ours)).encode("hello") == ours.encode("hello")
    with pytest.raises(ValueError, match="cannot be written as .*; write a tokenizer.json once"):
        ours.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "source.spm").write_bytes(b"no model")
    with pytest.raises(ValueError, match="source.spm and target.spm, which make no tokenizer"):
        open_checkpoint(tmp_path).tokenizer()
    (tmp_path / "vocab.json").unlink()
    with pytest.raises(ValueError, match="vocab.json is not there; download it too"):
        open_checkpoint(tmp_path).tokenizer()


def test_m2m100(tmp_path: Path) -> None:
    train(tmp_path / "sentencepiece.bpe.model", "bpe")
    model = sentencepiece.SentencePieceProcessor(model_proto=(tmp_path / "sentencepiece.bpe.model").read_bytes())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(model.id_to_piece(i) for i in range(3, model.get_piece_size()))]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    ours = folder_of(tmp_path, "M2M100Tokenizer", "m2m_100")
    theirs = transformers.M2M100Tokenizer.from_pretrained(tmp_path, src_lang="fr")
    languages = find_languages("m2m_100", ours, {"tokenizer_class": "M2M100Tokenizer"})
    assert languages is not None and len(languages.codes) == 100
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert languages.source(text, "fr", "de") == ids, text
        assert ours.decode(ids).strip() == theirs.decode(ids[1:], skip_special_tokens=True)
    assert languages.target("de") == {"forced_bos_token_id": theirs.get_lang_id("de")}


@pytest.mark.parametrize("kind, model_type, file", [
    ("MBartTokenizer", "mbart", "sentencepiece.bpe.model"), ("MBart50Tokenizer", "mbart", "sentencepiece.bpe.model"),
    ("PegasusTokenizer", "pegasus", "spiece.model"), ("T5Tokenizer", "t5", "spiece.model"),
])  # fmt: skip
def test_ids_in_the_order_of_the_family(kind: str, model_type: str, file: str, tmp_path: Path) -> None:
    """Pieces of a plain text have the ids that the family's published files give them."""
    own = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} if file == "spiece.model" else {}
    train(tmp_path / file, **own)
    ours = folder_of(tmp_path, kind, model_type)
    model = sentencepiece.SentencePieceProcessor(model_proto=(tmp_path / file).read_bytes())
    offset = {"mbart": 1, "pegasus": 103, "t5": 0}[model_type]
    for text in TEXTS:
        ids = [3 if model_type == "mbart" and i == 0 else i + offset for i in model.encode(text)]
        assert ours.encode(text) == [*ids, ours.backend.token_to_id("</s>")], text
        known = [i for i in model.encode(text) if not model.is_unknown(i)]
        assert ours.decode([i + offset for i in known]) == model.decode(known).strip()
    size = model.get_piece_size()
    last, special = {
        "MBartTokenizer": (size + 1 + 25, "<mask>"), "MBart50Tokenizer": (size + 1 + 52, "<mask>"),
        "PegasusTokenizer": (size + 103 - 1, "<mask_2>"), "T5Tokenizer": (size + 100 - 1, "<extra_id_0>"),
    }[kind]  # fmt: skip
    assert ours.vocab_size == last + 1
    number = ours.backend.token_to_id(special)
    assert (
        number == (3 if kind == "PegasusTokenizer" else last)
        and ours.encode(f"hello {special} world").count(number) == 1
    )
