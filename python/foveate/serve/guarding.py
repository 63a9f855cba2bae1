"""The guard in the server: over prompts before they are tokenized, and over the text of samples before anybody sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foveate.generation.outputs import CompletionOutput, RequestOutput
from foveate.guard import Finding, Guard, Screen
from foveate.serve.errors import bad_request
from foveate.serve.jobs import Job

if TYPE_CHECKING:
    from foveate.serve.protocol import Message
    from foveate.serve.served import ServedModel
    from foveate.serve.state import ServerState

_SHOWS_TOKENS = ("logprobs", "return_token_ids", "inspect")


class ServedGuard:
    """For all models of a server. What it finds is counted as foveate:guard_findings."""

    def __init__(self, guard: Guard, metrics: Any) -> None:
        self.guard, self._metrics = guard, metrics

    def count(self, model: str, findings: Sequence[Finding]) -> None:
        for found in findings:
            self._metrics.guard_findings.labels(model, found.side, found.rule, found.action).inc()

    async def text(self, state: ServerState, served: ServedModel, text: str, about: str, param: str) -> str:
        """A prompt, or part of one, as it may go on. ApiError 400 with the code content_filter for one that is blocked."""
        if not self.guard.reads("input"):
            return text
        verdict = await state.prepare(lambda: self.guard.check(text, "input", about=about))
        self.count(served.name, verdict.findings)
        if verdict.blocked is not None:
            said = self.guard.policy.message
            raise bad_request(verdict.blocked.sentence() + (f": {said}" if said else ""), param, "content_filter")
        return verdict.text

    async def prompt(
        self, state: ServerState, served: ServedModel, prompt: str | list[int], about: str
    ) -> str | list[int]:
        """A text, or token ids, which are read as the text that they stand for."""
        if isinstance(prompt, str):
            return await self.text(state, served, prompt, about, "prompt")
        tokenizer = served.llm.tokenizer
        if not self.guard.reads("input"):
            return prompt
        if tokenizer is None:
            raise bad_request("the guard reads texts, and this model has no tokenizer to read token ids with", "prompt")
        wrong = [token for token in prompt if not 0 <= token < tokenizer.vocab_size]
        text = "" if wrong else tokenizer.decode(prompt, False)  # the engine refuses ids that there are not
        allowed = await self.text(state, served, text, about, "prompt")
        return prompt if allowed == text else tokenizer.encode(allowed, add_special_tokens=False)

    async def messages(
        self, state: ServerState, served: ServedModel, messages: list[Message], about: str
    ) -> list[Message]:
        """The messages of a conversation, the texts of all roles checked."""
        found = []
        for i, message in enumerate(messages):
            content = message.content
            if isinstance(content, str):
                content = await self.text(state, served, content, about, f"messages[{i}]")
            elif content is not None:
                content = [
                    part.model_copy(update={"text": await self.text(state, served, part.text, about, f"messages[{i}]")})
                    for part in content
                ]
            found.append(message.model_copy(update={"content": content}))
        return found

    def watch(self, served: ServedModel, body: Any, jobs: Sequence[Job]) -> None:
        """From now on the outputs of the jobs are what the guard lets out. ApiError 400 for what would show tokens beside the text."""
        if not self.guard.reads("output"):
            return
        if self.guard.changes("output"):
            asked = [name for name in _SHOWS_TOKENS if getattr(body, name, None) not in (None, False)]
            if any(job.params.logprobs is not None for job in jobs) and "logprobs" not in asked:
                asked.append("logprobs")
            if asked:
                raise bad_request(
                    f"{asked[0]} shows tokens, and the guard of this server may take text out of the answer; leave it out",
                    asked[0],
                )
        for job in jobs:
            job.screen = OutputScreen(self, served.name, job.id)


class OutputScreen:
    """Screens one job. Called in the engine's thread with its outputs, one after the other; gives what of them may be seen."""

    def __init__(self, guard: ServedGuard, model: str, about: str) -> None:
        self._guard, self._model, self._about = guard, model, about
        self._samples: dict[int, _Sample] = {}

    def again(self) -> OutputScreen:
        """For the same job from its beginning."""
        return OutputScreen(self._guard, self._model, self._about)

    def __call__(self, output: RequestOutput) -> RequestOutput:
        samples = [self._screened(sample) for sample in output.outputs]
        finished = output.finished or all(sample.finish_reason is not None for sample in samples)
        return replace(output, outputs=samples, finished=finished)

    def _screened(self, sample: CompletionOutput) -> CompletionOutput:
        known = self._samples.get(sample.index)
        if known is None or not sample.text.startswith(known.read):  # of several samples the best ones come last
            known = self._samples[sample.index] = _Sample(self._guard.guard.screen("output", about=self._about))
        if known.last is not None:
            return known.last
        known.shown += known.screen.push(sample.text[len(known.read) :])
        known.read = sample.text
        if sample.finish_reason is not None:
            known.shown += known.screen.end()
        self._guard.count(self._model, known.screen.findings[known.counted :])
        known.counted = len(known.screen.findings)
        if known.screen.blocked is not None:
            seen = replace(sample, text=known.shown, finish_reason="content_filter", stop_reason=None)
        else:
            seen = replace(sample, text=known.shown)
        if seen.finish_reason is not None:
            known.last = seen
        return seen


class _Sample:
    """read: the text that the screen has had, shown: what of it is out."""

    def __init__(self, screen: Screen) -> None:
        self.screen, self.read, self.shown, self.counted = screen, "", "", 0
        self.last: CompletionOutput | None = None
