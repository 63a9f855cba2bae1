"""The field `inspect` of a request: attention rows and logit lens of the model that answered, over the prompt and its reply.

They come from a second forward pass in the engine's thread, one chunk of it or one layer's lens between two steps, so that others wait for
no longer than for a chunk of somebody's prompt.
"""

from __future__ import annotations

import asyncio
from typing import Any

from foveate.generation.outputs import RequestOutput
from foveate.inspect.forward import Pass
from foveate.inspect.parts import Parts, parts_of
from foveate.inspect.texts import token_texts
from foveate.inspect.wanted import Wanted, wanted
from foveate.serve.errors import bad_request
from foveate.serve.jobs import Call
from foveate.serve.protocol import InspectBody
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState

MOST_TOKENS = 8192  # of prompt and reply: their keys and values are kept for the pass
MOST_ROWS = 32
MOST_WEIGHTS = 65536  # numbers in the answer, half a megabyte of JSON
_CHUNK = 256


class Inspected:
    """What one request asked for. ApiError 400 at once, for what cannot be given whatever the reply will be."""

    def __init__(self, state: ServerState, served: ServedModel, asked: InspectBody, call: Call) -> None:
        self._state, self._served, self._asked, self._call = state, served, asked, call
        if call.samples != 1:
            raise bad_request(
                f"inspect looks at one reply, and this request asks for {call.samples}; send one prompt with n=1",
                "inspect",
            )
        if asked.attention is None and asked.logit_lens is None:
            raise bad_request("inspect asks for nothing; give attention, logit_lens or both", "inspect")
        [job] = call.jobs
        llm, worker = served.causal()
        length = worker.engine.check(job.tokens, job.params)
        if length > MOST_TOKENS:
            raise bad_request(
                f"inspect takes up to {MOST_TOKENS} tokens of prompt and reply, and these may be {length}; lower max_tokens or shorten "
                "the prompt",
                "inspect",
            )
        if len(asked.rows) > MOST_ROWS:
            raise bad_request(f"inspect.rows has {len(asked.rows)} entries; at most {MOST_ROWS} are taken", "inspect")
        prompt = len(job.tokens)
        wrong = next((row for row in asked.rows if not -prompt <= row < prompt), None)
        if wrong is not None:
            raise bad_request(
                f"inspect.rows has {wrong}; rows of this prompt of {prompt} tokens go from 0 to {prompt - 1}, and counted from the end of "
                f"the reply from -1 to {-prompt}",
                "inspect",
            )
        self._llm, self._worker = llm, worker
        try:
            self._parts: Parts = parts_of(llm.model)
            self._wanted(length)
        except (ValueError, TypeError) as error:
            raise bad_request(f"inspect: {error}", "inspect") from None

    def _wanted(self, tokens: int) -> Wanted:
        asked, attention = self._asked, self._asked.attention
        return wanted(
            self._parts, tokens, attention=attention is not None, layers=None if attention is None else attention.layers,
            heads=None if attention is None else attention.heads, rows=asked.rows,
            lens_top=0 if asked.logit_lens is None else asked.logit_lens.top, max_weights=MOST_WEIGHTS,
        )  # fmt: skip

    async def run(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        """The field `inspect` of the answer. One inspection at a time for each server: each keeps keys and values of its own."""
        [output] = outputs
        tokens = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        engine, adapter = self._worker.engine, self._served.adapter

        def hidden(chunk: Any, cache: Any) -> Any:
            if adapter is None:
                return self._parts.model.hidden(chunk, cache)
            return engine.adapters.hidden(engine.adapters.model, chunk, cache, [engine.adapters[adapter]])

        async with self._state.inspecting:
            run = Pass(
                self._parts, tokens, self._wanted(len(tokens)), lambda ids: token_texts(self._llm.tokenizer, ids), hidden=hidden,
                chunk=min(_CHUNK, engine.scheduler.max_prefill_tokens),
            )  # fmt: skip

            def step() -> bool:
                with engine.lock:
                    return run.step()

            while not await asyncio.wrap_future(self._worker.between_steps(step)):
                pass
            return await self._state.prepare(lambda: run.result().to_dict())


def inspected(state: ServerState, served: ServedModel, asked: InspectBody | None, call: Call) -> Inspected | None:
    return None if asked is None else Inspected(state, served, asked, call)
