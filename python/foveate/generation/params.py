"""foveate.SamplingParams: what a request asks of generation, with the names and defaults of vLLM."""

from __future__ import annotations

import json
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
    min_tokens: before that many, none of the former ends it.

    logprobs: for each token its log-probability (log_softmax of the raw logits) and those of the `logprobs` most probable ones; 0: only
    its own. prompt_logprobs: the same for the prompt's tokens. skip_special_tokens: leaves special tokens out of the text.

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
    max_tokens: int = 16
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
        for name in _INTEGERS:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise TypeError(f"{name}={value!r} must be an int, not {type(value).__name__}")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limits = f"{low} or more" if high == _INFINITY else f"between {low} and {high}"
                raise ValueError(f"{name}={value} must be {limits}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens")
        if not 0 < self.repetition_penalty < _INFINITY:
            raise ValueError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 changes nothing")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(
                f"best_of={self.best_of} must be at least n={self.n}: the n best of best_of samples return"
            )
        if self.best_of not in (None, self.n) and self.temperature == 0:
            raise ValueError(f"best_of={self.best_of} with temperature=0 draws the same sample each time; use n=1")
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}")
        if any(not isinstance(text, str) or not text for text in self.stop_strings):
            raise ValueError(f"stop={self.stop!r} must be a string or a list of strings, none of them empty")
        if any(not isinstance(word, str) or not word for word in self.bad_words or ()):
            raise ValueError(f"bad_words={self.bad_words!r} must be a list of strings, none of them empty")
        for token, bias in (self.logit_bias or {}).items():
            if not isinstance(token, int) or not -100 <= bias <= 100:
                raise ValueError(
                    f"logit_bias has {token!r}: {bias}; it must be a token id with a number from -100 to 100"
                )
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping={self.early_stopping!r} must be True, False or "never"')
        if self.num_beams > 1:
            self._check_beams()
        if self.json_schema is not None or self.regex is not None:
            self._check_grammar()

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
            except ValueError as error:
                raise ValueError(f"json_schema is not valid JSON: {error}") from None
        elif not isinstance(self.json_schema, dict | None):
            raise TypeError(f"json_schema must be a dict or JSON text, not {type(self.json_schema).__name__}")

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for name in names:
            if getattr(self, name) != getattr(SamplingParams, name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be combined with {reason}")

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def samples(self) -> int:
        """How many sequences are drawn."""
        return self.best_of or self.n

    def with_(self, **changes: Any) -> SamplingParams:
        """A copy with these fields changed, checked again."""
        return replace(self, **changes)


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, _INFINITY), ("best_of", 1, _INFINITY), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2),
    ("temperature", 0, 1e6), ("top_k", -1, _INFINITY), ("min_p", 0, 1), ("max_tokens", 1, _INFINITY), ("min_tokens", 0, _INFINITY),
    ("logprobs", 0, _INFINITY), ("prompt_logprobs", 0, _INFINITY), ("num_beams", 1, _INFINITY),
    ("length_penalty", -100, 100), ("prompt_lookup", 0, 64), ("seed", 0, 2**64 - 1),
)  # fmt: skip
_INTEGERS = (
    "n", "best_of", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "num_beams", "prompt_lookup",
)  # fmt: skip
_NOT_WITH_BEAMS = (
    "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "top_p", "top_k", "min_p", "seed", "stop", "bad_words",
    "logprobs", "prompt_logprobs", "logit_bias", "json_schema", "regex", "prompt_lookup", "include_stop_str_in_output",
)  # fmt: skip
_NOT_WITH_GRAMMAR = ("stop", "stop_token_ids", "bad_words", "ignore_eos", "min_tokens")
