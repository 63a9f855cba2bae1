"""How the families of translation models are told the languages of a source and of a target."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from foveate.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Style:
    """code: of the tokens of languages, the group being what users call them. before, after: what stands around a source's tokens.

    target: "first" is the id that is forced at the target's beginning, "start" what the decoder begins with, "source" a token before
    the source's.
    """

    code: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    target: str = "first"
    default: str | None = None


_AFTER = ("end", "language")
_MBART = r"([a-z]{2}_[A-Z]{2})"
_NLLB = r"([a-z]{3}_[A-Z][a-z]{3})"
# By the tokenizer's class, as transformers calls it.
STYLES: dict[str, _Style] = {
    "MBartTokenizer": _Style(_MBART, after=_AFTER, target="start", default="en_XX"),
    "MBart50Tokenizer": _Style(_MBART, before=("language",), after=("end",), default="en_XX"),
    "NllbTokenizer": _Style(_NLLB, before=("language",), after=("end",), default="eng_Latn"),
    "NllbTokenizer, legacy": _Style(_NLLB, after=_AFTER, default="eng_Latn"),
    "M2M100Tokenizer": _Style(r"__([a-z]{2,3})__", before=("language",), after=("end",), default="en"),
    "PLBartTokenizer": _Style(r"__(\w+?)__", after=_AFTER, target="start"),
    "MarianTokenizer": _Style(r">>(.+)<<", after=("end",), target="source"),
}


class Languages:
    """Those that a multilingual model knows: codes, and what a source and a target begin and end with."""

    def __init__(
        self, style: _Style, tokens: Mapping[str, int], tokenizer: Tokenizer, source: str | None = None
    ) -> None:
        """tokens: {code: id}; source: the language of texts unless one is given."""
        self.codes = sorted(tokens)
        self._style, self._tokens, self._tokenizer = style, dict(tokens), tokenizer
        self._source = source or style.default

    def find(self, language: str) -> int:
        """The id of a language by its code, or by a beginning that only one code has. ValueError for others, with the nearest codes."""
        if language in self._tokens:
            return self._tokens[language]
        beginning = [code for code in self.codes if code.lower().split("_")[0] == language.lower()]
        if len(beginning) == 1:
            return self._tokens[beginning[0]]
        near = beginning or difflib.get_close_matches(language, self.codes, n=3, cutoff=0.4)
        known = ", ".join(self.codes[:8]) + (f" and {len(self.codes) - 8} more" if len(self.codes) > 8 else "")
        nearest = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"the language {language!r} is not one of this model's {known}{nearest}")

    @property
    def needs_target(self) -> bool:
        """Whether nothing else tells the model what to write: mBART's start token may, and so may the beginning of a text for Marian."""
        return self._style.target == "first"

    def check(self, source: str | None, target: str | None) -> None:
        """ValueError for languages that the model does not have."""
        if target is not None:
            self.find(target)
        self.source("", source, target)

    def source(self, text: str, source: str | None, target: str | None) -> list[int]:
        """The ids of a text in the language `source`, for a model that is to write `target`."""
        style = self._style
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        if style.target == "source":
            if source is not None and source not in self.codes and not re.fullmatch(r"[a-z]{2,8}", source):
                raise ValueError(f"source_language={source!r} is not a language's code, such as 'en' or 'eng'")
            first = [] if target is None else [self.find(target)]
            return [*first, *ids, self._end]
        named = source or self._source
        if named is None:
            raise ValueError(
                f"this model reads several languages; name the text's by source_language={self.codes[0]!r}"
            )
        parts = {"language": self.find(named), "end": self._end}
        return [*(parts[name] for name in style.before), *ids, *(parts[name] for name in style.after)]

    def target(self, language: str) -> dict[str, Any]:
        """Fields of Text2TextParams."""
        token = self.find(language)
        names = {"first": "forced_bos_token_id", "start": "decoder_start_token_id"}
        return {names[self._style.target]: token} if self._style.target in names else {}

    @property
    def _end(self) -> int:
        text = self._tokenizer.special.get("eos_token", "</s>")
        found = self._tokenizer.backend.token_to_id(text)
        return min(self._tokenizer.eos_ids) if found is None else found


def find_languages(
    model_type: str | None, tokenizer: Tokenizer, tokenizer_config: Mapping[str, Any]
) -> Languages | None:
    """None for a model that has none, by the class of its tokenizer or, where no file names that, by its tokens."""
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    name = (tokenizer_config.get("tokenizer_class") or "").removesuffix("Fast")
    if name not in STYLES:
        name = _class_of(model_type, vocab)
    if name == "NllbTokenizer" and tokenizer_config.get("legacy_behaviour"):
        name += ", legacy"
    if name not in STYLES:
        return None
    style = STYLES[name]
    tokens = {match[1]: token for text, token in vocab.items() if (match := re.fullmatch(style.code, text))}
    return Languages(style, tokens, tokenizer, tokenizer_config.get("src_lang")) if tokens else None


def _class_of(model_type: str | None, vocab: Mapping[str, int]) -> str:
    if model_type == "m2m_100":
        return "NllbTokenizer" if "eng_Latn" in vocab else "M2M100Tokenizer"
    if model_type == "mbart":
        return "MBart50Tokenizer" if "sl_SI" in vocab else "MBartTokenizer"  # Slovene came with the second
    return {"marian": "MarianTokenizer", "plbart": "PLBartTokenizer"}.get(model_type or "", "")


# T5 is asked in English, by these names in its training; others are taken as they are.
_NAMES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian"}


def prompt(source: str | None, target: str, task_params: Mapping[str, Any]) -> str:
    """What T5 reads before a text that it is to translate. task_params: task_specific_params of its config."""
    if source is None:
        raise ValueError(f"T5 is told both languages; pass source_language= beside target_language={target!r}")
    known = task_params.get(f"translation_{source}_to_{target}")
    if isinstance(known, Mapping) and isinstance(known.get("prefix"), str):
        return known["prefix"]
    return f"translate {_NAMES.get(source, source)} to {_NAMES.get(target, target)}: "
