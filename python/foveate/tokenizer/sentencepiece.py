"""Tokenizers of folders that have SentencePiece models and no tokenizer.json: Marian, M2M-100, mBART, PEGASUS, T5.

Texts are cut by the sentencepiece library itself; the ids are those of the family, which are not the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, is_there, library_errors, read_json
from foveate.tokenizer import NEED

_SPACE = "\u2581"
_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")  # the first ids of mBART
_MBART_LANGUAGES = (
    "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX ro_RO ru_RU si_LK "
    "tr_TR vi_VN zh_CN"
).split()
_MBART50_LANGUAGES = (
    "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN th_TH tl_XX "
    "uk_UA ur_PK xh_ZA gl_ES sl_SI"
).split()
_M2M_LANGUAGES = (
    "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu "
    "hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt "
    "ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu"
).split()
_WMT21_LANGUAGES = "en ha is ja cs ru zh de".split()


@dataclass(frozen=True)
class AddedToken:
    """As the tokenizers library's."""

    content: str
    special: bool = True


@dataclass(frozen=True)
class Encoding:
    ids: list[int]

    @property
    def type_ids(self) -> list[int]:
        return [0] * len(self.ids)


class SentencePieceBackend:
    """What `Tokenizer` needs of a tokenizers.Tokenizer, by a SentencePiece model.

    vocab: pieces and other tokens -> ids; special: those that are not text, also where a text has them; after: tokens that end a text.
    reading: the model that cuts texts; writing: the one that joins pieces, if it is another.
    """

    def __init__(
        self, reading: Any, vocab: Mapping[str, int], special: Iterable[str], after: Sequence[str] = (), *, writing: Any = None,
        unknown: str = "<unk>", vocab_written: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        if unknown not in vocab:
            raise CheckpointError(f"the vocabulary has no {unknown}, the token for what it does not know")
        self._reading, self._writing = reading, writing or reading
        self._vocab = dict(vocab)
        self._pieces = {token: text for text, token in (vocab_written or vocab).items()}
        self._added = {vocab[text]: AddedToken(text) for text in special if text in vocab}
        self._after, self._unknown = [vocab[text] for text in after], vocab[unknown]
        self._pattern: re.Pattern[str] | None = None
        self.decoder, self.post_processor, self.normalizer = None, None, None

    def no_padding(self) -> None:
        pass

    def no_truncation(self) -> None:
        pass

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoding:
        ids: list[int] = []
        known = {entry.content: token for token, entry in self._added.items()}
        if self._pattern is None:
            texts = sorted(known, key=len, reverse=True)
            self._pattern = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else re.compile("(?!)()")
        for part in self._pattern.split(text):
            if part in known:
                ids.append(known[part])
            elif part:
                ids += [self._vocab.get(piece, self._unknown) for piece in self._reading.encode(part, out_type=str)]
        return Encoding(ids + (self._after if add_special_tokens else []))

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[Encoding]:
        return [self.encode(text, add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        parts: list[str] = []
        pieces: list[str] = []
        for token in ids:
            if token not in self._added:
                pieces += [self._pieces[token]] if token in self._pieces else []
            elif not skip_special_tokens:
                parts += [self._joined(pieces), self._added[token].content]
                pieces = []
        return " ".join(part for part in [*parts, self._joined(pieces)] if part)

    def _joined(self, pieces: list[str]) -> str:
        return self._writing.decode_pieces(pieces).replace(_SPACE, " ").strip() if pieces else ""

    def token_to_id(self, text: str) -> int | None:
        return self._vocab.get(text)

    def id_to_token(self, token: int) -> str | None:
        return self._added[token].content if token in self._added else self._pieces.get(token)

    def get_vocab(self, with_added_tokens: bool = True) -> dict[str, int]:
        if with_added_tokens:
            return dict(self._vocab)
        return {text: token for text, token in self._vocab.items() if token not in self._added}

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return max(self._vocab.values()) + 1

    def get_added_tokens_decoder(self) -> dict[int, AddedToken]:
        return dict(self._added)

    def add_tokens(self, tokens: Sequence[Any]) -> int:
        """Those that are new get the next ids; all are taken out of a text whole from now on."""
        before = len(self._vocab)
        for token in tokens:
            content = token if isinstance(token, str) else token.content
            number = self._vocab.setdefault(content, self.get_vocab_size())
            self._pieces.setdefault(number, content)
            self._added[number] = AddedToken(content, special=getattr(token, "special", True))
        self._pattern = None
        return len(self._vocab) - before

    add_special_tokens = add_tokens

    def save(self, path: str) -> None:
        raise ValueError(
            f"a tokenizer of SentencePiece models cannot be written as {path}; write a tokenizer.json once, by transformers' "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), or copy the folder's own files"
        )


def read_sentencepiece(folder: Path, model_type: str | None, config: Mapping[str, Any]) -> SentencePieceBackend | None:
    """None for a folder without such files. config: tokenizer_config.json. CheckpointError for files that do not belong together."""
    kind = str(config.get("tokenizer_class") or _CLASSES.get(model_type or "", "")).removesuffix("Fast")
    if kind not in _READERS:
        return None
    models = [name for name in _MODELS if is_there(folder / name)]
    if not models:
        return None
    with library_errors(f"{folder} has {' and '.join(models)}, which make no tokenizer"):
        return _READERS[kind](folder, config)


_MODELS = ("source.spm", "target.spm", "sentencepiece.bpe.model", "spiece.model")
_CLASSES = {
    "marian": "MarianTokenizer", "m2m_100": "M2M100Tokenizer", "mbart": "MBartTokenizer", "pegasus": "PegasusTokenizer",
    "t5": "T5Tokenizer", "mt5": "T5Tokenizer", "umt5": "T5Tokenizer", "longt5": "T5Tokenizer",
}  # fmt: skip


def _model(file: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise ImportError(f"sentencepiece {NEED}") from error
    if not is_there(file):
        raise CheckpointError(f"{file} is not there; download it too")
    return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())


def _vocab(file: Path) -> dict[str, int]:
    if not is_there(file):
        raise CheckpointError(f"{file} is not there; download it too")
    vocab = read_json(file)
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in vocab.values()):
        raise CheckpointError(f"{file} must be an object of tokens and their ids")
    return vocab


def _pieces(model: Any) -> list[str]:
    return [model.id_to_piece(i) for i in range(model.get_piece_size())]


def _marian(folder: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    vocab = _vocab(folder / "vocab.json")
    written = _vocab(folder / "target_vocab.json") if config.get("separate_vocabs") else None
    languages = [text for text in vocab if re.fullmatch(">>.+<<", text)]
    return SentencePieceBackend(
        _model(folder / "source.spm"), vocab, ["</s>", "<unk>", "<pad>", *languages], ["</s>"],
        writing=_model(folder / "target.spm") if written is not None else None, vocab_written=written,
    )  # fmt: skip


def _m2m(folder: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    vocab = _vocab(folder / "vocab.json")
    codes = _WMT21_LANGUAGES if config.get("language_codes") == "wmt21" else _M2M_LANGUAGES
    first = len(vocab)
    vocab |= {f"__{code}__": first + i for i, code in enumerate(codes)}
    special = [*_FAIRSEQ, *(f"__{code}__" for code in codes)]
    return SentencePieceBackend(_model(folder / "sentencepiece.bpe.model"), vocab, special, ["</s>"])


def _mbart(languages: Sequence[str], folder: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    model = _model(folder / "sentencepiece.bpe.model")
    texts = [*_FAIRSEQ, *_pieces(model)[3:], *languages, "<mask>"]
    vocab = {text: i for i, text in enumerate(texts)}
    return SentencePieceBackend(model, vocab, [*_FAIRSEQ, *languages, "<mask>"], ["</s>"])


def _pegasus(folder: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    """103 ids of padding, end, masks and tokens of pre-training come before SentencePiece's, which begin with <unk>."""
    model = _model(folder / "spiece.model")
    special = ["<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103))]
    ids = {text: i for i, text in enumerate(special)}
    own = _pieces(model)
    offset = config.get("offset", 103)
    ids |= {text: i + offset for i, text in enumerate(own) if i >= 2 and text not in ids}
    return SentencePieceBackend(model, ids, [*special, "<unk>"], ["</s>"])


def _t5(folder: Path, config: Mapping[str, Any]) -> SentencePieceBackend:
    """The sentinels <extra_id_99> .. <extra_id_0> follow the pieces, unless they are among them."""
    model = _model(folder / "spiece.model")
    vocab = {text: i for i, text in enumerate(_pieces(model))}
    count = config.get("extra_ids", 100)
    for i in range(count if isinstance(count, int) else 100)[::-1]:
        vocab.setdefault(f"<extra_id_{i}>", len(vocab))
    special = [text for text in vocab if text in ("<pad>", "</s>", "<unk>") or text.startswith("<extra_id_")]
    return SentencePieceBackend(model, vocab, special, ["</s>"])


_READERS: dict[str, Any] = {
    "MarianTokenizer": _marian, "M2M100Tokenizer": _m2m, "PegasusTokenizer": _pegasus, "T5Tokenizer": _t5, "MT5Tokenizer": _t5,
    "MBartTokenizer": lambda folder, config: _mbart(_MBART_LANGUAGES, folder, config),
    "MBart50Tokenizer": lambda folder, config: _mbart([*_MBART_LANGUAGES, *_MBART50_LANGUAGES], folder, config),
}  # fmt: skip
