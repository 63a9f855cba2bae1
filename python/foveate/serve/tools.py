"""Calls of tools in what a model writes, piece by piece, and the schema that makes it write one."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from typing import Any

from foveate.serve.errors import bad_request
from foveate.serve.protocol import Tool

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
# {"name": "f", "arguments": ... or, as Llama 3 writes it, "parameters"; the value follows.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"((?:[^"\\]|\\.)*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*')


def writes_tags(template: str | None) -> bool | None:
    """How a template's model writes calls: True between <tool_call> tags, False as a bare JSON object; None if it takes no tools."""
    if template is None or "tools" not in template:
        return None
    return _OPEN in template


def call_schema(tools: list[Tool], name: str | None) -> dict[str, Any]:
    """JSON Schema of one call, {"name": ..., "arguments": ...}, of the tool with this name or of any."""
    if name is not None:
        tools = [tool for tool in tools if tool.function.name == name]
    definitions: dict[str, Any] = {}
    calls = []
    for tool in tools:
        parameters = _closed(tool.function.parameters or {"type": "object"})
        for key in ("$defs", "definitions"):
            for title, value in (parameters.pop(key, None) or {}).items():
                if definitions.setdefault(key, {}).setdefault(title, value) != value:
                    raise bad_request(
                        f"two tools define {title!r} under {key} differently; rename one of them", "tools"
                    )
        properties = {"name": {"const": tool.function.name}, "arguments": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **definitions}


# Beside one of these, "properties" need not be all that an object may have.
_MAY_HAVE_MORE = {
    "additionalProperties", "unevaluatedProperties", "patternProperties", "anyOf", "oneOf", "if", "$ref", "dependentSchemas",
}  # fmt: skip


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """Where a schema lists an object's properties and says nothing of others, the model may write no others: the function would not take
    them, and clients leave additionalProperties out. Not with allOf, each of whose parts may list some of the properties."""
    if '"allOf"' in json.dumps(schema):
        return dict(schema)

    def close(value: Any, keyword: str = "") -> Any:
        if isinstance(value, list):
            return [close(one) for one in value]
        if not isinstance(value, dict) or keyword in ("enum", "const", "default", "examples"):
            return value
        if keyword in ("properties", "$defs", "definitions"):  # by names, which may be those of keywords
            return {name: close(one) for name, one in value.items()}
        found = {name: close(one, name) for name, one in value.items()}
        if isinstance(found.get("properties"), dict) and not _MAY_HAVE_MORE & set(found):
            found["additionalProperties"] = False
        return found

    return close(schema)


class ToolReader:
    """Takes text in any pieces; the content and the calls do not depend on where they are cut.

    tags: whether calls stand between <tool_call> and </tool_call>; otherwise the whole text is one call if it begins with {.
    Each event is {"content": text} or {"tool_calls": [delta]}, as in the `delta` of a streamed chat.
    """

    def __init__(self, tags: bool) -> None:
        self._tags = tags
        self._buffer = ""
        self._state = "text" if tags else "bare"
        self._value = _JsonValue()  # the arguments of the call that is being written
        self._raw = ""  # of the call so far, which becomes content if it is none
        self.calls: list[dict[str, str]] = []  # id, name, arguments

    def push(self, piece: str, final: bool = False) -> Iterator[dict[str, Any]]:
        self._buffer += piece
        while True:
            before = (self._state, len(self._buffer))
            yield from getattr(self, f"_{self._state}")(final)
            if (self._state, len(self._buffer)) == before:
                return

    def _text(self, final: bool) -> Iterator[dict[str, Any]]:
        at = self._buffer.find(_OPEN) if self._tags else -1
        end = at if at >= 0 else len(self._buffer) - (0 if final or not self._tags else _held(self._buffer, _OPEN))
        content, self._buffer = self._buffer[:end], self._buffer[end:]
        if at >= 0:
            self._buffer, self._state, self._raw = self._buffer[len(_OPEN) :], "head", _OPEN
        if content and not (self.calls and not content.strip()):  # space between calls is nobody's text
            yield {"content": content}

    def _bare(self, final: bool) -> Iterator[dict[str, Any]]:
        start = self._buffer.lstrip()
        if start or final:
            self._state = "head" if start.startswith("{") else "text"
            self._raw = ""
        yield from ()

    def _head(self, final: bool) -> Iterator[dict[str, Any]]:
        match = _HEAD.match(self._buffer)
        closed = self._tags and _CLOSE in self._buffer
        if match is not None and match.end() < len(self._buffer):
            name = json.loads(f'"{match[1]}"')
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "name": name, "arguments": ""})
            self._raw, self._buffer = "", self._buffer[match.end() :]
            self._value, self._state = _JsonValue(), "arguments"
            yield {"tool_calls": [self._delta(start=True)]}
        elif closed or final:
            yield from self._whole(final)

    def _whole(self, final: bool) -> Iterator[dict[str, Any]]:
        """A call whose beginning is not the usual one: taken if it is one after all, else given as text."""
        inner, closed, rest = self._buffer.partition(_CLOSE) if self._tags else (self._buffer, "", "")
        try:
            found = json.loads(inner)
            arguments = found.get("arguments", found.get("parameters", {}))
            name = found["name"]
        except (ValueError, KeyError, AttributeError, RecursionError):
            name = None
        self._buffer, self._state = rest, "text"
        if isinstance(name, str):
            self.calls.append({"id": f"call_{uuid.uuid4().hex[:24]}", "name": name, "arguments": ""})
            yield {"tool_calls": [self._delta(start=True)]}
            yield {"tool_calls": [self._delta(json.dumps(arguments, ensure_ascii=False))]}
        elif self._raw + inner + closed:
            yield {"content": self._raw + inner + closed}

    def _arguments(self, final: bool) -> Iterator[dict[str, Any]]:
        taken = self._value.take(self._buffer)
        piece, self._buffer = self._buffer[:taken], self._buffer[taken:]
        if piece:
            yield {"tool_calls": [self._delta(piece)]}
        if self._value.complete:
            self._state = "tail"

    def _tail(self, final: bool) -> Iterator[dict[str, Any]]:
        """From the end of the arguments to the end of the call."""
        if self._tags:
            _, closed, rest = self._buffer.partition(_CLOSE)
            if closed:
                self._buffer, self._state = rest, "text"
        yield from ()

    def _delta(self, arguments: str = "", *, start: bool = False) -> dict[str, Any]:
        call = self.calls[-1]
        call["arguments"] += arguments
        delta: dict[str, Any] = {"index": len(self.calls) - 1, "function": {"arguments": arguments}}
        if start:
            delta |= {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": ""}}
        return delta


class _JsonValue:
    """Where a JSON value ends, in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._inside = self._escaped = self._any = False
        self.complete = False

    def take(self, text: str) -> int:
        """How many of the characters belong to the value."""
        for at, character in enumerate(text):
            if self.complete:
                return at
            if self._inside:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._inside = False
                    self.complete = self._depth == 0
            elif character == '"':
                self._inside = self._any = True
            elif character in "{[":
                self._depth, self._any = self._depth + 1, True
            elif character in "}]":
                if self._depth == 0:  # of the call: a number or a word has ended before it
                    self.complete = True
                    return at
                self._depth -= 1
                self.complete = self._depth == 0
            elif not character.isspace():
                self._any = True
        return len(text)


def _held(text: str, mark: str) -> int:
    """How many characters at the end may be the beginning of the mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:size])), 0)
