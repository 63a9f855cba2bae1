"""Translator and Summarizer: Text2Text for documents of any length, and as summaries are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from torch import nn

from foveate.models import Checkpoint
from foveate.models.t5 import T5
from foveate.pipelines.encoder import as_texts
from foveate.pipelines.sentences import divided
from foveate.pipelines.text2text import Text2Text
from foveate.pipelines.text2text_params import default_params
from foveate.tokenizer import Tokenizer

_SPACELESS = ("zh", "ja", "zho", "jpn", "yue", "th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bod")
_LONGEST = 512  # tokens of a sentence for a model whose positions have no end


class Translator:
    """Translates texts of any length: line by line, sentence by sentence, as translation models are trained.

        translate = Translator("path to an NLLB", "eng_Latn", "deu_Latn")
        translate("The house is small. It is old.")

    path_or_model, tokenizer, options: see Text2Text. source_language, target_language: the model's own codes
    (`Text2Text.languages`), or the beginning of one, such as "de" of "de_DE"; not needed by a model of one pair. T5 takes the
    languages' names, or en, de, fr and ro.
    """

    def __init__(
        self,
        path_or_model: str | Path | Checkpoint | nn.Module,
        source_language: str | None = None,
        target_language: str | None = None,
        tokenizer: Tokenizer | None = None,
        **options: Any,
    ) -> None:
        self.text2text = Text2Text(
            path_or_model, tokenizer, source_language=source_language, target_language=target_language, **options
        )

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text2text.tokenizer

    @overload
    def __call__(self, text: str, *, whole: bool = False, batch_size: int = 8, **options: Any) -> str: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(
        self, text: Sequence[str], *, whole: bool = False, batch_size: int = 8, **options: Any
    ) -> list[str]: ...
    def __call__(
        self, text: str | Sequence[str], *, whole: bool = False, batch_size: int = 8, **options: Any
    ) -> str | list[str]:
        """The translation of a text, a str, or of each of a list, list[str].

        Lines stay lines, and empty ones empty; a sentence that is too long for the model is cut between words. whole: each text is
        read at once instead, and one that is too long is a ValueError. options: the fields of Text2TextParams, of which
        num_return_sequences stays 1.
        """
        if options.get("num_return_sequences", self.text2text.default_params.num_return_sequences) != 1:
            raise ValueError("a translation is joined of sentences, each written once; num_return_sequences must be 1")
        texts = as_texts(text)
        if whole:
            found = self.text2text(texts, batch_size=batch_size, **options)
            return found[0] if isinstance(text, str) else found
        languages = {name: value for name, value in options.items() if name in ("source_language", "target_language")}
        longest = self.text2text.max_source_tokens or _LONGEST
        lines = [
            [divided(line, lambda part: self._fits(part, longest, languages)) for line in t.split("\n")] for t in texts
        ]
        parts = [part for document in lines for line in document for part in line]
        written = iter(self._written(parts, batch_size, options))
        target = options.get("target_language", self.text2text.default_params.target_language) or ""
        between = "" if target.replace("__", "").split("_")[0] in _SPACELESS else " "
        outputs = ["\n".join(between.join(next(written) for _ in line) for line in document) for document in lines]
        return outputs[0] if isinstance(text, str) else outputs

    def _fits(self, part: str, longest: int, languages: Mapping[str, Any]) -> bool:
        return self.text2text.count(part, **languages) <= longest

    def _written(self, parts: list[str], batch_size: int, options: Mapping[str, Any]) -> list[str]:
        """Each part once, those of like length together."""
        once = sorted(dict.fromkeys(parts), key=len)
        found = dict(zip(once, self.text2text(once, batch_size=batch_size, **options)))
        return [found[part] for part in parts]


class Summarizer:
    """Summaries of texts, by the settings that the checkpoint has for them.

        summarize = Summarizer("path to a BART fine-tuned on news")
        summarize(article, max_new_tokens=60)

    A T5 is asked by the words before its texts, "summarize: " unless its config has others. path_or_model, tokenizer, options: see
    Text2Text.
    """

    def __init__(
        self, path_or_model: str | Path | Checkpoint | nn.Module, tokenizer: Tokenizer | None = None, **options: Any
    ) -> None:
        self.text2text = Text2Text(path_or_model, tokenizer, **options)
        task = self.text2text.task_params.get("summarization")
        task = task if isinstance(task, Mapping) else {}
        prefix = task.get("prefix")
        asked = "summarize: " if isinstance(self.text2text.model, T5) else ""
        self.prefix = prefix if isinstance(prefix, str) else asked
        if task and self.text2text.default_params == type(self.text2text.default_params)():
            self.text2text.default_params = default_params(dict(task), self.text2text.max_source_tokens)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.text2text.tokenizer

    @overload
    def __call__(self, text: str, *, truncate: bool = False, batch_size: int = 4, **options: Any) -> str: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(
        self, text: Sequence[str], *, truncate: bool = False, batch_size: int = 4, **options: Any
    ) -> list[str]: ...
    def __call__(
        self, text: str | Sequence[str], *, truncate: bool = False, batch_size: int = 4, **options: Any
    ) -> str | list[str]:
        """The summary of a text, a str, or of each of a list, list[str].

        options: the fields of Text2TextParams, such as min_new_tokens, max_new_tokens, num_beams and no_repeat_ngram_size. truncate:
        only the beginning of a text that is longer than the model's positions is read; else it is a ValueError.
        """
        texts = as_texts(text)
        found = self.text2text([self.prefix + t for t in texts], batch_size=batch_size, truncate=truncate, **options)
        return found[0] if isinstance(text, str) else found
