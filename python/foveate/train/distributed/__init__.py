"""Training on several processes: `DataParallel` and `FullyShard`, started by torchrun, and context parallelism."""

from foveate.train.distributed.torchrun import DataParallel, Distributed, FullyShard, started

__all__ = ["DataParallel", "Distributed", "FullyShard", "started"]
