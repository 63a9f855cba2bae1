"""Which replica a request goes to: the one whose prefix cache knows the longest beginning of its prompt, unless it is busier."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

_BLOCK = 64  # characters


class PrefixTable:
    """Beginnings of prompts, in blocks of 64 characters, and the replicas that have had them; the latest `most` blocks are kept."""

    def __init__(self, most: int = 100_000) -> None:
        self._most = most
        self._replicas: OrderedDict[int, set[Any]] = OrderedDict()

    @staticmethod
    def _blocks(prefix: str) -> Iterator[int]:
        """A number for each beginning of whole blocks."""
        number = 0
        for start in range(0, len(prefix) - _BLOCK + 1, _BLOCK):
            number = hash((number, prefix[start : start + _BLOCK]))
            yield number

    def best(self, prefix: str, among: Collection[Any]) -> set[Any]:
        """The replicas among these that have had the longest beginning; none where nobody has had one block of it."""
        replicas: set[Any] = set()
        for block in self._blocks(prefix):
            known = self._replicas.get(block, set()) & set(among)
            if not known:
                break
            replicas = known
        return replicas

    def record(self, prefix: str, replica: Any) -> None:
        for block in self._blocks(prefix):
            self._replicas.setdefault(block, set()).add(replica)
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._most:
            self._replicas.popitem(last=False)

    def forget(self, replica: Any) -> None:
        for replicas in self._replicas.values():
            replicas.discard(replica)


class PrefixRouter(RequestRouter):
    """For Ray Serve, in each process of the ingress; it learns from what it has sent. The first argument of a request has `prefix`."""

    def initialize_state(self, imbalance: int = 8) -> None:
        self._imbalance = imbalance
        self._table = PrefixTable()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks: Ray takes the idler one of the first rank that has room."""
        others = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        prefix = _prefix(pending_request)
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        known = self._table.best(prefix, by_id)
        if not known:
            return [others]
        lengths = {number: self.replica_queue_len_cache.get(number) or 0 for number in by_id}
        idlest = min(lengths.values())
        chosen = [by_id[number] for number in known if lengths[number] - idlest <= self._imbalance]
        return [chosen, others] if chosen else [others]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._table.record(_prefix(pending_request), replica_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._table.forget(replica_id)


def _prefix(request: PendingRequest | None) -> str:
    return getattr(request.args[0], "prefix", "") if request is not None and request.args else ""
