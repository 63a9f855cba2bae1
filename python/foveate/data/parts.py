"""The work folder of a run: parts that are done stay done, and what is unfinished is made again, to the same bytes."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate._version import __version__

_PLAN, _LOCK = "plan.json", "lock"


class WorkFolder:
    """OUTPUT.work, while a run is on its way. A context manager, which holds it against a second run.

    plan: what the run is made from (files, options); another plan in the folder is a ValueError that names the difference, unless
    restart, which begins anew. FileExistsError for an output that is there already, unless overwrite.
    """

    def __init__(
        self, output: Path, others: Sequence[Path], plan: dict[str, Any], *, restart: bool, overwrite: bool
    ) -> None:
        self.output = output
        self.path = output.with_name(f"{output.name}.work")
        self._plan = json.loads(json.dumps({"foveate": __version__, **plan}))
        self._others, self._restart, self._overwrite = others, restart, overwrite
        self.resumed = False

    def __enter__(self) -> WorkFolder:
        there = next((file for file in (self.output, *self._others) if file.exists()), None)
        if there is not None and not self._overwrite and not self._half_done():
            raise FileExistsError(
                f"{there} exists already; choose another output, or replace it with overwrite (--overwrite)"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"another run is writing {self.output} at this time; wait for it, or choose another output"
            ) from None
        try:
            self._begin()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """The folder stays after an error: the same call goes on with it."""
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()

    def _half_done(self) -> bool:
        return (self.path / _PLAN).exists() and not self._restart

    def _begin(self) -> None:
        file = self.path / _PLAN
        if file.exists() and not self._restart:
            earlier = json.loads(file.read_text())
            different = [name for name in self._plan | earlier if self._plan.get(name) != earlier.get(name)]
            if different:
                raise ValueError(
                    f"{self.path} has the beginning of a run with another {' and '.join(different)}; repeat that call to finish it, or "
                    "begin anew with restart (--restart)"
                )
            self.resumed = True
            return
        for other in self.path.iterdir():
            if other.name != _LOCK:
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        write_whole(file, json.dumps(self._plan).encode())

    def part(self, stage: str, number: int) -> Part:
        (self.path / stage).mkdir(exist_ok=True)
        return Part(self.path / stage, number)


class Part:
    """What one chunk became: files by name, and a summary, which is written last."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number

    def file(self, name: str) -> Path:
        return self._folder / f"{self._number:08d}.{name}"

    @property
    def done(self) -> bool:
        return self.file("json").exists()

    def write(self, files: dict[str, bytes], summary: dict[str, Any]) -> None:
        for name, data in files.items():
            write_whole(self.file(name), data)
        write_whole(self.file("json"), json.dumps(summary).encode())

    def summary(self) -> dict[str, Any]:
        return json.loads(self.file("json").read_bytes())


def write_whole(file: Path, data: bytes) -> None:
    """Whole or not at all, whenever the process ends."""
    beside = file.with_name(f"{file.name}.tmp")
    beside.write_bytes(data)
    beside.replace(file)


class Blobs:
    """Rows of a part that are read again in another order or need all columns: pickles one after the other, and where each ends."""

    @staticmethod
    def encode(rows: Sequence[dict[str, Any]], keys: np.ndarray) -> dict[str, bytes]:
        """keys: uint64 [rows], by which they are sorted at the end."""
        blobs = [pickle.dumps(dict(row)) for row in rows]
        ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
        return {"blobs": b"".join(blobs), "ends": ends.tobytes(), "keys": keys.astype(np.uint64).tobytes()}

    def __init__(self, parts: Sequence[Part], name: str, *, in_order_of_keys: bool) -> None:
        self._files = [part.file(f"{name}.blobs") for part in parts]
        ends = [np.fromfile(part.file(f"{name}.ends"), np.int64) for part in parts]
        self._counts = [len(e) for e in ends]
        self._starts = np.concatenate([np.zeros(0, np.int64), *[np.concatenate([[0], e[:-1]]) for e in ends if len(e)]])
        self._ends = np.concatenate([np.zeros(0, np.int64), *ends])
        self._part = np.repeat(np.arange(len(parts)), self._counts)
        keys = [np.fromfile(part.file(f"{name}.keys"), np.uint64) for part in parts]
        self._order = (
            np.argsort(np.concatenate([np.zeros(0, np.uint64), *keys]), kind="stable")
            if in_order_of_keys
            else np.arange(len(self._ends))
        )

    def __len__(self) -> int:
        return len(self._ends)

    def batches(self, size: int = 8192) -> Iterator[list[dict[str, Any]]]:
        maps: dict[int, np.memmap] = {}
        for i in range(0, len(self._order), size):
            rows = []
            for row in self._order[i : i + size].tolist():
                part = int(self._part[row])
                if part not in maps:
                    if len(maps) > 256:
                        maps.clear()
                    maps[part] = np.memmap(self._files[part], np.uint8, "r")
                rows.append(pickle.loads(maps[part][int(self._starts[row]) : int(self._ends[row])].tobytes()))
            yield rows


def remove(file: Path) -> None:
    if file.exists():
        os.unlink(file)
