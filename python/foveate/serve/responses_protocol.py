"""The body of /v1/responses, and the chat that it stands for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from foveate.serve.errors import ApiError, bad_request
from foveate.serve.protocol import (
    Body,
    ChatBody,
    Function,
    FunctionCall,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
)

_TEXTS = ("input_text", "output_text", "text")
LOGPROBS = "message.output_text.logprobs"


class ContentPart(Body):
    type: str
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class Item(Body):
    """A message, a call of a function, or what it gave; items of an answer can be sent back as they came."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionTool(Body):
    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedFunctionTool(Body):
    type: Literal["function"]
    name: str


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Body):
    format: TextFormat | None = None


class ResponsesStreamOptions(Body):
    include_obfuscation: Literal[False] = False


class ResponsesBody(Body):
    """OpenAI's, with sampling parameters that its chat has. Nothing is kept, so the conversation is sent whole each time."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    stream: bool = False
    stream_options: ResponsesStreamOptions | None = None
    text: TextSettings | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionTool | None = None
    parallel_tool_calls: bool | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    # vLLM's and foveate's
    seed: int | None = None
    stop: str | list[str] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    chat_template_kwargs: dict[str, Any] | None = None


_SAME = (
    "model", "temperature", "top_p", "stream", "parallel_tool_calls", "metadata", "user", "seed", "stop", "top_k", "min_p",
    "repetition_penalty", "ignore_eos", "logit_bias", "priority", "chat_template_kwargs",
)  # fmt: skip
# How a chat's errors name fields, and what they are called here.
_RENAMED = {
    "messages": "input", "max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens", "response_format": "text.format",
}  # fmt: skip


def as_chat(body: ResponsesBody) -> ChatBody:
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if isinstance(body.input, str):
        messages = [Message(role="user", content=body.input)]
    else:
        messages = _messages(body.input)
    if body.instructions is not None:
        messages.insert(0, Message(role="system", content=body.instructions))
    if not messages:
        raise bad_request("input is empty; give a text, or a list of messages", "input")
    if body.top_logprobs is not None and not body.include:
        raise bad_request(f'top_logprobs={body.top_logprobs} needs include=["{LOGPROBS}"]', "top_logprobs")
    if body.include:
        given |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    form = None if body.text is None else body.text.format
    if form is not None and form.type != "text":
        given["response_format"] = _format(form)
    if isinstance(body.tool_choice, NamedFunctionTool):
        given["tool_choice"] = NamedTool(type="function", function=NamedFunction(name=body.tool_choice.name))
    elif body.tool_choice is not None:
        given["tool_choice"] = body.tool_choice
    tools = [
        Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}, exclude_none=True)))
        for tool in body.tools or ()
    ]
    return ChatBody.model_construct(
        _fields_set=None,
        **{"messages": messages, "max_completion_tokens": body.max_output_tokens, "tools": tools or None, **given},
    )


def renamed(error: ApiError) -> ApiError:
    """An error of the chat, about the fields of this body."""
    if error.param is not None:
        head = error.param.partition("[")[0]
        error.param = _RENAMED.get(head, error.param)
    return error


def _format(form: TextFormat) -> ResponseFormat:
    if form.type == "json_object":
        return ResponseFormat(type="json_object")
    if form.schema_ is None:
        raise bad_request("text.format of type json_schema needs a schema", "text.format")
    return ResponseFormat(type="json_schema", json_schema={"schema": form.schema_})


def _messages(items: list[Item]) -> list[Message]:
    """Calls that follow one another, or the assistant's text, are one message of the assistant."""
    found: list[Message] = []
    for i, item in enumerate(items):
        where = f"input[{i}]"
        if item.type == "message":
            role = _needed(item.role, where, "role")
            text = _text(_needed(item.content, where, "content"), f"{where}.content")
            found.append(Message(role="system" if role == "developer" else role, content=text))
        elif item.type == "function_call":
            function = FunctionCall(
                name=_needed(item.name, where, "name"), arguments=_needed(item.arguments, where, "arguments")
            )
            call = ToolCall(id=_needed(item.call_id, where, "call_id"), function=function)
            if not found or found[-1].role != "assistant":
                found.append(Message(role="assistant"))
            found[-1].tool_calls = [*(found[-1].tool_calls or ()), call]
        else:
            output = _text(_needed(item.output, where, "output"), f"{where}.output")
            found.append(Message(role="tool", content=output, tool_call_id=_needed(item.call_id, where, "call_id")))
    return found


def _needed(value: Any, where: str, name: str) -> Any:
    if value is None:
        raise bad_request(f"{where}.{name} is missing", f"{where}.{name}", "missing_parameter")
    return value


def _text(content: str | list[ContentPart], where: str) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for i, part in enumerate(content):
        if part.type == "refusal" and part.refusal is not None:
            parts.append(part.refusal)
        elif part.type in _TEXTS and part.text is not None:
            parts.append(part.text)
        else:
            raise bad_request(
                f'{where}[{i}] is of type "{part.type[:40]}"; this server reads parts of text only, such as '
                '{"type": "input_text", "text": "..."}',
                where,
            )
    return "\n".join(parts)
