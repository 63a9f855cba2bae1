"""/v1/chat/completions."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from typing import Any

from foveate.generation.outputs import CompletionOutput, RequestOutput
from foveate.generation.params import SamplingParams
from foveate.serve.answer import Answer, OfChoices
from foveate.serve.errors import bad_request
from foveate.serve.inspection import inspected
from foveate.serve.jobs import Call, Job
from foveate.serve.protocol import ChatBody, Message, NamedTool, Tool
from foveate.serve.sampling import chat_params, check_finished, priority_of
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState
from foveate.serve.text import TokenText, chat_logprobs, prompt_logprobs, usage
from foveate.serve.tools import ToolReader, call_schema, writes_tags


async def chat(state: ServerState, body: ChatBody) -> Answer:
    served = state.open_model(body.model)
    name = f"chatcmpl-{uuid.uuid4().hex}"
    call, tags = await prepare_chat(state, served, body, name)
    writer = ChatWriter(name, served, body, call, tags)
    look = inspected(state, served, body.inspect, call)
    return Answer(state, served, call, writer, stream=body.stream, inspected=look)


async def prepare_chat(state: ServerState, served: ServedModel, body: ChatBody, name: str) -> tuple[Call, bool | None]:
    """The call, whose one job is called `name`, and how calls of tools are read from it: see `writes_tags`; None: none are."""
    llm, worker = served.causal()
    priority = priority_of(body.priority)
    params = chat_params(body, llm.default_params, state.settings.max_logprobs)
    params, tags = _with_tools(body, params, llm, served.name)
    tools = None if tags is None and body.tool_choice in (None, "none") else body.tools
    messages = body.messages
    if state.guard is not None:
        messages = await state.guard.messages(state, served, messages, name)

    def tokens() -> list[int]:
        ids = llm.encode_chat(plain_messages(messages), **template_options(body, tools))
        worker.engine.check(ids, params)
        return ids

    ids = await state.prepare(tokens)
    grammar = await state.grammar(served, params)
    job = Job(name, ids, params, grammar=grammar, priority=priority)
    if state.guard is not None:
        state.guard.watch(served, body, [job])
    return Call([job]), tags


def _with_tools(body: ChatBody, params: SamplingParams, llm: Any, model: str) -> tuple[SamplingParams, bool | None]:
    """The parameters, under a grammar where a call is required, and how calls are read: see `writes_tags`; None: none are."""
    if body.tools is None:
        if body.tool_choice not in (None, "none"):
            raise bad_request("tool_choice needs tools", "tool_choice")
        return params, None
    if body.tool_choice == "none":
        return params, None
    template = None if llm.tokenizer is None else llm.tokenizer.chat_template
    tags = writes_tags(template)
    if tags is None:
        raise bad_request(
            f"the chat template of {model} takes no tools; leave tools out, or serve a model that was made for them",
            "tools",
        )
    if body.tool_choice in (None, "auto"):
        return params, tags
    name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
    names = [tool.function.name for tool in body.tools]
    if name is not None and name not in names:
        raise bad_request(f"tool_choice names {name!r}, and tools has {', '.join(names)}", "tool_choice")
    if params.json_schema is not None or params.regex is not None:
        raise bad_request("tool_choice and response_format each restrict the output; give one of them", "tool_choice")
    try:
        return params.with_(json_schema=call_schema(body.tools, name)), False
    except (ValueError, TypeError) as error:
        raise bad_request(str(error), "tool_choice") from None


def template_options(body: Any, tools: list[Tool] | None) -> dict[str, Any]:
    """What goes to the chat template beside the messages."""
    found: dict[str, Any] = dict(body.chat_template_kwargs or {})
    mine = {"messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"} & set(found)
    if mine:
        raise bad_request(
            f"chat_template_kwargs has {min(mine)}, which is a field of its own or not taken", "chat_template_kwargs"
        )
    if tools is not None:
        found["tools"] = [tool.model_dump(exclude_none=True) for tool in tools]
    return {
        **found,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
    }


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """As templates read them: the arguments of calls are objects, not JSON text."""
    found = []
    for i, message in enumerate(messages):
        plain = message.plain()
        for call in plain.get("tool_calls", ()):
            try:
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            except (ValueError, RecursionError):
                raise bad_request(
                    f"messages[{i}] has a call of {call['function']['name']!r} whose arguments are not JSON", "messages"
                ) from None
        found.append(plain)
    return found


class ChatWriter(OfChoices):
    operation = "chat"

    def __init__(self, name: str, served: ServedModel, body: ChatBody, call: Call, tags: bool | None) -> None:
        self._job, self._body = call.jobs[0], body
        head = {
            "id": name, "object": "chat.completion.chunk" if body.stream else "chat.completion", "created": int(time.time()),
            "model": served.name, "system_fingerprint": served.fingerprint,
        }  # fmt: skip
        super().__init__(head, body.stream_options is not None and body.stream_options.include_usage)
        tokens = TokenText(served.llm.tokenizer, body.return_tokens_as_token_ids)
        self._choices = [_Choice(i, body, tags, tokens) for i in range(self._job.params.n)]
        self._begun = False

    def events(self) -> bytes:
        begun = b"".join(map(self.frame, self._first_chunks())) if not self._begun else b""
        return begun + super().events()

    def _first_chunks(self) -> Iterator[dict[str, Any]]:
        """The role, before any text; only then there are ids of the prompt."""
        if self._job.output is None:
            return
        self._begun = True
        ids = {"prompt_token_ids": self._job.output.prompt_token_ids} if self._body.return_token_ids else {}
        usage = {"usage": None} if self._usage else {}
        for choice in self._choices:
            delta = {"role": "assistant", "content": ""}
            part = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield {**self._head, "choices": [part], **usage, **ids}

    def choices(self) -> Iterator[dict[str, Any]]:
        if self._job.output is not None:
            for choice, sample in zip(self._choices, self._job.output.outputs):
                yield from choice.new(sample)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self._usage:
            yield {**self._head, "choices": [], "usage": usage([self._job.output])}

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        [output] = outputs
        choices = [choice.whole(sample) for choice, sample in zip(self._choices, output.outputs)]
        found: dict[str, Any] = {**self._head, "choices": choices, "usage": usage(outputs)}
        if self._body.return_token_ids:
            found["prompt_token_ids"] = output.prompt_token_ids
        if self._body.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(output)
        return found


class _Choice:
    """One sample: what of it has been sent."""

    def __init__(self, index: int, body: ChatBody, tags: bool | None, tokens: TokenText) -> None:
        self.index, self._body, self._tokens = index, body, tokens
        self._reader = None if tags is None else ToolReader(tags)
        self._characters = self._count = 0
        self._ended = False

    def new(self, sample: CompletionOutput) -> Iterator[dict[str, Any]]:
        check_finished(sample.finish_reason, sample.stop_reason)
        finished = sample.finish_reason is not None
        text, ids = sample.text[self._characters :], sample.token_ids[self._count :]
        if self._ended or not (text or ids or finished):
            return
        logprobs = self._logprobs(sample, self._count, len(ids))
        self._characters, self._count, self._ended = self._characters + len(text), self._count + len(ids), finished
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        if self._reader is not None:
            deltas = list(self._reader.push(text, finished))
        if not deltas and (logprobs is not None or self._body.return_token_ids or finished):
            deltas = [{}]
        for i, delta in enumerate(deltas):
            last = i == len(deltas) - 1
            part: dict[str, Any] = {
                "index": self.index, "delta": delta, "logprobs": logprobs if i == 0 else None,
                "finish_reason": self._reason(sample) if finished and last else None,
            }  # fmt: skip
            if finished and last:
                part["stop_reason"] = sample.stop_reason
            if self._body.return_token_ids:
                part["token_ids"] = list(ids) if i == 0 else []
            yield part

    def whole(self, sample: CompletionOutput) -> dict[str, Any]:
        check_finished(sample.finish_reason, sample.stop_reason)
        message: dict[str, Any] = {"role": "assistant", "content": sample.text, "refusal": None}
        if self._reader is not None:
            deltas = list(self._reader.push(sample.text, True))
            message["content"] = "".join(delta.get("content", "") for delta in deltas) or None
            if self._reader.calls:
                message["tool_calls"] = [
                    {"id": c["id"], "type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}}
                    for c in self._reader.calls
                ]
        found = {
            "index": self.index, "message": message, "logprobs": self._logprobs(sample, 0, len(sample.token_ids)),
            "finish_reason": self._reason(sample), "stop_reason": sample.stop_reason,
        }  # fmt: skip
        if self._body.return_token_ids:
            found["token_ids"] = sample.token_ids
        return found

    def _logprobs(self, sample: CompletionOutput, start: int, count: int) -> dict[str, Any] | None:
        if not self._body.logprobs or sample.logprobs is None:
            return None
        entries = sample.logprobs[start : start + count]
        return chat_logprobs(
            self._tokens, sample.token_ids[start : start + count], entries, self._body.top_logprobs or 0
        )

    def _reason(self, sample: CompletionOutput) -> str | None:
        called = self._reader is not None and bool(self._reader.calls)
        return "tool_calls" if called and sample.finish_reason == "stop" else sample.finish_reason
