"""TokenStore: tokenised documents in memory-mapped files, written piece by piece and found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


class TokenStore:
    """Ragged columns: column[i] is a 1-d array, for each document i. checksum: of all that is in them.

    On disk: NAME.bin, NAME.ends.bin (int64), columns.json {NAME: dtype}, checksum.
    """

    def __init__(self, columns: dict[str, tuple[np.ndarray, np.ndarray]], checksum: str = "") -> None:
        self._columns, self.checksum = columns, checksum

    def __len__(self) -> int:
        return len(next(iter(self._columns.values()))[1]) if self._columns else 0

    def get(self, name: str, i: int) -> np.ndarray:
        values, ends = self._columns[name]
        return values[int(ends[i - 1]) if i else 0 : int(ends[i])]

    def lengths(self, name: str) -> np.ndarray:
        """int64 [documents]"""
        return np.diff(self._columns[name][1], prepend=0)

    def values(self, name: str) -> np.ndarray:
        """Of all documents, one after the other."""
        return self._columns[name][0]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        columns = {}
        for name, dtype in json.loads((folder / "columns.json").read_text()).items():
            columns[name] = (_map(folder / f"{name}.bin", dtype), _map(folder / f"{name}.ends.bin", "int64"))
        return cls(columns, (folder / "checksum").read_text())

    @classmethod
    def write(cls, folder: Path, parts: Iterable[dict[str, list[np.ndarray]]]) -> TokenStore:
        """All parts, each of the same columns and dtypes. Written beside `folder` and renamed, so it is whole or not there."""
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
        except OSError as error:
            raise _cannot_write(folder.parent, error) from error
        dtypes: dict[str, str] = {}
        size: dict[str, int] = {}
        digests: dict[str, Any] = {}
        try:
            for part in parts:
                for name, arrays in part.items():
                    if not arrays:
                        continue
                    ends = size.get(name, 0) + np.cumsum([len(a) for a in arrays], dtype=np.int64)
                    size[name] = int(ends[-1])
                    dtypes[name] = str(arrays[0].dtype)
                    for file, values in ((f"{name}.bin", np.concatenate(arrays)), (f"{name}.ends.bin", ends)):
                        digests.setdefault(file, hashlib.sha256()).update(values.tobytes())
                        _append(temporary / file, values)
            (temporary / "columns.json").write_text(json.dumps(dtypes))
            whole = json.dumps([dtypes, {file: digest.hexdigest() for file, digest in digests.items()}], sort_keys=True)
            (temporary / "checksum").write_text(hashlib.sha256(whole.encode()).hexdigest())
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
                shutil.rmtree(temporary)  # another process was faster
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return cls.open(folder)


def _append(file: Path, values: np.ndarray) -> None:
    try:
        with file.open("ab") as stream:
            stream.write(values.tobytes())
    except OSError as error:
        raise _cannot_write(file.parent.parent, error) from error


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"the tokenised data cannot be written to {folder} ({error.strerror}); make room there, or choose another cache_dir"
    )


def _map(file: Path, dtype: str) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
