"""/v1/completions: OpenAI's older endpoint, which evaluations use for exact log-probabilities."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

from foveate.generation.detokenizer import detokenize
from foveate.generation.outputs import CompletionOutput, RequestOutput
from foveate.serve.answer import Answer, OfChoices
from foveate.serve.errors import bad_request
from foveate.serve.infill import FillInTheMiddle
from foveate.serve.inspection import inspected
from foveate.serve.jobs import Call, Job
from foveate.serve.protocol import CompletionBody
from foveate.serve.sampling import check_finished, completion_params, priority_of
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState
from foveate.serve.text import LegacyLogprobs, prompt_logprobs, usage

_SHORT = 2000  # characters that are tokenized in the event loop: a fraction of a millisecond


async def complete(state: ServerState, body: CompletionBody) -> Answer:
    served = state.open_model(body.model)
    llm, worker = served.causal()
    priority = priority_of(body.priority)
    params = completion_params(body, llm.default_params, state.settings.max_logprobs)
    prompts = _prompts(body.prompt)
    holes = _holes(served, body) if body.suffix else None
    if holes is not None:
        params = holes.params(params)
    name = f"cmpl-{uuid.uuid4().hex}"
    suffix = body.suffix or ""
    if state.guard is not None:
        prompts = [await state.guard.prompt(state, served, prompt, name) for prompt in prompts]
        suffix = await state.guard.text(state, served, suffix, name, "suffix")
    size = sum(map(len, prompts))

    def tokens() -> list[list[int]]:
        found = []
        for prompt in prompts:
            if holes is not None:
                ids = holes.encode(str(prompt), suffix)
            else:
                ids = _encode(llm, prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt
            worker.engine.check(ids, params)
            found.append(ids)
        return found

    ids = await state.prepare(tokens, heavy=size > _SHORT)
    grammar = await state.grammar(served, params)
    jobs = [Job(f"{name}-{i}", tokens, params, grammar=grammar, priority=priority) for i, tokens in enumerate(ids)]
    if state.guard is not None:
        state.guard.watch(served, body, jobs)
    call = Call(jobs)
    writer = CompletionWriter(name, served, body, prompts, call)
    look = inspected(state, served, body.inspect, call)
    return Answer(state, served, call, writer, stream=body.stream, inspected=look)


def _prompts(given: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise bad_request("prompt is empty; give a text, or token ids", "prompt")
    return list(given)


def _holes(served: ServedModel, body: CompletionBody) -> FillInTheMiddle:
    holes = FillInTheMiddle(served, "suffix")
    if body.echo:
        raise bad_request(
            "echo and suffix do not go together: the text would not be one; leave one of them out", "suffix"
        )
    if not all(isinstance(prompt, str) for prompt in _prompts(body.prompt)):
        raise bad_request("suffix needs a prompt that is a text, not token ids", "suffix")
    return holes


def _encode(llm: Any, text: str, special: bool) -> list[int]:
    if llm.tokenizer is None:
        raise ValueError("this model has no tokenizer; send token ids as the prompt")
    return llm.tokenizer.encode(text, add_special_tokens=special)


class CompletionWriter(OfChoices):
    def __init__(
        self, name: str, served: ServedModel, body: CompletionBody, prompts: list[str | list[int]], call: Call
    ) -> None:
        self._call, self._body = call, body
        head = {
            "id": name, "object": "text_completion", "created": int(time.time()), "model": served.name,
            "system_fingerprint": served.fingerprint,
        }  # fmt: skip
        super().__init__(head, body.stream_options is not None and body.stream_options.include_usage)
        tokenizer, n = served.llm.tokenizer, call.jobs[0].params.n
        self._choices = [
            [_Choice(i * n + k, body, prompts[i], job, tokenizer) for k in range(n)] for i, job in enumerate(call.jobs)
        ]

    def choices(self) -> Iterator[dict[str, Any]]:
        for job, choices in zip(self._call.jobs, self._choices):
            if job.output is not None:
                for choice, sample in zip(choices, job.output.outputs):
                    part = choice.new(job.output, sample)
                    if part is not None:
                        yield part

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        if self._usage:
            outputs = [job.output for job in self._call.jobs]
            yield {**self._head, "choices": [], "usage": _usage(outputs, self._body)}

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [
            choice.new(output, sample)
            for output, row in zip(outputs, self._choices)
            for choice, sample in zip(row, output.outputs)
        ]
        return {**self._head, "choices": choices, "usage": _usage(outputs, self._body)}


def _usage(outputs: list[Any], body: CompletionBody) -> dict[str, Any]:
    found = usage(outputs)
    if body.max_tokens == 0:
        found["total_tokens"], found["completion_tokens"] = found["prompt_tokens"], 0
    return found


class _Choice:
    """One sample of one prompt: what of it has been sent."""

    def __init__(self, index: int, body: CompletionBody, prompt: str | list[int], job: Job, tokenizer: Any) -> None:
        self._index, self._body, self._job = index, body, job
        self._characters = self._tokens = 0
        self._begun = self._ended = False
        skip = job.params.skip_special_tokens
        echoed = ""
        if body.echo:
            echoed = (
                prompt if isinstance(prompt, str) else "" if tokenizer is None else detokenize(tokenizer, prompt, skip)
            )
        # SentencePiece puts a space before a text, which the text that was sent does not have.
        spaced = body.echo and tokenizer is not None and detokenize(tokenizer, job.tokens, skip) == " " + echoed
        self._echoed = echoed
        self._logprobs = LegacyLogprobs(tokenizer, body.return_tokens_as_token_ids, skip, -1 if spaced else 0)

    def new(self, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any] | None:
        """What has come since the last time as a choice, None if that is nothing."""
        check_finished(sample.finish_reason, sample.stop_reason)
        finished = sample.finish_reason is not None
        text, ids = sample.text[self._characters :], sample.token_ids[self._tokens :]
        if self._ended or not (text or ids or finished):
            return None
        if self._body.max_tokens == 0:
            text, ids, finished = "", [], True
        entries = [] if sample.logprobs is None else sample.logprobs[self._tokens : self._tokens + len(ids)]
        self._characters, self._tokens = self._characters + len(text), self._tokens + len(ids)
        logprobs = None
        shown_ids, shown_entries = list(ids), list(entries)
        if not self._begun and self._body.echo:
            text = self._echoed + text
            shown_ids, shown_entries = (
                output.prompt_token_ids + shown_ids,
                [*(output.prompt_logprobs or ()), *shown_entries],
            )
        if self._body.logprobs is not None:
            logprobs = self._logprobs.take(shown_ids, shown_entries)
        reason = ("length" if self._body.max_tokens == 0 else sample.finish_reason) if finished else None
        part: dict[str, Any] = {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        part["stop_reason"] = sample.stop_reason if finished and self._body.max_tokens != 0 else None
        if self._body.return_token_ids:
            part["prompt_token_ids"] = None if self._begun else output.prompt_token_ids
            part["token_ids"] = list(ids)
        if self._body.prompt_logprobs is not None and finished:
            part["prompt_logprobs"] = prompt_logprobs(output)
        self._begun, self._ended = True, finished
        return part
