"""foveate.SamplingParams: what a request asks of generation, with the names and defaults of vLLM."""

from __future__ import annotations

import json
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_INFINITY = float("inf")


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of a request are chosen and where it ends. Raises ValueError or TypeError, in a sentence, when it is made.

    n: samples returned for the prompt; best_of: samples drawn, of which those n with the highest sum of log-probabilities return.
    The logits of each token go through these in order: repetition_penalty r (of tokens in prompt or output: logit / r if positive,
    * r if negative), frequency_penalty (subtracted times the count in the output), presence_penalty (subtracted once if it is in the
    output), logit_bias {token id: -100..100} (added), bad_words (strings that must not come), min_tokens (no end before), the grammar;
    temperature (0 = greedy, what follows is ignored); min_p (keeps probability >= min_p * the highest), top_k (the k most probable;
    0 or -1 = all), top_p (the fewest that together reach top_p). Tokens that tie with the last one kept are kept.

    seed: an int makes the request reproducible, alone or in any batch; None draws one from torch's default generator.

    The end: a token of the model's end-of-sequence ids (unless ignore_eos) or of stop_token_ids, a string of `stop` in the output
    (which the text then leaves out, unless include_stop_str_in_output), max_tokens, or the model's context.
    max_tokens None: no limit of its own. min_tokens: before that many, none of the former ends it.

    logprobs: for each token its log-probability (log_softmax of the raw logits) and those of the `logprobs` most probable ones; 0: only
    its own; -1: all. prompt_logprobs: the same for the prompt's tokens. skip_special_tokens: leaves special tokens out of the text.

    num_beams > 1: beam search (foveate.generation.beam) that returns the n best, with length_penalty and early_stopping.
    json_schema (dict, or JSON text) or regex: the output matches it, if it does not end by length.
    prompt_lookup: tokens guessed at a time from repetitions of the text so far (Saxena 2023); changes the speed, never the tokens.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    prompt_lookup: int = 0

    def __post_init__(self) -> None:
        for name, (kind, low, high) in _NUMBERS.items():
            self._check_number(name, kind, low, high)
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        self._check_lists()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens")
        if not 1e-6 <= self.repetition_penalty <= 1e6:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0, between 1e-06 and 1e+06; 1 changes nothing"
            )
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"best_of={self.best_of} must be at least n={self.n}: the n best of best_of samples return"
            )
        if self.best_of not in (None, self.n) and self.temperature == 0:
            raise ValueError(f"best_of={self.best_of} with temperature=0 draws the same sample each time; use n=1")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping={self.early_stopping!r} must be True, False or "never"')
        if self.num_beams > 1:
            self._check_beams()
        if self.json_schema is not None or self.regex is not None:
            self._check_grammar()

    def _check_number(self, name: str, kind: type, low: float, high: float) -> None:
        """Numbers of numpy too, which become Python's."""
        value: Any = getattr(self, name)
        whole = kind is numbers.Integral
        if value is None and name in _MAY_BE_NONE:
            return
        known: Any = kind
        if not isinstance(value, known) or isinstance(value, bool):
            wanted = "an int" if whole else "a number"
            raise TypeError(f"{name}={value!r} must be {wanted}, not {type(value).__name__}")
        if not low <= value <= high:
            limits = f"{low} or more" if high == _INFINITY else f"between {low} and {high}"
            raise ValueError(f"{name}={value} must be {limits}")
        if type(value) not in (int, float):  # numpy's
            object.__setattr__(self, name, int(value) if whole else float(value))

    def _check_lists(self) -> None:
        if self.stop is not None and not _strings([self.stop] if isinstance(self.stop, str) else self.stop):
            raise ValueError(f"stop={self.stop!r} must be a string or a list of strings, none of them empty")
        if self.bad_words is not None and not _strings(self.bad_words):
            raise ValueError(f"bad_words={self.bad_words!r} must be a list of strings, none of them empty")
        ids = self.stop_token_ids
        if ids is not None and not (_is_list(ids) and all(_is_id(token) for token in ids)):
            raise TypeError(f"stop_token_ids={ids!r} must be a list of token ids (int)")
        bias = self.logit_bias
        if bias is not None and not isinstance(bias, Mapping):
            raise TypeError(f"logit_bias={bias!r} must be a dict of token ids and numbers")
        for token, value in (bias or {}).items():
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not _is_id(token) or not number or not -100 <= value <= 100:
                raise ValueError(
                    f"logit_bias has {token!r}: {value!r}; it must be a token id with a number from -100 to 100"
                )
        if self.regex is not None and not isinstance(self.regex, str):
            raise TypeError(f"regex={self.regex!r} must be a str")

    def _check_beams(self) -> None:
        if self.n > self.num_beams:
            raise ValueError(f"n={self.n} must be at most num_beams={self.num_beams}: the n best beams return")
        if self.temperature not in (0.0, 1.0):
            raise ValueError(
                f"temperature={self.temperature} has no meaning with num_beams={self.num_beams}; leave it at 1"
            )
        self._refuse(
            _NOT_WITH_BEAMS,
            f"num_beams={self.num_beams}: beam search ranks whole sequences by their raw log-probabilities",
        )

    def _check_grammar(self) -> None:
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex are both given; the output can follow only one of them")
        which = "json_schema" if self.regex is None else "regex"
        self._refuse(_NOT_WITH_GRAMMAR, f"{which}, which alone decides what may come and where it ends")
        if isinstance(self.json_schema, str):
            try:
                json.loads(self.json_schema)
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
                raise ValueError(f"json_schema is not valid JSON: {reason}") from None
        elif not isinstance(self.json_schema, dict | None):
            raise TypeError(f"json_schema must be a dict or JSON text, not {type(self.json_schema).__name__}")

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(SamplingParams, name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be combined with {reason}")

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def samples(self) -> int:
        """How many sequences are drawn."""
        return self.best_of or self.n

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with these fields changed, checked again."""
        return replace(self, **changes)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_id(token: Any) -> bool:
    return isinstance(token, numbers.Integral) and not isinstance(token, bool)


def _strings(values: Any) -> bool:
    return _is_list(values) and all(isinstance(text, str) and text for text in values)


# For each number, its type, the lowest and the highest value.
_NUMBERS: dict[str, tuple[type, float, float]] = {
    "n": (numbers.Integral, 1, _INFINITY), "best_of": (numbers.Integral, 1, _INFINITY), "seed": (numbers.Integral, 0, 2**64 - 1),
    "presence_penalty": (numbers.Real, -2, 2), "frequency_penalty": (numbers.Real, -2, 2),
    "repetition_penalty": (numbers.Real, -_INFINITY, _INFINITY), "temperature": (numbers.Real, 0, 1e6),
    "top_p": (numbers.Real, -_INFINITY, _INFINITY), "top_k": (numbers.Integral, -1, _INFINITY), "min_p": (numbers.Real, 0, 1),
    "max_tokens": (numbers.Integral, 1, _INFINITY), "min_tokens": (numbers.Integral, 0, _INFINITY),
    "logprobs": (numbers.Integral, -1, _INFINITY), "prompt_logprobs": (numbers.Integral, -1, _INFINITY),
    "num_beams": (numbers.Integral, 1, _INFINITY), "length_penalty": (numbers.Real, -100, 100),
    "prompt_lookup": (numbers.Integral, 0, 64),
}  # fmt: skip
_MAY_BE_NONE = ("best_of", "seed", "max_tokens", "logprobs", "prompt_logprobs")
_FLAGS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_NOT_WITH_BEAMS = (
    "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_p", "top_k", "min_p", "seed", "stop", "bad_words",
    "logprobs", "prompt_logprobs", "logit_bias", "json_schema", "regex", "prompt_lookup", "include_stop_str_in_output",
)  # fmt: skip
_NOT_WITH_GRAMMAR = ("stop", "stop_token_ids", "bad_words", "ignore_eos", "min_tokens")
