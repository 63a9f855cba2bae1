"""Unigram tokenizers of the tokenizers library, built from a SentencePiece model's pieces (Kudo 2018, arXiv 1804.10959)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, is_there

CONTROL, _UNKNOWN, _USER_DEFINED = 3, 2, 4  # types of a piece
_NORMAL = 1
_UNIGRAM = 1  # trainer_spec.model_type


@dataclass
class Pieces:
    """What a SentencePiece model says: texts, log probabilities and types of its pieces, and how texts are changed before they are cut.

    characters: the compiled table by which its normalizer replaces characters, b"" for none.
    """

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    characters: bytes = b""
    unigram: bool = True

    @property
    def unknown(self) -> int | None:
        return next((i for i, kind in enumerate(self.types) if kind == _UNKNOWN), None)


def unigram(pieces: Pieces) -> Any:
    """A tokenizers.Tokenizer without normalizer and post-processor; control pieces are special, user-defined ones taken out whole."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram(list(zip(pieces.texts, pieces.scores)), unk_id=pieces.unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    for text, kind in zip(pieces.texts, pieces.types):
        if kind in (CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL)])
    return tokenizer


def read_deberta(folder: Path, config: Mapping[str, Any]) -> Any:
    """A tokenizers.Tokenizer of the folder's spm.model, as transformers converts it. config: tokenizer_config.json."""
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    pieces = read_pieces(folder / "spm.model")
    absent = [token for token in ("[CLS]", "[SEP]") if token not in pieces.texts]
    if absent or not pieces.unigram:
        what = f"lacks {' and '.join(absent)}" if absent else "is no unigram model"
        raise CheckpointError(f"{folder / 'spm.model'} {what}, so it is not a vocabulary of DeBERTa")
    tokenizer = unigram(pieces)
    steps: list[Any] = [normalizers.Lowercase()] if config.get("do_lower_case") else []
    steps += [normalizers.Strip()]
    steps += [normalizers.Precompiled(pieces.characters)] if pieces.characters else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(Regex(" {2,}"), " ")])
    if config.get("split_by_punct"):
        cut = [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cut)
    special = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    tokenizer.add_special_tokens([token for token in special if token in pieces.texts or token == "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def read_pieces(file: Path) -> Pieces:
    """The pieces of a SentencePiece model's file, a protobuf message. CheckpointError for one that is damaged."""
    if not is_there(file):
        raise CheckpointError(f"{file} is not there; download it too")
    found = Pieces()
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                _add_piece(found, dict(_fields(_bytes(value))))
            elif number == 2:
                found.unigram = dict(_fields(_bytes(value))).get(3, _UNIGRAM) == _UNIGRAM
            elif number == 3:
                found.characters = _bytes(dict(_fields(_bytes(value))).get(2, b""))
    except (ValueError, TypeError, IndexError, struct.error) as error:
        raise CheckpointError(f"{file} is truncated or no SentencePiece model; download it again") from error
    if not found.texts or found.unknown is None:
        raise CheckpointError(f"{file} has no pieces, or none for what it does not know; download it again")
    return found


def _add_piece(found: Pieces, piece: Mapping[int, Any]) -> None:
    found.texts.append(_bytes(piece.get(1, b"")).decode())
    found.scores.append(struct.unpack("<f", _bytes(piece[2]))[0] if 2 in piece else 0.0)
    found.types.append(int(piece.get(3, _NORMAL)))


def _bytes(value: Any) -> bytes:
    """bytes(number) would be as many zeros."""
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes belong")
    return value


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The number and value of each field of a protobuf message: int for varints, bytes for the others. ValueError for a damaged one."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(message, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise ValueError("truncated")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at byte `at`, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 10 bytes")
