"""The output folder of a run: locked while it is written, with a record of what in it is the run's own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

RECORD, LOCK = "checkpoints.json", ".lock"
STATE = "state"  # the part of a checkpoint that only a run that goes on needs
_STEP = re.compile(r"step-\d{8,}")
# What a run writes beside its checkpoints.
_WRITTEN = ("metrics.jsonl", "loss.png", "last", "best", "merged", "tensorboard", "reference.safetensors")


@dataclass
class Record:
    """checkpoints.json. checkpoints: the names of the folders that the run wrote and has not deleted; last, best: of these, None before
    there is one; copies: which of `last` and `best` are folders, where the file system has no links."""

    checkpoints: list[str] = field(default_factory=list)
    last: str | None = None
    best: str | None = None
    copies: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        file = folder / RECORD
        if not file.exists():
            return None
        try:
            found = json.loads(file.read_text())
            record = cls(**{name: found[name] for name in ("checkpoints", "last", "best", "copies")})
            names = [*record.checkpoints, *(name for name in (record.last, record.best) if name is not None)]
            if all(_STEP.fullmatch(name) for name in names) and set(record.copies) <= {"last", "best"}:
                return record
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{file} is damaged; delete it, and resume finds the last checkpoint without it")

    def write(self, folder: Path) -> None:
        new = folder / f".{RECORD}.{os.getpid()}"
        new.write_text(json.dumps(asdict(self), indent=1) + "\n")
        new.replace(folder / RECORD)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone in the folder; OSError with a sentence where another process is, or where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
        descriptor = _lock(folder)
    except OSError as error:
        if isinstance(error, _Taken):
            raise
        raise OSError(
            f"the output folder {folder} cannot be written ({error.strerror}); choose another output_dir"
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(descriptor)


class _Taken(OSError):
    pass


def _lock(folder: Path) -> int:
    file = folder / LOCK
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                return descriptor
        except FileNotFoundError:  # the one before has just ended, and removed it
            pass
        except BlockingIOError:
            process = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise _Taken(
                errno.EBUSY,
                f"another run (process {process}) is writing to {folder}; wait for its end, or choose another output_dir",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                os.close(descriptor)
                raise
            print(f"{folder} cannot be locked ({error.strerror}); start no second run in it", file=sys.stderr)
            return descriptor
        os.close(descriptor)


def taken_over(folder: Path, *, resume: bool) -> Record:
    """The record of a folder in which a run begins, or goes on. Deletes what the run left half written.

    ValueError, before anything is changed, for a folder with a run if a new one is to begin, and for one with files that are of no run and
    would be overwritten. Without the record, a run that goes on is known by its links and states.
    """
    record = Record.read(folder)
    found = record or Record()
    for name in ("last", "best"):
        named = getattr(found, name)
        if (named is None or not (folder / named).is_dir()) and (folder / name).is_symlink():
            target = (folder / name).resolve()
            setattr(found, name, target.name if target.is_dir() and target.parent == folder.resolve() else None)
    steps = sorted(path.name for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir())
    own = [n for n in steps if n in (*found.checkpoints, found.last, found.best) or (folder / n / STATE).is_dir()]
    if found.last not in own:
        found.last = next((name for name in reversed(own) if (folder / name / STATE).is_dir()), None)
    if found.best not in own:
        found.best = None
    found.checkpoints = own
    if not resume and found.last is not None:
        raise ValueError(
            f"{folder} already has a run, whose last checkpoint is {folder / found.last}; go on with resume, or choose another output_dir"
        )
    halves = [path for path in folder.glob("step-*.tmp") if _STEP.fullmatch(path.stem)]
    mine = [path for path in halves if path.is_dir() and ((path / STATE).is_dir() or not any(path.iterdir()))]
    foreign = [name for name in steps if name not in own] + [path.name for path in halves if path not in mine]
    if record is None and found.last is None:
        foreign += [name for name in _WRITTEN if os.path.lexists(folder / name)]
    foreign += [name for name in ("last", "best") if name not in foreign and not _replaceable(folder, found, name)]
    if foreign:
        raise ValueError(
            f"{folder} has {', '.join(sorted(foreign))}, which no run of foveate is known to have written, and which this one would "
            "overwrite; move it away, or choose another output_dir"
        )
    for path in mine:
        shutil.rmtree(path, ignore_errors=True)
    found.write(folder)
    return found


def _replaceable(folder: Path, record: Record, name: str) -> bool:
    """Whether `last` or `best` is absent, a link, or a folder with nothing but what the checkpoint of that name has."""
    place, named = folder / name, getattr(record, name)
    if place.is_symlink() or not place.exists() or name in record.copies:
        return True
    if not place.is_dir() or named is None:
        return False
    files = [path.relative_to(place) for path in place.rglob("*") if path.is_file()]
    originals = [folder / named / path for path in files]
    return all(o.is_file() and o.stat().st_size == (place / f).stat().st_size for f, o in zip(files, originals))


def expose(folder: Path, name: str, target: str) -> bool:
    """Makes `name` mean the checkpoint `target`: a link, or without its state a copy where there are no links. Whether it is a copy."""
    place, new = folder / name, folder / f".{name}.{os.getpid()}"
    if new.is_symlink() or new.exists():
        new.unlink() if new.is_symlink() else shutil.rmtree(new)
    copied = not has_links(folder)
    if copied:
        shutil.copytree(folder / target, new, ignore=shutil.ignore_patterns(STATE))
    else:
        new.symlink_to(target)
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    new.replace(place)
    return copied


def has_links(folder: Path) -> bool:
    probe = folder / f".link-{os.getpid()}"
    try:
        probe.symlink_to("nothing")
    except OSError:
        return False
    probe.unlink()
    return True
