"""Training in several processes: DDP, FSDP2, and with either context parallelism, which spreads each sequence over ranks."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foveate.models.registry import ARCHITECTURES
from foveate.train.checkpoints import state
from foveate.train.data.batch import Batch
from foveate.train.distributed.context_parallel import spread
from foveate.train.strategy import Strategy

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def started(
    name: str, device: str | None, context_parallel: int = 1, timeout_minutes: float = 30
) -> Iterator[Strategy]:
    """The strategy `name` ("ddp" or "fsdp") in this process of a torchrun, whose process group it joins, and leaves at the end.

    device: "cuda" gives each rank a GPU of its own, and NCCL; None or "cpu" is gloo. ValueError outside of torchrun.
    """
    if not dist.is_available():
        raise ValueError(
            "this PyTorch is built without torch.distributed; install one that has it, or train in one process"
        )
    missing = [variable for variable in _TORCHRUN if variable not in os.environ]
    if missing:
        raise ValueError(
            f"strategy={name!r} is for several processes, and the environment has no {', '.join(missing)}; start them with "
            f"torchrun --nproc-per-node 2 -m foveate train ... --strategy {name}"
        )
    place = torch.device(device or "cpu")
    if place.type == "cuda":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= found:
            raise ValueError(
                f"process {local} of this machine has no GPU of its own: there are {found}; start no more than that"
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    _join(place, datetime.timedelta(minutes=timeout_minutes))
    yield {"ddp": DataParallel, "fsdp": FullyShard}[name](place, context_parallel)
    dist.destroy_process_group()  # not after an error: with NCCL it might wait for processes that never come


def _join(place: torch.device, timeout: datetime.timedelta) -> None:
    store, process, processes = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(processes):
        # torchrun's store outlives its processes: those that it restarts would find addresses of the dead there (pytorch issue 135712).
        # The count is each machine's own, so on several of them torchrun has to be told; docs/guide/distributed.md says how.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend, device_id = ("nccl", place) if place.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend, store=store, rank=process, world_size=processes, timeout=timeout, device_id=device_id
    )


class Distributed(Strategy):
    """What DDP and FSDP2 have in common, in the process group that there is.

    Both take the mean of the gradients, so each process multiplies its loss by their number. The loop has divided the loss by the units
    of all processes together, which may have different numbers of them.
    context_parallel: so many processes in a row read the same rows and hold a part of each.
    """

    def __init__(self, device: torch.device, context_parallel: int = 1) -> None:
        processes = dist.get_world_size()
        if context_parallel < 1 or processes % context_parallel:
            raise ValueError(
                f"context_parallel={context_parallel} does not divide the {processes} processes; start a multiple of it"
            )
        self.device, self.process = device, dist.get_rank()
        self.rank, self.world_size = self.process // context_parallel, processes // context_parallel
        self.gradient_factor = float(processes)
        self._ring: dist.ProcessGroup | None = None
        self._spreads = context_parallel > 1
        for first in range(0, processes if self._spreads else 0, context_parallel):
            group = dist.new_group(list(range(first, first + context_parallel)))  # every process makes every group
            if first <= self.process < first + context_parallel:
                self._ring = group

    def share(self, batch: Batch) -> Batch:
        return spread(batch, self._ring) if self._spreads else batch

    def sum(self, values: Tensor) -> Tensor:
        total = values.detach().clone()
        dist.all_reduce(total)
        return total

    def barrier(self) -> None:
        dist.barrier()

    def save_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
    ) -> None:
        from foveate.train.checkpoints import sharded  # which a torch without torch.distributed cannot import

        sharded.save(folder, model, optimizer, scalars)


class DataParallel(Distributed):
    """Every process has the whole model; gradients are averaged during the backward pass (Li et al. 2020, arXiv 2006.15704)."""

    _reduced = False  # whether DDP has seen a backward pass

    def wrap(self, module: nn.Module) -> nn.Module:
        ids = [self.device] if self.device.type == "cuda" else None
        # a static graph may have parameters without gradients, such as the pooler under a head that does not pool
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, static_graph=True)

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        # The first pass of a static graph has to be reduced. Reducing it twice changes nothing: a mean of means.
        with contextlib.nullcontext() if last or not self._reduced else module.no_sync():  # type: ignore[operator]
            yield
        self._reduced = True


# Where layers read others' weights, as T5's, all weights are gathered at once.
_LAYERS = tuple(architecture.layer for architecture in ARCHITECTURES if architecture.layers_stand_alone)


class FullyShard(Distributed):
    """Parameters, gradients and optimizer state are split over the processes; a layer's are whole only while it is computed (FSDP2;
    Zhao et al. 2023, arXiv 2304.11277). The weights in a TrainResult are this process's part; the whole is in the checkpoint."""

    def wrap(self, module: nn.Module) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if self.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise ValueError(
                f"fsdp on the CPU needs torch 2.7 or later, this is {torch.__version__}; take strategy='ddp'"
            )
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        for layer in [part for part in module.modules() if isinstance(part, _LAYERS)]:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
        self._module = module
        return module

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield

    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        return super().clip(parameters, max_norm).full_tensor()  # type: ignore[attr-defined]

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        self._split()
        found = {}
        for name, p in model.named_parameters():
            whole = p.detach().full_tensor()  # type: ignore[attr-defined]
            if self.is_main:
                found[name] = whole.cpu()
        return found

    def save_state(
        self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, scalars: dict[str, Any]
    ) -> None:
        self._split()
        super().save_state(folder, model, optimizer, scalars)

    def load_state(self, folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        if (folder / state.TENSORS).exists():
            raise ValueError(
                f"{folder} was saved by a single process, whose state fsdp cannot split; go on with strategy='ddp', or start a new run "
                "from the weights beside it"
            )
        return super().load_state(folder, model, optimizer)

    def _split(self) -> None:
        """After a forward pass without a backward, what lies outside of the layers is still whole."""
        from torch.distributed.fsdp import FSDPModule

        for part in self._module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
