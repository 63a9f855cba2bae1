"""The server's state: models, admission, metrics, and whether it is draining."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from foveate.generation.params import SamplingParams
from foveate.guard import Guard
from foveate.serve.admission import Admission
from foveate.serve.canary import Canary, read_golden
from foveate.serve.errors import ApiError, bad_request, of_model, refused
from foveate.serve.guarding import ServedGuard
from foveate.serve.jobs import Job
from foveate.serve.keys import Keys, caller
from foveate.serve.metrics import Metrics
from foveate.serve.processors import Processors
from foveate.serve.quality import Quality
from foveate.serve.served import ServedAdapter, ServedModel, loader
from foveate.serve.settings import ServeSettings
from foveate.serve.tracing import Tracing
from foveate.serve.versions import Versions, candidate_name
from foveate.serve.watchdog import Watchdog

log = logging.getLogger("foveate.serve")
_GRAMMAR_SECONDS = 10.0
# The models that the request has been given, so that none of them is stopped before it has ended.
users: ContextVar[list[ServedModel]] = ContextVar("users")


class ServerState:
    """loaders: what makes each model, for tests; by default `loader` of each path in the settings."""

    def __init__(self, settings: ServeSettings, loaders: dict[str, Callable[[], Any]] | None = None) -> None:
        self.settings = settings
        self.loaders = loaders or {}  # by name or path, in place of `loader`
        paths = settings.models | {candidate_name(name): path for name, (path, _) in settings.candidates.items()}
        self.models: dict[str, ServedModel] = {}
        self.processors = Processors.split(settings.http_processors)
        for name, path in paths.items():
            load = self.loaders.get(name) or self.loaders.get(str(path)) or loader(path, settings.options)
            self.models[name] = ServedModel(name, load, self.processors)
            self.models[name].path = path
        first = next(iter(self.models.values()))
        self.versions = Versions(self)
        self.versions.shares |= {name: share for name, (_, share) in settings.candidates.items()}
        self.models |= {name: ServedAdapter(name, first, folder) for name, folder in settings.adapters.items()}
        self.keys = Keys(settings.api_keys)
        self.metrics = Metrics(self.models.values(), self.keys.names, Quality(settings.quality_reference))
        self.guard = None if settings.guard is None else ServedGuard(Guard(settings.guard), self.metrics)
        if self.guard is not None:
            self.metrics.guards(self.guard.guard.rules)
        self._admissions: dict[str, Admission] = {}
        # Tokenizing, templates, grammars and encoders; the event loop does none of it for long texts.
        self.pool = ThreadPoolExecutor(4, thread_name_prefix="foveate-prepare")
        on_model = None if self.processors is None else self.processors.use_model
        self._encoder_pool = ThreadPoolExecutor(1, thread_name_prefix="foveate-encoder", initializer=on_model)
        self._encoding = 0
        self.inspecting = asyncio.Lock()  # an inspection keeps keys and values of its own, so there is one at a time
        # A pool of its own: a grammar that takes for ever holds up other grammars only.
        self._grammar_pool = ThreadPoolExecutor(1, thread_name_prefix="foveate-grammar")
        self.started = time.time()
        self.draining = False
        self.in_flight = 0  # requests to the API, from their first byte to their last
        goldens = [] if settings.canary is None else read_golden(settings.canary)
        self.canary = Canary(self, goldens, settings.canary_every) if goldens else None
        self.tracing = Tracing.from_environment()
        self.watchdog = Watchdog(self, settings.hang_timeout, settings.max_engine_restarts)
        self._tasks: list[asyncio.Task[None]] = []
        self.on_failed_load: Callable[[], None] = lambda: None
        self.on_loaded: Callable[[], None] = lambda: None  # in the thread that has loaded, or let go of, models

    def start(self) -> None:
        """In the event loop: the models load one after the other in a thread, while the server answers."""
        loop = asyncio.get_running_loop()
        if self.processors is not None:
            self.processors.use_http()

        def load_all() -> None:
            if self.processors is not None:
                self.processors.use_model()
            for served in list(self.models.values()):
                served.load(loop, self.on_outputs)
                if served.state == "failed":
                    self.on_failed_load()
                elif served.llm is not None and served.adapter is None:
                    self.metrics.quality.of(served.name).attach(served.llm)
            self.on_loaded()

        threading.Thread(target=load_all, name="foveate-load", daemon=True).start()
        self._tasks.append(loop.create_task(self.watchdog.run()))
        if self.canary is not None:
            self._tasks.append(loop.create_task(self.canary.run()))

    def on_outputs(self, served: ServedModel, jobs: list[Job]) -> None:
        admission = self.admission(served)
        for job in jobs:
            if job.call is None or job.call.begun:
                continue
            if job.started is not None:
                admission.turns.began(job.turn)
            if job.generated:
                admission.began(job.call)
                job.call.begun = len(job.call.jobs) == 1
        self.metrics.on_outputs(served, jobs)

    def admission(self, served: ServedModel) -> Admission:
        """That of its engine."""
        served = served.base
        found = self._admissions.get(served.name)
        if found is None:
            places = 1 if served.worker is None else served.worker.engine.scheduler.max_batch
            shared = len(self.keys) > 1
            found = Admission(places, self.settings.max_queue, self.settings.max_queue_tokens, shared=shared)
            self._admissions[served.name] = found
        return found

    def model(self, name: str | None) -> ServedModel:
        """By its name; None and "default" are the first. ApiError for another name, with those that there are, and for one that the
        caller's key may not use."""
        found = self._named(name)
        key = caller.get()
        if key is not None:
            key.check_model(found.name)
        return found

    def _named(self, name: str | None) -> ServedModel:
        if name is not None:
            name = self.settings.aliases.get(name, name)
        if name is None or (name == "default" and name not in self.models):
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(
                404,
                f"there is no model {name[:100]!r} here; there are {', '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    async def load_adapter(self, name: str, folder: Path, base: str | None) -> None:
        """ApiError 400 for what cannot be loaded. One of the same name is replaced; its requests run on with what they began with."""
        old = self.models.get(name)
        if old is not None and old.adapter is None:
            raise bad_request(f"{name} is the name of a model; choose another for the adapter", "lora_name")
        made = ServedAdapter(name, self.open_model(base).base, folder)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self.pool, made.load, loop, self.on_outputs)
        if made.state != "ready":
            raise bad_request(f"the adapter cannot be loaded: {made.error}", "lora_path")
        if old is not None:
            self.metrics.remove(old)
        self.models[name] = made
        self.metrics.add(made)

    async def unload_adapter(self, name: str) -> None:
        served = self.model(name)
        if served.adapter is None:
            raise bad_request(f"{name} is a model, not an adapter", "lora_name")
        llm, worker = served.causal()
        del self.models[name]
        self.metrics.remove(served)
        await asyncio.wrap_future(worker.between_steps(lambda: llm.engine.adapters.unload(name)))

    def open_model(self, name: str | None) -> ServedModel:
        """`model`, for a request that makes work. ApiError 503 while the server drains or the model loads."""
        served = self.model(name)
        if self.draining:
            reason = "the server is shutting down and takes no new requests"
            raise of_model(ApiError(503, reason, code="draining", retry_after=1), served.name)
        served.check_ready()
        key = caller.get()
        if key is not None:
            try:
                key.begin()
            except ApiError as error:
                raise of_model(error, served.name) from None
        served = self.versions.choose(served)
        users.get().append(served.base)
        served.base.users += 1
        return served

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether requests will be answered now, and what is waited for."""
        waiting: list[str] = []
        models = {}
        for served in self.models.values():
            worker = served.base.worker
            models[served.name] = served.state
            if served.state == "failed":
                waiting.append(f"the model {served.name} could not be loaded; the server's log has the reason")
            elif served.state != "ready":
                waiting.append(
                    f"the model {served.name} is {'being loaded' if served.state == 'loading' else 'waiting to be loaded'}"
                )
            elif worker is not None and not worker.alive:
                waiting.append(f"the engine of {served.name} has ended")
            elif worker is not None and worker.stalled_for > self.settings.stall_timeout:
                waiting.append(
                    f"the engine of {served.name} has work and has made no step for {worker.stalled_for:.1f} s, of at most "
                    f"{self.settings.stall_timeout:g}"
                )
        if self.draining:
            waiting.append(f"the server is shutting down; {self.in_flight} requests still run")
        status = "ready" if not waiting else "draining" if self.draining else "waiting"
        return not waiting, {"status": status, "waiting_for": waiting, "models": models}

    def hanging(self) -> list[str]:
        """Models whose engine makes no steps, and cannot be restarted: the process had better be started again."""
        watchdog = self.watchdog
        return [s.name for s in self.models.values() if watchdog.hangs(s) and not watchdog.may_restart(s)]

    async def prepare(self, work: Callable[..., Any], *args: Any, heavy: bool = True, pool: Any = None) -> Any:
        """work(*args) in a thread, or here when it is known to be short. ValueError and TypeError become a 400."""
        try:
            if not heavy:
                return work(*args)
            return await asyncio.get_running_loop().run_in_executor(pool or self.pool, work, *args)
        except (ValueError, TypeError) as error:
            raise refused(error) from None
        except ImportError as error:
            raise bad_request(str(error)) from None

    async def grammar(self, served: ServedModel, params: SamplingParams) -> Any:
        """The compiled grammar, None without one. ApiError 400 for one that cannot be followed, or takes too long to compile."""
        if params.json_schema is None and params.regex is None:
            return None
        _, worker = served.causal()
        work = self.prepare(worker.engine.compile, params, pool=self._grammar_pool)
        try:
            return await asyncio.wait_for(work, _GRAMMAR_SECONDS)
        except ApiError:
            self.metrics.schema_failures.labels(served.name, "refused").inc()
            raise
        except asyncio.TimeoutError:
            self.metrics.schema_failures.labels(served.name, "refused").inc()
            raise bad_request(
                f"the schema or expression has not been compiled within {_GRAMMAR_SECONDS:g} s; use a simpler one",
                "response_format",
            ) from None

    async def encode(self, served: ServedModel, work: Callable[..., Any], *args: Any) -> Any:
        """`prepare` for an encoder: one text batch at a time, and at most max_queue wait. ApiError 429 beyond."""
        if self._encoding > self.settings.max_queue:
            reason = f"the server is full: {self._encoding} requests to encoders run or wait; try again in 2 s"
            raise of_model(ApiError(429, reason, code="queue_full", retry_after=2), served.name)
        self._encoding += 1
        try:
            return await self.prepare(work, *args, pool=self._encoder_pool)
        finally:
            self._encoding -= 1

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        self.versions.stop()
        self._tasks = []
        for served in self.models.values():
            served.stop()
        if self.tracing is not None:
            self.tracing.stop()
            self.tracing = None
        for pool in (self.pool, self._encoder_pool, self._grammar_pool):
            pool.shutdown(wait=False, cancel_futures=True)
