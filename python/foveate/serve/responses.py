"""/v1/responses: OpenAI's newer shape of a chat, with an event for each thing that happens in a stream. Nothing is kept."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from foveate.generation.outputs import CompletionOutput, RequestOutput
from foveate.serve.answer import Answer, Writer
from foveate.serve.chat import prepare_chat
from foveate.serve.errors import ApiError, dumps
from foveate.serve.jobs import Call
from foveate.serve.protocol import ChatBody
from foveate.serve.responses_protocol import ResponsesBody, as_chat, renamed
from foveate.serve.sampling import check_finished
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState
from foveate.serve.text import TokenText, chat_logprobs, usage
from foveate.serve.tools import ToolReader


async def respond(state: ServerState, body: ResponsesBody) -> Answer:
    served = state.open_model(body.model)
    name = f"resp_{uuid.uuid4().hex}"
    try:
        chat = as_chat(body)
        call, tags = await prepare_chat(state, served, chat, name)
    except ApiError as error:
        raise renamed(error) from None
    return Answer(state, served, call, ResponseWriter(name, served, body, chat, call, tags), stream=body.stream)


class ResponseWriter(Writer):
    """The output is a list of items: messages, and calls of functions; at any time the last one at most is open."""

    operation = "chat"

    def __init__(
        self, name: str, served: ServedModel, body: ResponsesBody, chat: ChatBody, call: Call, tags: bool | None
    ) -> None:
        self._name, self._body, self._chat = name, body, chat
        self._job, self._model, self._created = call.jobs[0], served.name, int(time.time())
        self._reader = None if tags is None else ToolReader(tags)
        self._tokens = TokenText(served.llm.tokenizer)
        self._items: list[dict[str, Any]] = []
        self._numbers = 0  # of events
        self._characters = self._count = 0
        self._logprobs: list[dict[str, Any]] = []  # of the message that is open
        self._begun = self._ended = False

    def frame(self, chunk: dict[str, Any]) -> bytes:
        chunk["sequence_number"] = self._numbers
        self._numbers += 1
        return b"event: " + chunk["type"].encode() + b"\ndata: " + dumps(chunk) + b"\n\n"

    def end(self, error: ApiError | None = None) -> bytes:
        """The last event says that the stream has ended; there is no [DONE]."""
        if error is None:
            return b""
        about = error.body["error"]
        failed = self._response("failed") | {"error": {"code": "server_error", "message": error.message}}
        return self.frame({"type": "error", **{key: about[key] for key in ("code", "message", "param")}}) + self.frame(
            {"type": "response.failed", "response": failed}
        )

    def chunks(self) -> Iterator[dict[str, Any]]:
        output = self._job.output
        if output is None:
            return
        if not self._begun:
            self._begun = True
            yield {"type": "response.created", "response": self._response("in_progress")}
            yield {"type": "response.in_progress", "response": self._response("in_progress")}
        [sample] = output.outputs
        yield from self._new(sample)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        output = self._job.latest
        [sample] = output.outputs
        status = _status(sample)
        yield {"type": f"response.{status}", "response": self._response(status, output)}

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        [output] = outputs
        for _ in self._new(
            output.outputs[0]
        ):  # the events of a stream, of which only what they make of the items counts
            pass
        return self._response(_status(output.outputs[0]), output)

    def _new(self, sample: CompletionOutput) -> Iterator[dict[str, Any]]:
        check_finished(sample.finish_reason, sample.stop_reason)
        finished = sample.finish_reason is not None
        text, ids = sample.text[self._characters :], sample.token_ids[self._count :]
        if self._ended or not (text or ids or finished):
            return
        new_logprobs = []
        if self._body.include and sample.logprobs is not None:
            entries = sample.logprobs[self._count : self._count + len(ids)]
            new_logprobs = chat_logprobs(self._tokens, ids, entries, self._body.top_logprobs or 0)["content"]
        self._characters, self._count, self._ended = self._characters + len(text), self._count + len(ids), finished
        deltas: list[dict[str, Any]] = [{"content": text}] if text else []
        if self._reader is not None:
            deltas = list(self._reader.push(text, finished))
        for delta in deltas:
            if "content" in delta:
                yield from self._write(delta["content"], new_logprobs)
                new_logprobs = []
            for call in delta.get("tool_calls", ()):
                yield from self._call(call)
        if new_logprobs and self._open("message") is not None:
            self._logprobs += new_logprobs
        if finished:
            if not self._items:
                yield from self._write("", new_logprobs)
            yield from self._close(_status(sample))

    def _open(self, kind: str) -> dict[str, Any] | None:
        last = self._items[-1] if self._items else None
        return last if last is not None and last["type"] == kind and last["status"] == "in_progress" else None

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _write(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        item = self._open("message")
        if item is None:
            yield from self._close("completed")
            self._logprobs = []
            item = {
                "id": f"msg_{uuid.uuid4().hex}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
            self._items.append(item)
            yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": _copy(item)}
            item["content"].append(_text_part("", []))
            yield {"type": "response.content_part.added", **self._at(), "content_index": 0, "part": _text_part("", [])}
        item["content"][0]["text"] += text
        self._logprobs += logprobs
        if text:
            found = {"type": "response.output_text.delta", **self._at(), "content_index": 0, "delta": text}
            yield found | {"logprobs": logprobs}

    def _call(self, delta: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if "id" in delta:
            yield from self._close("completed")
            item = {
                "id": f"fc_{uuid.uuid4().hex}", "type": "function_call", "status": "in_progress", "call_id": delta["id"],
                "name": delta["function"]["name"], "arguments": "",
            }  # fmt: skip
            self._items.append(item)
            yield {"type": "response.output_item.added", "output_index": len(self._items) - 1, "item": _copy(item)}
        piece = delta["function"]["arguments"]
        if piece:
            self._items[-1]["arguments"] += piece
            yield {"type": "response.function_call_arguments.delta", **self._at(), "delta": piece}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """The open item, if there is one, is complete, or as complete as it will be."""
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            item["content"][0]["logprobs"] = self._logprobs
            part = item["content"][0]
            place = {**self._at(), "content_index": 0}
            yield {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": self._logprobs}
            yield {"type": "response.content_part.done", **place, "part": dict(part)}
        else:
            done = {"type": "response.function_call_arguments.done", **self._at()}
            yield done | {"arguments": item["arguments"]}
        yield {"type": "response.output_item.done", "output_index": len(self._items) - 1, "item": _copy(item)}

    @staticmethod
    def _why(output: RequestOutput | None) -> str:
        """An answer is incomplete: OpenAI's word for why."""
        blocked = output is not None and output.outputs[0].finish_reason == "content_filter"
        return "content_filter" if blocked else "max_output_tokens"

    def _response(self, status: str, output: RequestOutput | None = None) -> dict[str, Any]:
        body, params = self._body, self._job.params
        form = None if body.text is None else body.text.format
        kept = {} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        choice: Any = body.tool_choice or "auto"
        return {
            "id": self._name, "object": "response", "created_at": self._created, "status": status, "background": False,
            "error": None, "incomplete_details": {"reason": self._why(output)} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "model": self._model,
            "output": [_copy(item) for item in self._items], "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "service_tier": "default", "store": False, "temperature": params.temperature,
            "text": {"format": {"type": "text"} | kept}, "top_p": params.top_p, "truncation": "disabled",
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in body.tools or ()], "top_logprobs": body.top_logprobs or 0, "user": body.user,
            "metadata": body.metadata or {}, "usage": None if output is None else _usage(output),
        }  # fmt: skip


def _status(sample: CompletionOutput) -> str:
    return "incomplete" if sample.finish_reason in ("length", "content_filter") else "completed"


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """As it is now: its text will grow."""
    return {**item, "content": [dict(part) for part in item["content"]]} if "content" in item else dict(item)


def _usage(output: RequestOutput) -> dict[str, Any]:
    found = usage([output])
    cached = found["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": found["prompt_tokens"], "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": found["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"],
    }  # fmt: skip
