"""Text2TextParams: how Text2Text makes its outputs, and what a checkpoint's own settings say of it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from foveate.generation.params import SamplingParams

Ids = int | Sequence[int]


@dataclass(frozen=True)
class Text2TextParams:
    """How outputs are made; ValueError for values out of range and options that contradict each other.

    temperature 0 is greedy; above it, ids are drawn from the top_k most probable (0: all) within the nucleus top_p; seed: the same
    draws each time. num_beams > 1: beam search as in transformers' generate, with score = sum of log-probabilities /
    length ** length_penalty and early_stopping True, False or "never" (see BeamSearch). num_return_sequences: outputs for each source,
    the best beams or independent samples. min_new_tokens: no end before. repetition_penalty r: logits (of beams, log-probabilities) of
    tokens that have come are divided by r if positive and multiplied if negative. no_repeat_ngram_size: no n-gram comes twice,
    encoder_no_repeat_ngram_size: none of the source's comes; 0: off. stop: texts that end an output; they are not part of it.
    bad_words: texts that must not come, however tokens spell them; bad_words_ids: sequences of ids that must not.
    suppress_tokens: ids that never come. forced_bos_token_id: the first id, forced_eos_token_id: the last one, if max_new_tokens is
    reached; several: one of them. decoder_start_token_id: what the decoder begins with, None: as the model says.
    renormalize_logits: the beams' log-probabilities are of what these rules allow.

    source_language, target_language: of a multilingual model, by its own codes (`Text2Text.languages`). target_language decides
    forced_bos_token_id or decoder_start_token_id, or what the source begins with, as the model's family does it.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    stop: Sequence[str] = ()
    bad_words: Sequence[str] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    suppress_tokens: Sequence[int] = ()
    forced_bos_token_id: Ids | None = None
    forced_eos_token_id: Ids | None = None
    decoder_start_token_id: int | None = None
    renormalize_logits: bool = False
    source_language: str | None = None
    target_language: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
            if not all(isinstance(text, str) and text for text in getattr(self, name)):
                raise ValueError(f"{name}={value!r} must be texts, none of them empty")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be {least} or more")
        if not all(len(word) and all(isinstance(token, int) for token in word) for word in self.bad_words_ids):
            raise ValueError(f"bad_words_ids={self.bad_words_ids!r} must be lists of token ids, none of them empty")
        self.sampling()  # checks the others
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be at most max_new_tokens={self.max_new_tokens}; set both"
            )
        if self.num_beams > 1 and self.temperature != 0:
            raise ValueError(
                f"num_beams={self.num_beams} searches and temperature={self.temperature} draws; choose one of them"
            )
        most = self.num_beams if self.temperature == 0 else self.num_return_sequences
        if self.num_return_sequences > most:
            raise ValueError(
                f"num_return_sequences={self.num_return_sequences} needs as many beams, or a temperature: num_beams={self.num_beams}, "
                f"temperature={self.temperature}"
            )

    def sampling(self) -> SamplingParams:
        """What the sampler does; TokenRules has the rest."""
        return SamplingParams(
            max_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, seed=self.seed,
            repetition_penalty=self.repetition_penalty, stop=list(self.stop) or None,
            length_penalty=self.length_penalty, early_stopping=self.early_stopping,
        )  # fmt: skip

    def forced(self, name: str) -> list[int]:
        """forced_bos_token_id or forced_eos_token_id as a list."""
        value = getattr(self, name)
        return [] if value is None else [value] if isinstance(value, int) else list(value)


_LEAST = {
    "num_beams": 1, "num_return_sequences": 1, "min_new_tokens": 0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip
_DRAWING = ("temperature", "top_k", "top_p")
_OURS_ONLY = ("seed", "stop", "bad_words", "source_language", "target_language", *_DRAWING)
_LENGTHS = {"max_new_tokens": "max_length", "min_new_tokens": "min_length"}  # the older names
# What transformers' generate would do and is not done here, with the value that changes nothing.
_NOT_FOLLOWED: dict[str, Any] = {
    "num_beam_groups": 1, "diversity_penalty": 0.0, "encoder_repetition_penalty": 1.0, "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None, "sequence_bias": None, "penalty_alpha": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "min_p": None, "guidance_scale": None, "constraints": None, "force_words_ids": None,
}  # fmt: skip


def settings_names() -> list[str]:
    """Those keys of a generation_config.json, or of a config.json from before it, that `default_params` reads."""
    names = [field.name for field in dataclasses.fields(Text2TextParams) if field.name not in _OURS_ONLY]
    return [*names, *_LENGTHS.values(), *_DRAWING, "do_sample", *_NOT_FOLLOWED]


def default_params(generation_config: dict[str, Any], positions: int | None = None) -> Text2TextParams:
    """Those of a generation_config.json; max_length and min_length there count the decoder's first token. positions: of the model."""
    names = {field.name for field in dataclasses.fields(Text2TextParams)} - set(_OURS_ONLY)
    found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if isinstance(found.get("decoder_start_token_id"), list):
        raise ValueError("decoder_start_token_id is a list, one for each text; give one id")
    for new, old in _LENGTHS.items():
        if new not in found and generation_config.get(old):
            found[new] = max(generation_config[old] - 1, 0)
    if positions is not None:
        found["max_new_tokens"] = min(found.get("max_new_tokens", Text2TextParams.max_new_tokens), positions)
    if generation_config.get("do_sample"):
        found["temperature"] = 1.0
        found |= {name: generation_config[name] for name in _DRAWING if generation_config.get(name) is not None}
    passed_over = [
        f"{name}={generation_config[name]!r}"
        for name, neutral in _NOT_FOLLOWED.items()
        if generation_config.get(name) not in (None, neutral)
    ]
    if passed_over:
        warnings.warn(
            f"the checkpoint's generation settings have {', '.join(passed_over)}, which Text2Text does not follow",
            stacklevel=2,
        )
    try:
        return Text2TextParams(**found)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the checkpoint's generation_config.json cannot be followed: {error}") from error
