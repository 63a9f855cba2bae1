"""Checkpoints of a run: written beside and renamed, so that each is whole or not there, with links `last` and `best`."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from foveate.train.checkpoints.output_folder import STATE, Record, expose, has_links, locked, taken_over
from foveate.train.strategy import Strategy


class Checkpoints:
    """Folders step-00000120 in `folder`. Kept are those that `last` and `best` name; of the best one only the model. No other file or
    folder is touched. notes: for the user."""

    def __init__(self, folder: Path, strategy: Strategy) -> None:
        self.folder, self._strategy = folder, strategy
        self._record = Record()
        self.notes: list[str] = []

    @contextlib.contextmanager
    def claimed(self, *, resume: bool = False) -> Iterator[None]:
        """In here the folder is this run's alone. See `locked` and `taken_over` for what is refused."""
        with locked(self.folder) if self._strategy.is_main else contextlib.nullcontext():
            if self._strategy.is_main:
                self._record = taken_over(self.folder, resume=resume)
                if not has_links(self.folder):
                    self.notes.append(f"{self.folder} is on a file system without links, so last and best are copies")
            self._strategy.barrier()
            if not self._strategy.is_main:
                self._record = Record.read(self.folder) or Record()
            yield

    def check_space(self, nbytes: int) -> None:
        """OSError if the disk has no room for `nbytes` in all, what is there of them already counted."""
        free = shutil.disk_usage(self.folder).free
        own = [path for name in self._record.checkpoints for path in (self.folder / name).rglob("*")]
        there = sum(path.stat().st_size for path in own if path.is_file())
        if free + there < nbytes:
            raise OSError(
                f"the checkpoints (the best, the last, and the next one beside it) need about {_size(nbytes - there)} more, and the disk "
                f"of {self.folder} has {_size(free)} free; make room, choose another output_dir, or train LoRA adapters, which are small"
            )

    def named(self, name: str) -> Path | None:
        """The folder that `last` or `best` names."""
        found = getattr(self._record, name)
        return None if found is None else (self.folder / found).resolve()

    def save(self, step: int, write: Callable[[Path], None], *, best: bool) -> Path:
        """write(folder) fills the checkpoint, on every process. A full disk: OSError with a sentence, the last one stays."""
        final = self.folder / f"step-{step:08d}"
        temporary = final.with_name(f"{final.name}.tmp")
        if self._strategy.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / STATE).mkdir(parents=True)
        self._strategy.barrier()
        try:
            write(temporary)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            # safetensors and other writers raise errors of their own, which name the number of the system's error
            if getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error):
                kept = self.named("last")
                raise OSError(
                    f"the disk of {self.folder} is full, so checkpoint {final.name} could not be written; "
                    + (f"{kept.name} is still there: make room and go on with resume" if kept else "make room")
                ) from error
            raise
        self._strategy.barrier()
        if self._strategy.is_main:
            _sync(temporary)
            if final.exists():
                if final.name not in self._record.checkpoints:
                    raise FileExistsError(
                        f"{final} was there before and is not of this run; move it away. The checkpoint is in {temporary}"
                    )
                shutil.rmtree(final)  # of a run that went on from an earlier checkpoint
            temporary.rename(final)
            self._keep(final.name, best)
        self._strategy.barrier()
        if not self._strategy.is_main:
            self._record = Record.read(self.folder) or Record()
        self._strategy.barrier()
        return final

    def _keep(self, name: str, best: bool) -> None:
        """Makes a new checkpoint the last one, and deletes those that nothing names any more."""
        record = self._record
        record.checkpoints = sorted({*record.checkpoints, name})
        record.last = name
        if best:
            record.best = name
        record.write(self.folder)
        names = ("last", "best") if best else ("last",)
        copied = [each for each in names if expose(self.folder, each, name)]
        record.copies = sorted({*(each for each in record.copies if each not in names), *copied})
        _sync_one(self.folder)
        for other in record.checkpoints:
            if other not in (record.last, record.best):
                shutil.rmtree(self.folder / other, ignore_errors=True)
            elif other != record.last:
                shutil.rmtree(self.folder / other / STATE, ignore_errors=True)
        record.checkpoints = sorted({name for name in (record.last, record.best) if name is not None})
        record.write(self.folder)


def _sync(folder: Path) -> None:
    """To the disk, before the rename says that it is there."""
    for path in sorted(folder.rglob("*")):
        _sync_one(path)
    _sync_one(folder)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
