"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): `suffix` of completions, and llama.cpp's /infill for editors."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from foveate.generation.outputs import CompletionOutput, RequestOutput
from foveate.generation.params import SamplingParams
from foveate.serve.answer import Answer, Writer
from foveate.serve.errors import ApiError, bad_request, refused
from foveate.serve.jobs import Call, Job
from foveate.serve.protocol import InfillBody
from foveate.serve.sampling import check_finished, priority_of
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState


class _Family(NamedTuple):
    """Tokens around what stands before the hole, after it, and where the model writes."""

    name: str
    prefix: str
    suffix: str
    middle: str
    repository: str | None = None
    file: str | None = None


_FAMILIES = (
    _Family("Qwen", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),
    _Family("CodeGemma", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", None, "<|file_separator|>"),
    _Family("StarCoder 2", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),
    _Family("StarCoder", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<reponame>", "<filename>"),
    _Family("SantaCoder", "<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    _Family("DeepSeek", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


class FillInTheMiddle:
    """What a tokenizer has for it. ApiError 400 for a model that was not made for it."""

    def __init__(self, served: ServedModel, param: str) -> None:
        tokenizer = None if served.llm is None else served.llm.tokenizer
        backend = getattr(tokenizer, "backend", None)

        def ids(family: _Family) -> list[int | None]:
            return [None if backend is None or token is None else backend.token_to_id(token) for token in family[1:]]

        fitting = [found for family in _FAMILIES if None not in (found := ids(family))[:3]]
        if tokenizer is None or not fitting:
            names = ", ".join(family.name for family in _FAMILIES)
            raise bad_request(
                f"{served.name} has no tokens for fill-in-the-middle, so it cannot write before a suffix; known are those of {names}. "
                f"Leave {param} out, or serve a model of code that was trained for it",
                param,
            )
        self._tokenizer = tokenizer
        # Among families with the same three, the one whose tokens for files the model has.
        found = max(fitting, key=lambda row: sum(token is not None for token in row))
        self._prefix, self._suffix, self._middle, self._repository, self._file = found
        self.stops = [token for token in found if token is not None]

    def encode(self, before: str, after: str, files: list[tuple[str, str]] | None = None) -> list[int]:
        """files: (name, text) of others in the project."""
        tokenizer = self._tokenizer

        def plain(text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        ids = tokenizer.encode("")  # a beginning-of-text token where the model has one
        if files:
            if self._file is None:
                raise bad_request("this model has no token that separates files; leave input_extra out", "input_extra")
            if self._repository is not None:
                ids += [self._repository, *plain("project\n")]
            for name, text in files:
                ids += [self._file, *plain(f"{name}\n{text}\n")]
            ids += [self._file]
        return [*ids, self._prefix, *plain(before), self._suffix, *plain(after), self._middle]  # type: ignore[list-item]

    def params(self, params: SamplingParams) -> SamplingParams:
        """With an end where another file, or another hole, would begin."""
        if params.regex is not None or params.json_schema is not None:
            return params
        return params.with_(stop_token_ids=[*(params.stop_token_ids or ()), *self.stops])


async def infill(state: ServerState, body: InfillBody) -> Answer:
    served = state.open_model(body.model)
    llm, worker = served.causal()
    holes = FillInTheMiddle(served, "input_suffix")
    files = [(file.filename, file.text) for file in body.input_extra or ()]
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "stop", "repetition_penalty")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(body, name)) not in (None, [])}
    if body.n_predict is not None and body.n_predict < -1:
        raise bad_request(f"n_predict={body.n_predict} must be 1 or more, or -1 for no limit", "n_predict")
    given["max_tokens"] = None if body.n_predict in (None, -1) else body.n_predict
    try:
        params = holes.params(llm.default_params.with_(**given))
    except (ValueError, TypeError) as error:
        raise _of_infill(refused(error)) from None
    name = f"infill-{uuid.uuid4().hex}"
    before, after = body.input_prefix + body.prompt, body.input_suffix
    if state.guard is not None:
        before = await state.guard.text(state, served, before, name, "input_prefix")
        after = await state.guard.text(state, served, after, name, "input_suffix")
        files = [(file, await state.guard.text(state, served, text, name, "input_extra")) for file, text in files]

    def tokens() -> list[int]:
        ids = holes.encode(before, after, files)
        worker.engine.check(ids, params)
        return ids

    ids = await state.prepare(tokens)
    job = Job(name, ids, params, priority=priority_of(None))
    if state.guard is not None:
        state.guard.watch(served, body, [job])
    call = Call([job])
    return Answer(state, served, call, InfillWriter(served, call, holes), stream=body.stream)


def _of_infill(error: ApiError) -> ApiError:
    if error.param == "max_tokens":
        error.param, error.message = "n_predict", error.message.replace("max_tokens", "n_predict")
    return error


class InfillWriter(Writer):
    """llama.cpp's shapes; a stream ends without [DONE], with a chunk that has "stop": true."""

    def __init__(self, served: ServedModel, call: Call, holes: FillInTheMiddle) -> None:
        self._job, self._model, self._stops = call.jobs[0], served.name, frozenset(holes.stops)
        self._characters = 0

    def chunks(self) -> Iterator[dict[str, Any]]:
        if self._job.output is None:
            return
        [sample] = self._job.output.outputs
        check_finished(sample.finish_reason, sample.stop_reason)
        text = sample.text[self._characters :]
        self._characters += len(text)
        if text:
            yield {"index": 0, "content": text, "stop": False}

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        yield {**self._facts(self._job.latest), "content": ""}

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        [sample] = outputs[0].outputs
        check_finished(sample.finish_reason, sample.stop_reason)
        return {**self._facts(outputs[0]), "content": sample.text}

    def end(self, error: ApiError | None = None) -> bytes:
        return b"" if error is None else self.frame(error.body)

    def _facts(self, output: RequestOutput) -> dict[str, Any]:
        [sample] = output.outputs
        word = sample.stop_reason if isinstance(sample.stop_reason, str) else ""
        return {
            "index": 0, "stop": True, "model": self._model, "tokens_predicted": len(sample.token_ids),
            "tokens_evaluated": len(output.prompt_token_ids), "truncated": False, "stop_type": _stop_type(sample), "stopping_word": word,
        }  # fmt: skip


def _stop_type(sample: CompletionOutput) -> str:
    if sample.finish_reason == "length":
        return "limit"
    return "word" if isinstance(sample.stop_reason, str) else "eos"
