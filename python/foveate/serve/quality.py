"""What is watched of the replies themselves, without keeping any text: how sure, how long, how empty, how repetitive, and thumbs."""

from __future__ import annotations

import json
from collections import OrderedDict, deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from foveate.generation.outputs import CompletionOutput
from foveate.serve.errors import ApiError
from foveate.serve.jobs import Job
from foveate.serve.prompt_shift import PromptShift
from foveate.serve.token_probe import TokenProbe, TokenWindow

WINDOW = 256  # replies and prompts
RATINGS = ("up", "down")
_REMEMBERED = 10_000  # ids of answers that may be rated
_GRAM, _LOOKED_AT = 4, 256  # tokens of a group, tokens at the end of a reply


class Reply(NamedTuple):
    by_length: bool
    empty: bool
    repeated: bool


def repeats_itself(tokens: Sequence[int]) -> bool:
    """Whether, of at least 32 last tokens, fewer than half of the groups of four are different ones."""
    tail = tuple(tokens[-_LOOKED_AT:])
    groups = [tail[i : i + _GRAM] for i in range(len(tail) - _GRAM + 1)]
    return len(tail) >= 32 and len(set(groups)) < len(groups) / 2


class ModelQuality:
    """The quality of one model: windows of its last replies, prompts and tokens."""

    def __init__(self, owner: Quality, reference: dict[str, list[float]] | None = None) -> None:
        self._owner = owner
        self.tokens = TokenWindow()
        self.prompts = PromptShift(WINDOW, reference)
        self._replies: deque[Reply] = deque(maxlen=WINDOW)

    def attach(self, llm: Any) -> None:
        """In the thread that has loaded the model. Of its requests, those to an adapter count as the adapter's."""
        llm.engine.on_chosen = TokenProbe(lambda adapter: (self if adapter is None else self._owner.of(adapter)).tokens)
        if llm.tokenizer is not None:
            self.prompts.read_scripts(llm.tokenizer)

    def ended(self, sample: CompletionOutput) -> None:
        if sample.finish_reason in ("stop", "length"):
            text = sample.text.strip()
            self._replies.append(Reply(sample.finish_reason == "length", not text, repeats_itself(sample.token_ids)))

    def numbers(self) -> dict[str, float]:
        """By the names of their metrics, without `foveate:`."""
        count = len(self._replies)
        shares = [sum(column) / count for column in zip(*self._replies)] if count else [0.0] * len(Reply._fields)
        logprob, entropy, tokens = self.tokens.means()
        lengths, scripts = self.prompts.indices()
        return {
            "reply_logprob_mean": logprob, "reply_entropy_mean": entropy, "reply_probed_tokens": tokens, "reply_window": count,
            "reply_length_share": shares[0], "reply_empty_share": shares[1], "reply_repeated_share": shares[2],
            "prompt_length_psi": lengths, "prompt_script_psi": scripts,
        }  # fmt: skip


# Each number of `ModelQuality` as /metrics explains it.
EXPLAINED = {
    "reply_logprob_mean": "Mean log-probability of a generated token, over a sample of the last ones.",
    "reply_entropy_mean": "Mean entropy of the distribution that a token came from, in nats, over the same.",
    "reply_probed_tokens": "Tokens that these two are the mean of.",
    "reply_window": "Replies that the shares are of.",
    "reply_length_share": "Share of the last replies that ended at their largest length.",
    "reply_empty_share": "Share of the last replies without a character.",
    "reply_repeated_share": "Share of the last replies that repeat themselves.",
    "prompt_length_psi": "Population stability index of the lengths of prompts against the reference.",
    "prompt_script_psi": "Population stability index of the scripts of prompts against the reference.",
}


class Quality:
    """The quality of all models, and which answers can be rated."""

    def __init__(self, reference_file: Path | None = None) -> None:
        self._references = {} if reference_file is None else read_references(reference_file)
        self._models: dict[str, ModelQuality] = {}
        self._answers: OrderedDict[str, str | None] = OrderedDict()  # the model of each, None: rated

    def of(self, model: str) -> ModelQuality:
        if model not in self._models:
            self._models[model] = ModelQuality(self, self._references.get(model))
        return self._models[model]

    def began(self, model: str, job: Job) -> None:
        """When its first token has come."""
        self.of(model).prompts.add(job.tokens)
        self._answers[answer_id(job.id)] = model
        while len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)

    def ended(self, model: str, job: Job) -> None:
        """With its last token."""
        for sample in job.latest.outputs:
            self.of(model).ended(sample)

    def rate(self, answer: str) -> str:
        """The model that gave it. ApiError 404 for an id that is none, or too old; 409 for one that has been rated."""
        if answer not in self._answers:
            reason = f"there is no answer {answer[:100]!r} among the last {_REMEMBERED}; id is that of a completion"
            raise ApiError(404, reason, param="id", code="answer_not_found")
        model = self._answers[answer]
        if model is None:
            raise ApiError(409, f"the answer {answer} has been rated already", param="id", code="already_rated")
        self._answers[answer] = None
        return model

    def report(self) -> dict[str, Any]:
        """For /quality: by model the numbers, and the reference to keep as a file."""
        return {
            name: {"numbers": found.numbers(), "reference": found.prompts.reference()} for name, found in self._models.items()
        }  # fmt: skip


def answer_id(job_id: str) -> str:
    """That of the answer which the client has seen: a completion has a job for each of its prompts, cmpl-...-0, cmpl-...-1."""
    head, dash, tail = job_id.rpartition("-")
    return head if dash and tail.isdigit() and job_id.startswith("cmpl-") and head != "cmpl" else job_id


def read_references(file: Path) -> dict[str, dict[str, list[float]]]:
    """A saved answer of /quality. ValueError, with the file, for something else."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        found = {name: entry["reference"] for name, entry in report.items() if entry["reference"] is not None}
        for reference in found.values():
            PromptShift(WINDOW, reference)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is no answer of /quality: {error}") from None
    if not found:
        raise ValueError(f"{file} has no reference; /quality has one after {WINDOW} prompts")
    return found
