"""What of a row is text, and which of its characters are to be predicted: chats through the checkpoint's template, prompts, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from foveate.tokenizer import Tokenizer
from foveate.train import objective
from foveate.train.data_files import CONTINUES

Spans = list[tuple[int, int]]


def is_rendered(row: dict[str, Any]) -> bool:
    """Whether the text comes from a template, which writes special tokens itself."""
    return "messages" in row


def text_of(row: dict[str, Any], field: str, tokenizer: Tokenizer) -> tuple[str, Spans | None, bool]:
    """The text, the characters to be predicted (None: all), and whether the end token follows."""
    if "messages" in row:
        rendered, spans = render(row["messages"], tokenizer)
        return rendered, spans, False
    if "prompt" in row or "completion" in row:
        prompt, completion = (objective.text_of(row, name, "") for name in ("prompt", "completion"))
        return prompt + completion, [(len(prompt), len(prompt) + len(completion))], True
    return objective.text_of(row, field), None, CONTINUES not in row


def _is_message(message: dict[str, Any]) -> bool:
    """Content is None, or absent, beside other fields such as tool_calls only."""
    return isinstance(message.get("role"), str) and (message.get("content") is not None or len(message) > 2)


def render(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> tuple[str, Spans]:
    """The conversation by the checkpoint's template, and the characters of the assistant's messages with what ends them."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) and _is_message(m) for m in messages):
        raise ValueError(
            'messages must be a list of {"role": ..., "content": ...}, a role from the template\'s and a text, not '
            f"{str(messages)[:80]}"
        )
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: i + 1], add_generation_prompt=False)
        if not (after.startswith(before) and whole.startswith(after)):
            raise ValueError(
                "the chat template writes a message differently when others follow, so the replies cannot be found in the whole; "
                "train on each reply by itself, as 'prompt' and 'completion'"
            )
        spans.append((len(before), len(after)))
    return whole, spans


def target_flags(offsets: Sequence[tuple[int, int]], spans: Spans | None) -> list[int]:
    """For each token, by its characters, whether it lies within a span. Tokens without characters are not targets beside spans."""
    if spans is None:
        return [1] * len(offsets)
    flags = []
    at = 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        flags.append(int(at < len(spans) and start >= spans[at][0] and end > start))
    return flags
