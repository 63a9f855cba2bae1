"""What a prompt and a conversation may be: texts, token ids in whatever holds them, and messages."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_CURE = 'a str, token ids (a list of int, an array or tensor of one dimension), {"prompt": ...} or {"prompt_token_ids": ...}'


def as_prompts(prompts: Any) -> list[str | list[int]]:
    """One prompt, or a list of prompts, as a list of texts and lists of ids. TypeError for what is neither."""
    if isinstance(prompts, (str, Mapping)) or hasattr(prompts, "ids") or _is_ids(prompts):
        return [as_prompt(prompts)]
    if prompts is None or isinstance(prompts, (bytes, set, frozenset)) or not isinstance(prompts, Iterable):
        raise TypeError(f"a prompt must be {_CURE}, or a list of these; got {type(prompts).__name__}")
    return [as_prompt(prompt) for prompt in prompts]


def as_prompt(prompt: Any) -> str | list[int]:
    """A text, or the list of its ids."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping):  # vLLM's TokensPrompt and TextPrompt
        known = [key for key in ("prompt_token_ids", "prompt") if prompt.get(key) is not None]
        others = sorted(set(prompt) - {"prompt", "prompt_token_ids"})
        if not known or others:
            raise TypeError(
                f"a prompt must be {_CURE}; got an object with {', '.join(map(str, prompt)) or 'nothing in it'}"
            )
        return as_prompt(prompt[known[0]])
    ids = getattr(prompt, "ids", prompt)  # of a tokenizers.Encoding
    if not _is_ids(ids) and not (isinstance(ids, Sequence) and len(ids) == 0):
        raise TypeError(f"a prompt must be {_CURE}; got {type(prompt).__name__}: {str(prompt)[:60]}")
    return [operator.index(token) for token in ids]


def _is_ids(value: Any) -> bool:
    """Whether it is a sequence, array or tensor of one dimension of integers that are no truth values; not one without elements."""
    dimensions = getattr(value, "ndim", None)
    if dimensions is not None and dimensions != 1:
        return False
    if isinstance(value, (str, bytes, Mapping)) or (dimensions is None and not isinstance(value, Sequence)):
        return False
    return len(value) > 0 and all(_is_id(token) for token in value)


def _is_id(token: Any) -> bool:
    if isinstance(token, bool) or str(getattr(token, "dtype", "")).endswith("bool"):
        return False
    if getattr(token, "ndim", 0):
        return False
    try:
        operator.index(token)
    except (TypeError, ValueError):
        return False
    return True


def conversations(messages: Any) -> tuple[list[list[Mapping[str, Any]]], bool]:
    """The conversations, and whether it was a list of them. TypeError and ValueError, with the place, for what is no conversation."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise TypeError(f'messages must be a list of {{"role": ..., "content": ...}}, got {type(messages).__name__}')
    entries = list(messages)
    several = bool(entries) and all(isinstance(entry, (list, tuple)) for entry in entries)
    chats = [list(entry) for entry in entries] if several else [entries]
    for conversation in chats:
        check_messages(conversation)
    return chats, several


def check_messages(messages: Sequence[Any]) -> None:
    if not messages:
        raise ValueError("messages is empty; it needs at least one message")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f'message {i} is a {type(message).__name__}, not a {{"role": ..., "content": ...}}: {message!r:.60}'
            )
        if not isinstance(message.get("role"), str):
            raise ValueError(f"message {i} names no role, such as 'user' or 'assistant': {dict(message)!r:.60}")
        # A call of a tool and its result may be all that a message is.
        if message.get("content") is None and not (set(message) - {"role", "content"}):
            raise ValueError(f"message {i} of {message['role']!r} holds no content")
