"""Golden prompts that run through the live engine again and again: since no load changes their tokens, a change is a fault."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.generation.params import SamplingParams
from foveate.serve.jobs import INTERNAL, Call, Job

if TYPE_CHECKING:
    from foveate.serve.served import ServedModel
    from foveate.serve.state import ServerState

log = logging.getLogger("foveate.serve")
# A prompt is computed in chunks that depend on what else runs, and chunks agree to fp32 rounding: below this difference of
# log-probabilities two tokens are a tie, which may fall either way; above it a log-probability has changed.
TIE = TOLERANCE = 1e-3
_KEYS = {"prompt", "model", "max_tokens", "token_ids", "logprobs", "margins"}


@dataclass
class Golden:
    """A line of the file. token_ids, logprobs, margins: what is expected; None: what the first run gives."""

    prompt: str | list[int]
    model: str | None = None
    max_tokens: int = 32
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    margins: list[float] | None = None  # from the most probable token to the second
    result: str = "pending"  # then "same", "drift" or "failed"
    why: str | None = None

    def expected(self) -> dict[str, Any]:
        """As it stands in a file."""
        return {key: value for key in sorted(_KEYS) if (value := getattr(self, key)) is not None}


@dataclass
class Seen:
    token_ids: list[int]
    logprobs: list[float]
    margins: list[float] = field(default_factory=list)


def read_golden(file: Path) -> list[Golden]:
    """One JSON object a line. ValueError, with the line, for what is none."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            unknown = sorted(set(entry) - _KEYS)
            if unknown:
                raise ValueError(f"{unknown[0]} is not known; there are {', '.join(sorted(_KEYS))}")
            golden = Golden(**entry)
            SamplingParams(max_tokens=golden.max_tokens)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
        given = [golden.token_ids, golden.logprobs, golden.margins]
        if any(values is None for values in given) != all(values is None for values in given):
            raise ValueError(
                f"{file}, line {number}: token_ids, logprobs and margins go together; /canary gives all three"
            )
        found.append(golden)
    if not found:
        raise ValueError(f'{file} holds no prompt; write one a line, such as {{"prompt": "Once upon a time"}}')
    return found


def difference(golden: Golden, seen: Seen) -> str | None:
    """Why what was seen is not what is expected; None where it is, up to the first tie that fell the other way, and before a first run."""
    if golden.token_ids is None or golden.logprobs is None or golden.margins is None:
        return None
    for i, (wanted, got) in enumerate(zip(golden.token_ids, seen.token_ids)):
        if wanted != got:
            return None if golden.margins[i] < TIE else f"token {i} is {got}, not {wanted}"
        off = abs(golden.logprobs[i] - seen.logprobs[i])
        if not off <= TOLERANCE:  # NaN too
            return f"token {i} has the log-probability {seen.logprobs[i]:.6f}, not {golden.logprobs[i]:.6f}"
    if len(golden.token_ids) != len(seen.token_ids):
        return f"{len(seen.token_ids)} tokens came, not {len(golden.token_ids)}"
    return None


class Canary:
    """Runs each prompt every `every` seconds, one after the other, in the same batches as everybody's requests."""

    def __init__(self, state: ServerState, goldens: list[Golden], every: float) -> None:
        self._state, self.goldens, self._every = state, goldens, every
        self.rounds = 0
        self.finished: float | None = None  # the last round, seconds since 1970

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await self.round()
            await asyncio.sleep(self._every)

    async def round(self) -> None:
        for golden in self.goldens:
            served = self._state.model(golden.model)
            while served.state not in ("ready", "failed"):
                await asyncio.sleep(0.05)
            if self._state.draining:
                return
            try:
                seen = await self._generate(served, golden)
            except Exception as error:
                golden.result, golden.why = "failed", str(error)
            else:
                self._judge(golden, seen)
            self._state.metrics.canary_runs.labels(served.name, golden.result).inc()
            if golden.result != "same":
                log.error("a golden prompt of %s: %s: %s", served.name, golden.result, golden.why)
        self.rounds, self.finished = self.rounds + 1, time.time()

    def _judge(self, golden: Golden, seen: Seen) -> None:
        if golden.token_ids is None:
            golden.token_ids, golden.logprobs, golden.margins = seen.token_ids, seen.logprobs, seen.margins
        golden.why = difference(golden, seen)
        golden.result = "same" if golden.why is None else "drift"

    async def _generate(self, served: ServedModel, golden: Golden) -> Seen:
        llm, worker = served.causal()
        ids = llm.encode(golden.prompt) if isinstance(golden.prompt, str) else golden.prompt
        # prompt_logprobs: the whole prompt is computed, whatever the prefix cache has
        params = SamplingParams(temperature=0, max_tokens=golden.max_tokens, logprobs=2, prompt_logprobs=0)
        job = Job(f"{INTERNAL}{id(golden)}-{self.rounds}", ids, params, internal=True)
        worker.submit([job])
        try:
            [output] = await Call([job]).result()
        finally:
            worker.abort([job])
        [sample] = output.outputs
        if sample.finish_reason == "abort":
            raise RuntimeError(str(sample.stop_reason))
        entries = sample.logprobs or []
        best = [sorted((found.logprob for found in entry.values()), reverse=True) for entry in entries]
        own = [entry[token].logprob for token, entry in zip(sample.token_ids, entries)]
        return Seen(sample.token_ids, own, [values[0] - values[-1] for values in best])

    def report(self) -> dict[str, Any]:
        """For /canary: the lines to keep as a file are under "expected"."""
        results = {golden.result for golden in self.goldens}
        status = next((r for r in ("drift", "failed", "pending") if r in results), "same")
        prompts = [{"result": g.result, "why": g.why, "expected": g.expected()} for g in self.goldens]
        return {"status": status, "rounds": self.rounds, "finished": self.finished, "prompts": prompts}
