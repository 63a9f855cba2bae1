"""Rows of instructions as the common data sets write them (Alpaca, ShareGPT, prompt and response, ...), as chats or prompts."""

from __future__ import annotations

from typing import Any

# One text that asks and one that answers. What stands in _MORE beside an instruction is the text that it is about.
_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "response"), ("prompt", "answer"), ("prompt", "output"),
    ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"), ("input", "output"),
    ("problem", "solution"),
)  # fmt: skip
_MORE = ("input", "context")
_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant",
    "model": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip

Message = dict[str, Any]


def read_row(row: dict[str, Any], *, text_field: str | None, template: bool) -> dict[str, Any]:
    """The row as {"messages"}, or without a chat template as {"prompt", "completion"}; a row that is one already as it is.

    None counts as absent; a row that has text_field, if it is given, is a text. A "text" goes before a pair. A question and its answer
    are a chat of two messages where the model has a template; else the completion follows the prompt in a new line, and an instruction
    what it is about after an empty one. Assistant messages of a prompt are not learnt: they have "weight": 0, as OpenAI's format
    writes it. ValueError for preferences, of which nothing says what to learn.
    """
    given = {name: value for name, value in row.items() if value is not None}
    if text_field in given or "messages" in given:
        return row
    if "chosen" in given and "rejected" in given:
        raise ValueError(
            "'chosen' and 'rejected' are preferences, which no objective here learns; to learn the chosen answers, name 'chosen' "
            "'completion' (with a 'prompt') or, where it is a whole conversation, 'messages'"
        )
    for name in ("conversations", "conversation"):
        if isinstance(given.get(name), list):
            return {**_rest(row), "messages": [*_system(given), *map(_message, given[name])]}
    if isinstance(given.get("completion"), list) or isinstance(given.get("prompt"), list):
        return _conversation(row, given)
    if "completion" in given or "text" in given:
        return row
    for ask, answer in _PAIRS:
        if isinstance(given.get(ask), str) and isinstance(given.get(answer), str):
            return _pair(row, given, ask, given[answer], template)
    return row


def _pair(row: dict[str, Any], given: dict[str, Any], ask: str, reply: str, template: bool) -> dict[str, Any]:
    more = [given[name] for name in _MORE if ask == "instruction" and isinstance(given.get(name), str) and given[name]]
    question = "\n\n".join([given[ask], *more])
    if not template:
        if _system(given) or given.get("history"):
            raise ValueError("'system' and 'history' need a chat template, which this model does not have")
        return {"prompt": f"{question}\n", "completion": reply}
    messages = _system(given)
    for turn in given.get("history") or []:
        if not (isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise ValueError(f"'history' must be a list of [question, answer], not {str(turn)[:60]}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return {**_rest(row), "messages": messages}


def _conversation(row: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The messages of a prompt (messages or a text) and a completion that is one of both; only the completion's replies are learnt."""
    answer = next((name for name in ("completion", "response", "answer", "output") if name in given), None)
    if answer is None:
        raise ValueError(
            "'prompt' is a list of messages, and there is no 'completion'; name a whole conversation 'messages'"
        )
    prompt, completion = _messages(given.get("prompt", []), "user"), _messages(given[answer], "assistant")
    prompt = [message | {"weight": 0} if message.get("role") == "assistant" else message for message in prompt]
    return {**_rest(row), "messages": [*prompt, *completion]}


def _messages(value: Any, role: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"a prompt and its completion must be texts or lists of messages, not {str(value)[:60]}")
    return [_message(message) for message in value]


def _message(message: Any) -> Message:
    """From ShareGPT's {"from", "value"}; others as they are."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    if message["from"] not in _ROLES:
        raise ValueError(f"a message is from {message['from']!r}, which is none of {', '.join(_ROLES)}")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {"role": _ROLES[message["from"]], "content": message.get("value"), **rest}


def _system(given: dict[str, Any]) -> list[Message]:
    system = given.get("system") or given.get("system_prompt")
    return [{"role": "system", "content": system}] if isinstance(system, str) else []


def _rest(row: dict[str, Any]) -> dict[str, Any]:
    """What a template may use beside the messages."""
    return {name: row[name] for name in ("tools",) if row.get(name) is not None}
