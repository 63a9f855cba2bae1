"""Tokens as OpenAI's answers show them: their text, their bytes, their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from foveate.generation.detokenizer import Detokenizer
from foveate.generation.outputs import Logprob

_LOWEST = -9999.0  # in place of minus infinity, which JSON does not have


class TokenText:
    """For one tokenizer; as_ids: `token_id:42` in place of texts, so that tokens with the same text stay apart."""

    def __init__(self, tokenizer: Any, as_ids: bool = False) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids

    def bytes(self, token: int) -> bytes:
        if self._tokenizer is None:
            return b""
        try:
            return self._tokenizer.id_to_bytes(token)
        except ValueError:  # a row of the model's embedding beyond the vocabulary
            return b""

    def text(self, token: int) -> str:
        """A token that ends within a character is written as OpenAI does, `bytes:\\xe2\\x80`."""
        if self._as_ids or self._tokenizer is None:
            return f"token_id:{token}"
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(value: float) -> float:
    return value if math.isfinite(value) else _LOWEST


class LegacyLogprobs:
    """The `logprobs` of completions, in pieces: text_offset counts characters of the text that is returned."""

    def __init__(self, tokenizer: Any, as_ids: bool, skip_special_tokens: bool, offset: int = 0) -> None:
        self._tokens = TokenText(tokenizer, as_ids)
        self._reader = None if tokenizer is None else Detokenizer(tokenizer, skip_special_tokens)
        self._offset = offset

    def take(self, ids: Sequence[int], entries: Sequence[dict[int, Logprob] | None]) -> dict[str, Any]:
        """For these tokens; an entry is None for a prompt's first token, which nothing precedes."""
        found: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(ids, entries):
            found["tokens"].append(self._tokens.text(token))
            found["text_offset"].append(max(0, self._offset))
            if self._reader is not None:
                self._offset += len(self._reader.push(token))
            found["token_logprobs"].append(None if entry is None else finite(entry[token].logprob))
            found["top_logprobs"].append(None if entry is None else self._top(token, entry))
        return found

    def _top(self, token: int, entry: dict[int, Logprob]) -> dict[str, float]:
        """By text. Of two tokens with the same text the more probable one stays, but the chosen one always does."""
        top: dict[str, float] = {}
        for other, found in entry.items():
            text = self._tokens.text(other)
            top[text] = max(top.get(text, _LOWEST), finite(found.logprob))
        top[self._tokens.text(token)] = finite(entry[token].logprob)
        return top


def chat_logprobs(
    tokens: TokenText, ids: Sequence[int], entries: Sequence[dict[int, Logprob]], top: int
) -> dict[str, Any]:
    """The `logprobs` of a chat: content[] with the `top` most probable tokens each."""
    content = []
    for token, entry in zip(ids, entries):
        best = sorted(entry.items(), key=lambda item: item[1].rank)[:top]
        content.append(
            {
                **_entry(tokens, token, entry[token]),
                "top_logprobs": [_entry(tokens, other, found) for other, found in best],
            }
        )
    return {"content": content, "refusal": None}


def _entry(tokens: TokenText, token: int, found: Logprob) -> dict[str, Any]:
    return {"token": tokens.text(token), "logprob": finite(found.logprob), "bytes": list(tokens.bytes(token))}


def prompt_logprobs(output: Any) -> list[Any] | None:
    """vLLM's prompt_logprobs: per token {id: {logprob, rank, decoded_token}}, None for the first."""
    if output.prompt_logprobs is None:
        return None
    return [
        None
        if entry is None
        else {str(token): {**found._asdict(), "logprob": finite(found.logprob)} for token, found in entry.items()}
        for entry in output.prompt_logprobs
    ]


def usage(outputs: Sequence[Any]) -> dict[str, Any]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    cached = sum(output.metrics.cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }  # fmt: skip
