"""Checkpoints of a run: written beside and renamed, so that each is whole or not there, with links `last` and `best`."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from foveate.train.strategy import Strategy

STATE = "state"  # the part of a checkpoint that only a run that goes on needs


class Checkpoints:
    """Folders step-00000120 in `folder`. Kept are those that `last` and `best` name; of the best one only the model."""

    def __init__(self, folder: Path, strategy: Strategy) -> None:
        self.folder, self._strategy = folder, strategy

    def prepare(self) -> None:
        """Makes the folder; OSError with a sentence where that cannot be done or nothing can be written there."""
        if self._strategy.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                probe = self.folder / f".write-{os.getpid()}"
                probe.write_bytes(b"")
                probe.unlink()
            except OSError as error:
                raise OSError(
                    f"the output folder {self.folder} cannot be written ({error.strerror}); choose another output_dir"
                ) from error
            for unfinished in self.folder.glob("step-*.tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self._strategy.barrier()

    def check_space(self, nbytes: int) -> None:
        """OSError if the disk has no room for `nbytes` in all, what is there of them already counted."""
        free = shutil.disk_usage(self.folder).free
        there = sum(file.stat().st_size for file in self.folder.glob("step-*/**/*") if file.is_file())
        if free + there < nbytes:
            raise OSError(
                f"the checkpoints (the best, the last, and the next one beside it) need about {_size(nbytes - there)} more, and the disk "
                f"of {self.folder} has {_size(free)} free; make room, choose another output_dir, or train LoRA adapters, which are small"
            )

    def named(self, name: str) -> Path | None:
        """The folder that `last` or `best` names."""
        link = self.folder / name
        return link.resolve() if link.exists() else None

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
            if final.exists():  # of a run that went on from an earlier checkpoint
                shutil.rmtree(final)
            temporary.rename(final)
            self._link("last", final)
            if best:
                self._link("best", final)
            self._forget()
        self._strategy.barrier()
        return final

    def _link(self, name: str, target: Path) -> None:
        new = self.folder / f".{name}.{os.getpid()}"
        new.unlink(missing_ok=True)
        new.symlink_to(target.name)
        new.replace(self.folder / name)
        _sync_one(self.folder)

    def _forget(self) -> None:
        # names, not paths: the folder may be relative, or reached through a link
        last, best = (found and found.name for found in (self.named("last"), self.named("best")))
        for folder in self.folder.glob("step-*"):
            if folder.name not in (last, best):
                shutil.rmtree(folder)
            elif folder.name != last:
                shutil.rmtree(folder / STATE, ignore_errors=True)


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
