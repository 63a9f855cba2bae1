"""Chats as text by the checkpoint's template, and where the assistant's replies lie in it."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

from foveate.tokenizer import Tokenizer

Spans = list[tuple[int, int]]
# Noncharacters of Unicode, which no text has: the borders of what a template marks, and a reply whose place is looked for.
_BEGIN, _END, _PROBE = "\ufdd0", "\ufdd1", "\ufdd2"
_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


def conversations(messages: Any, tokenizer: Tokenizer, **variables: Any) -> list[tuple[str, Spans, bool]]:
    """[(text, spans, ended)]: the conversation by the template, and the characters of the assistant's messages with what ends them.

    A template that marks the replies by {% generation %} gives them itself. One that writes a reply differently once others follow, as
    those that cut earlier thoughts, gives several texts: each ends with a reply as the model writes it, after the others as it then
    sees them. A message of "weight" 0 is not learnt. ended: the template ends a reply without a special token, so the end token has to
    follow. variables: as tools=[...].
    ValueError for what is no conversation, and for templates whose replies cannot be found.
    """
    messages = checked(messages)
    weights = [message.pop("weight", 1) for message in messages]
    reply = _marked_reply if tokenizer.chat_template and _TAG.search(tokenizer.chat_template) else _reply
    ended = reply is _reply and end_of_turn(tokenizer) is None
    found: list[tuple[str, Spans, bool]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not weights[i]:
            continue
        after, spans = reply(messages[: i + 1], tokenizer, variables)
        first = spans[0][0] if spans else len(after)
        if found and after[:first].startswith(found[-1][0]):
            spans = found.pop()[1] + spans
        found.append((after, spans, ended))
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **variables)
    if not found:
        return [(whole, [], False)]
    text, spans, _ = found[-1]
    if messages[-1]["role"] != "assistant" and whole.startswith(text):
        found[-1] = (whole, spans, False)
    return found


def render(messages: Any, tokenizer: Tokenizer) -> tuple[str, Spans]:
    """The one text of a conversation; ValueError where `conversations` gives several."""
    found = conversations(messages, tokenizer)
    if len(found) > 1:
        raise ValueError(
            f"the chat template writes a message differently when others follow, so these replies need {len(found)} texts"
        )
    return found[0][:2]


@functools.lru_cache(maxsize=8)
def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the template writes first after a reply; None if there is none."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(probe, add_generation_prompt=False)
    except ValueError:  # of a template that wants other messages
        return None
    added = tokenizer.backend.get_added_tokens_decoder()
    ids = tokenizer.encode(text.partition(_PROBE)[2], add_special_tokens=False)
    return next((i for i in ids if i in added and added[i].special), None)


def checked(messages: Any) -> list[dict[str, Any]]:
    """Fields of None left out, as tables fill absent ones with it, and content of text parts as one text. ValueError for what is no
    conversation."""
    if not isinstance(messages, (list, tuple)) or not all(isinstance(m, dict) for m in messages):
        raise ValueError(f'messages must be a list of {{"role": ..., "content": ...}}, not {str(messages)[:80]}')
    return [_message(m, number) for number, m in enumerate(messages, 1)]


def _message(message: dict[str, Any], number: int) -> dict[str, Any]:
    found = {name: value for name, value in message.items() if value is not None}
    content, role = found.get("content"), found.get("role")
    if isinstance(content, (list, tuple)):
        content = found["content"] = "\n".join(_part(part, number) for part in content)
    if not isinstance(role, str):
        raise ValueError(f'message {number} of messages has the role {role!r}; a message is {{"role", "content"}}')
    if content is None and len(found) == 1:
        raise ValueError(f"message {number} of messages, of role {role!r}, has no content; give it a text")
    if content is not None and not isinstance(content, str):
        raise ValueError(
            f"message {number} of messages, of role {role!r}, has {content!r:.60} as its content, of type {type(content).__name__}; "
            "it must be a text"
        )
    if content is not None and any(mark in content for mark in (_BEGIN, _END, _PROBE)):
        raise ValueError(f"message {number} of messages has a character from U+FDD0 to U+FDD2, which are no characters")
    return found


def _part(part: Any, number: int) -> str:
    """The text of one part of a content."""
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    raise ValueError(
        f'message {number} of messages has the part {part!r:.80} in its content; only {{"type": "text", "text": ...}} can be learnt'
    )


def _reply(messages: list[dict[str, Any]], tokenizer: Tokenizer, variables: dict[str, Any]) -> tuple[str, Spans]:
    """The text of `messages`, and where the last of them lies in it: what follows that which the model is given when it answers."""
    after = tokenizer.apply_chat_template(messages, add_generation_prompt=False, **variables)
    if len(messages) > 1:
        before = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **variables)
    else:  # of no message a template may leave out what it begins others with
        probe = tokenizer.apply_chat_template(
            [messages[0] | {"content": _PROBE}], add_generation_prompt=False, **variables
        )
        before, there, _ = probe.partition(_PROBE)
        before = before if there else probe
    if not after.startswith(before):
        raise ValueError(
            "what the chat template writes for a model that is to answer is not how it begins an answer that is there, so the replies "
            "cannot be found; train on them as 'prompt' and 'completion'"
        )
    return after, [(len(before), len(after))]


def _marked_reply(messages: list[dict[str, Any]], tokenizer: Tokenizer, variables: dict[str, Any]) -> tuple[str, Spans]:
    """The same by the template's own marks."""

    def mark(tag: re.Match[str]) -> str:
        left, end, right = tag.groups()  # a block about the mark does to the white space beside it what the tag does
        return f"{{%{left} if true %}}{{{{ '{_END if end else _BEGIN}' }}}}{{% endif {right}%}}"

    marking = copy.copy(tokenizer)
    marking.chat_template = _TAG.sub(mark, tokenizer.chat_template or "")

    def marked(part: list[dict[str, Any]]) -> tuple[str, Spans]:
        before, *parts = marking.apply_chat_template(part, add_generation_prompt=False, **variables).split(_BEGIN)
        text, spans = before, []
        for inside, _, outside in (part.partition(_END) for part in parts):
            spans.append((len(text), len(text) + len(inside)))
            text += inside + outside
        return text, spans

    text, spans = marked(messages)
    earlier = len(marked(messages[:-1])[1]) if any(m["role"] == "assistant" for m in messages[:-1]) else 0
    return text, spans[earlier:]
