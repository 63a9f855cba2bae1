"""What a request gives back: vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """How probable a token was."""

    logprob: float  # log_softmax of the model's raw logits
    rank: int  # 1 for the most probable token
    decoded_token: str


@dataclass
class CompletionOutput:
    """One sample. text continues the prompt; token_ids include a final end or stop token, the text does not."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # the sum over token_ids; None unless logprobs, best_of or beams asked for it
    logprobs: list[dict[int, Logprob]] | None  # per token: the chosen and the most probable ones
    finish_reason: str | None  # "stop", "length", or "abort"; None while it runs
    # the stop string or id of the request, None for the model's own end; with "abort" the sentence why this sample could not go on
    stop_reason: int | str | None = None


@dataclass
class RequestMetrics:
    """Times are seconds on time.perf_counter's clock."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    cached_tokens: int = 0  # of the prompt, that the prefix cache had
    preemptions: int = 0
    drafted_tokens: int = 0  # by prompt_lookup or a draft model
    accepted_tokens: int = 0  # of those


@dataclass
class RequestOutput:
    """A request and what it has given so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # None for the first token
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics = field(repr=False)
