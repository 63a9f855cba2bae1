"""What the server answers when it refuses or fails: OpenAI's error object, one sentence with the values and the cure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_json
from starlette.responses import Response

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error",
}  # fmt: skip


class ApiError(Exception):
    """status: of HTTP. param: the field of the request that it is about. code: a word for programs. retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
        self.model = ""  # which turned the request away, for the metrics

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.code == "draining":
            found["connection"] = "close"
        if self.status in (408, 500):  # the same request would take as long, or fail again
            found["x-should-retry"] = "false"
        return found


def of_model(error: ApiError, model: str) -> ApiError:
    error.model = model
    return error


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dumps(value), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers())


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dumps(value: Any) -> bytes:
    """JSON in UTF-8; ValueError for NaN and infinity, which JSON does not have."""
    return _encode(value).encode("utf-8", "replace")


def dumps_finite(value: Any) -> bytes:
    """The same for what has no NaN or infinity, in a fifth of the time."""
    try:
        return to_json(value)
    except ValueError:  # half a character of UTF-16, which a text may have
        return dumps(value)


def refused(error: ValueError | TypeError, param: str | None = None) -> ApiError:
    """A 400 for what the engine, the tokenizer or the template refuses, in its own sentence."""
    message = str(error)
    named = re.match(r"(\w+)[=\s]", message)
    code = None
    if "tokens and the context" in message:  # programs know it by the code, litellm by the first words
        code, message = (
            "context_length_exceeded",
            message.replace("the prompt has", "the prompt is too long: it has", 1),
        )
    if param is None and named is not None and named[1] in _NAMES:
        param = _NAMES[named[1]]
    return bad_request(message, param, code)


_NAMES = {
    "n": "n", "best_of": "best_of", "seed": "seed", "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "max_tokens": "max_tokens", "min_tokens": "min_tokens", "logprobs": "logprobs", "prompt_logprobs": "prompt_logprobs",
    "prompt_lookup": "prompt_lookup", "stop": "stop", "bad_words": "bad_words", "stop_token_ids": "stop_token_ids",
    "logit_bias": "logit_bias", "json_schema": "response_format", "regex": "regex", "messages": "messages", "message": "messages",
}  # fmt: skip  # how a sentence of SamplingParams or of the chat begins, and the field that it is about


def invalid_fields(error: ValidationError, known: list[str]) -> ApiError:
    """A 400 for a body that pydantic refuses; known: the fields that there are."""
    found = error.errors(include_url=False, include_context=False)
    first = found[0]
    param = _path(first["loc"])
    kind, message = first["type"], first["msg"]
    if len(first["loc"]) > 1 and any(not isinstance(part, int) and part not in known for part in first["loc"][:2]):
        # members of a union: what each of them wanted
        message = ", or ".join(dict.fromkeys(e["msg"] for e in found if e["loc"][0] == first["loc"][0]))
    if kind == "json_invalid":
        reason = message.partition(": ")[2] or message
        return bad_request(f"the body is not valid JSON: {reason}", None, "invalid_json")
    if kind == "extra_forbidden":
        return bad_request(
            f"{param} is not a parameter that this server knows here, and it ignores none; leave it out. "
            f"There are {', '.join(known)}",
            param,
            "unknown_parameter",
        )
    if kind == "missing":
        return bad_request(f"{param} is missing", param, "missing_parameter")
    if kind == "value_error":
        return bad_request(message.removeprefix("Value error, "), param)
    if kind in ("model_type", "model_attributes_type", "dict_type") and param is None:
        return bad_request("the body must be a JSON object", None, "invalid_json")
    return bad_request(f"{param}={_short(first.get('input'))} is refused: {message[0].lower()}{message[1:]}", param)


def _path(loc: tuple[int | str, ...]) -> str | None:
    """messages[0].content; the names of union members, which pydantic adds, are left out."""
    path = ""
    for part in loc:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"\w+", part) and part not in ("str", "int", "float", "bool", "none"):
            path += f".{part}" if path else part
    return path or None


def _short(value: Any) -> str:
    """As JSON, so that nothing of this process, such as an address, gets out; cut at 60 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"({type(value).__name__})"
    return text if len(text) <= 60 else text[:57] + "..."
