"""What happens to an engine whose step raised: the request that does it again alone is ended, and the others go on."""

from __future__ import annotations

import logging

from foveate.generation.engine import Engine
from foveate.generation.outputs import RequestOutput
from foveate.generation.request import Request

log = logging.getLogger("foveate.serve")


def recover(engine: Engine) -> tuple[list[RequestOutput], list[str]]:
    """Outputs of the requests that could go on, and the ids of those that failed, which are out of the engine.

    A step that raised may leave sequences half computed, so all that ran give their pages back, as in a preemption: what a sample is
    follows from its tokens. Then each runs alone until it has a token more, has ended, or raises again; that one is aborted.
    """
    with engine.lock:
        scheduler = engine.scheduler
        # Where none had begun to run, it is one of those that wait.
        among = scheduler.running or scheduler.waiting
        suspects: dict[Request, None] = dict.fromkeys(sample.request for sample in among)
        for sample in list(scheduler.running):
            scheduler.release(sample)
        bystanders, scheduler.waiting = scheduler.waiting, []
        outputs: list[RequestOutput] = []
        lost: list[str] = []
        survivors: list[Request] = []
        for request in suspects:
            try:
                outputs += _alone(engine, request)
            except Exception:
                log.exception("this request failed again, alone, and is ended", extra={"job": request.id})
                engine.abort(request.id)
                lost.append(request.id)
                scheduler.waiting = []
                continue
            survivors.append(request)
            for sample in [*scheduler.running, *scheduler.waiting]:
                scheduler.release(sample)
            scheduler.waiting = []
        scheduler.waiting = [sample for sample in bystanders if sample.request.id not in lost]
        for request in survivors:
            for sample in request.samples:
                if sample.finish_reason is None and sample not in scheduler.waiting:
                    scheduler.add(sample)
        return outputs, lost


def _alone(engine: Engine, request: Request) -> list[RequestOutput]:
    """Steps with this request only, until each of its samples that has a place has got further."""
    if request.finished:  # in the step that raised, after which nobody has told
        output = engine.abort(request.id)
        return [] if output is None else [output]
    scheduler = engine.scheduler
    for sample in request.samples:
        if sample.finish_reason is None:
            scheduler.add(sample)
    before = {sample: len(sample.tokens) for sample in request.samples}
    outputs: list[RequestOutput] = []
    while True:
        outputs += engine.step()
        if all(len(sample.tokens) > before[sample] for sample in scheduler.running):
            return outputs
