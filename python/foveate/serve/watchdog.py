"""Engines that hang, or whose thread has ended, begin again, with the requests of which nobody has seen anything."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from foveate.serve.errors import ApiError

if TYPE_CHECKING:
    from foveate.serve.served import ServedModel
    from foveate.serve.state import ServerState

log = logging.getLogger("foveate.serve")


class Watchdog:
    """Looks at each engine several times in `hang_timeout`; restarts one up to `most` times, after which /health asks for a new process.

    A step that never returns cannot be ended: its thread is left behind, and its cache with it until the step does return.
    """

    def __init__(self, state: ServerState, hang_timeout: float, most: int) -> None:
        self._state, self.hang_timeout, self._most = state, hang_timeout, most
        self.restarts: dict[str, int] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(min(0.5, self.hang_timeout / 5))
            for served in list(self._state.models.values()):
                if self.hangs(served) and self.may_restart(served):
                    try:
                        self._restart(served)
                    except Exception:
                        self.restarts[served.name] = self._most
                        log.exception("the engine of %s could not be restarted", served.name)

    def hangs(self, served: ServedModel) -> bool:
        worker = served.worker
        if worker is None or served.adapter is not None or worker.stopping:
            return False
        return not worker.alive or worker.stalled_for > self.hang_timeout

    def may_restart(self, served: ServedModel) -> bool:
        worker = served.worker
        on_cpu = worker is not None and worker.engine.device.type == "cpu"  # a kernel that hangs keeps the whole GPU
        return on_cpu and self.restarts.get(served.name, 0) < self._most

    def _restart(self, served: ServedModel) -> None:
        _, worker = served.causal()
        seconds = worker.stalled_for
        engine = worker.engine.fresh()
        again, lost = worker.restart(engine)
        served.llm.engine = engine
        self.restarts[served.name] = self.restarts.get(served.name, 0) + 1
        log.error(
            "the engine of %s had made no step for %.1f s and was restarted: %d requests begin again, %d are ended",
            served.name, seconds, again, lost,
        )  # fmt: skip


def ended(job_id: str) -> ApiError:
    return ApiError(
        500,
        f"the engine hung while it ran this request ({job_id}), and has been restarted; ask again",
        code="engine_restarted",
    )
