"""A model's next version: loaded beside it, given a share of its traffic, put in its place. Nothing that runs is dropped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.serve.errors import ApiError, bad_request
from foveate.serve.served import ServedAdapter, ServedModel, loader

if TYPE_CHECKING:
    from foveate.serve.state import ServerState

log = logging.getLogger("foveate.serve")


def candidate_name(model: str) -> str:
    return f"{model}@candidate"


class Versions:
    """The versions of all models of a server. Both versions are in memory until the last request of the old one has ended."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self.shares: dict[str, float] = {}  # of each model's requests, to its candidate
        self._owed: dict[str, float] = {}
        self._changing = asyncio.Lock()
        self._drains: set[asyncio.Task[None]] = set()

    def choose(self, served: ServedModel) -> ServedModel:
        """The model, or its candidate for the share of requests that it gets, evenly spread."""
        share = self.shares.get(served.name, 0.0)
        candidate = self._state.models.get(candidate_name(served.name))
        if candidate is None or candidate.state != "ready" or not share:
            return served
        owed = self._owed.get(served.name, 0.0) + share
        self._owed[served.name] = owed - 1 if owed >= 1 - 1e-9 else owed
        return candidate if owed >= 1 - 1e-9 else served

    async def reload(self, name: str, path: str | Path | None) -> None:
        """path: None for the one that it has. ApiError 400 when it cannot be loaded; then all stays as it was."""
        async with self._alone():
            old = self._model(name)
            made = await self._load(name, name, path or old.path)
            await self._replace(old, made)

    async def set_candidate(self, name: str, path: str | Path | None, share: float) -> None:
        """share: from 0 to 1. path: None keeps the candidate that there is, and changes its share."""
        async with self._alone():
            self._model(name)
            known = self._state.models.get(candidate_name(name))
            if path is not None:
                made = await self._load(name, candidate_name(name), path)
                self._state.models[made.name] = made
                self._state.metrics.add(made)
                if known is not None:
                    self._retire(known)
            elif known is None:
                raise bad_request(f"{name} has no candidate; give the path of one", "path")
            self.shares[name], self._owed[name] = share, 0.0

    async def promote(self, name: str) -> None:
        """The candidate takes the model's place, and all of its traffic."""
        async with self._alone():
            old = self._model(name)
            candidate = self._state.models.get(candidate_name(name))
            if candidate is None:
                raise bad_request(f"{name} has no candidate; begin with one", "model")
            candidate.check_ready()
            del self._state.models[candidate.name]
            self._state.metrics.remove(candidate)
            self.shares.pop(name, None)
            candidate.name = name
            await self._replace(old, candidate)

    async def remove(self, name: str) -> None:
        """The candidate is served no more; its requests end on it. All traffic is the model's again."""
        async with self._alone():
            self._model(name)
            candidate = self._state.models.get(candidate_name(name))
            if candidate is None:
                raise bad_request(f"{name} has no candidate to remove", "model")
            if candidate.state in ("waiting", "loading"):
                raise ApiError(409, f"{candidate.name} is being loaded; remove it when it is", code="busy")
            del self._state.models[candidate.name]
            self.shares.pop(name, None)
            self._owed.pop(name, None)
            self._retire(candidate)

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """ApiError 409 while another change is under way."""
        if self._changing.locked():
            raise ApiError(409, "another version is being loaded or switched to; wait for it", code="busy")
        async with self._changing:
            yield

    def _model(self, name: str) -> ServedModel:
        found = self._state.model(name)
        if found.adapter is not None or found.name.endswith("@candidate"):
            raise bad_request(f"{name} is not a model with versions; name the model itself", "model")
        return found

    async def _load(self, model: str, name: str, path: str | Path | None) -> ServedModel:
        state = self._state
        load: Callable[[], Any] | None = state.loaders.get(str(path))
        if load is None:
            if path is None:
                raise bad_request(f"{model} was not loaded from a path; give one", "path")
            load = loader(path, state.settings.options)
        made = ServedModel(name, load, state.processors)
        made.path = path
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, made.load, loop, state.on_outputs)
        if made.state != "ready":
            raise bad_request(f"it cannot be loaded: {made.error}", "path")
        if made.llm is not None:
            state.metrics.quality.of(name).attach(made.llm)
        return made

    async def _replace(self, old: ServedModel, made: ServedModel) -> None:
        """Adapters go along; one that does not fit any more is taken out."""
        state, loop = self._state, asyncio.get_running_loop()
        for adapter in [s for s in state.models.values() if isinstance(s, ServedAdapter) and s.base is old]:
            moved = ServedAdapter(adapter.name, made, adapter.folder)
            await loop.run_in_executor(None, moved.load, loop, state.on_outputs)
            state.metrics.remove(adapter)
            del state.models[adapter.name]
            if moved.state == "ready":
                state.models[moved.name] = moved
                state.metrics.add(moved)
        state.models = {name: made if served is old else served for name, served in state.models.items()}
        state.metrics.add(made)
        if made.worker is not None:
            state.admission(made).places = made.worker.engine.scheduler.max_batch
        log.info("%s is served by %s from now on", made.name, made.path)
        self._retire(old)

    def _retire(self, old: ServedModel) -> None:
        self._state.metrics.remove(old)

        async def drain() -> None:
            while old.users or (old.worker is not None and not old.worker.idle):
                await asyncio.sleep(0.05)
            await asyncio.get_running_loop().run_in_executor(None, old.stop)
            old.llm = old.pipeline = old.worker = None
            await asyncio.get_running_loop().run_in_executor(None, self._state.on_loaded)
            log.info("the last request of the former %s has ended", old.name)

        task = asyncio.get_running_loop().create_task(drain())
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)

    def stop(self) -> None:
        for task in self._drains:
            task.cancel()
