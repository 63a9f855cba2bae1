"""TokenStore: tokenised documents in memory-mapped files, written piece by piece and found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from foveate.files.checked import CheckpointError, read_json, shown

_COLUMNS, _HASHES = "columns.json", "sha256.json"
_DTYPES = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)) + ("bool", "float32", "float64")


class TokenStore:
    """Ragged columns: column[i] is a 1-d array, for each document i. checksum: of all that is in them.

    On disk: NAME.bin, NAME.ends.bin (int64), columns.json {NAME: dtype}, sha256.json.
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
        """The values of a column, all documents one after the other."""
        return self._columns[name][0]

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """CheckpointError for what this user has not written here whole: another owner, others may write, other bytes, other names."""
        _check_owner(folder, stat.S_ISDIR)
        for file in (folder / _COLUMNS, folder / _HASHES):
            _check_owner(file, stat.S_ISREG)
        dtypes, hashes = read_json(folder / _COLUMNS), read_json(folder / _HASHES)
        if _sha256(folder / _COLUMNS) != hashes.get(_COLUMNS):
            raise _foreign(folder, f"the bytes of {_COLUMNS} are not those that were written")
        columns = {}
        for name, dtype in dtypes.items():
            if not re.fullmatch(r"[a-z_0-9]{1,64}", name) or dtype not in _DTYPES:
                raise _foreign(folder, f"{_COLUMNS} has the column {name[:80]!r} of type {shown(dtype)}")
            pair = []
            for file, kind in ((folder / f"{name}.bin", dtype), (folder / f"{name}.ends.bin", "int64")):
                _check_owner(file, stat.S_ISREG)
                if _sha256(file) != hashes.get(file.name):
                    raise _foreign(folder, f"the bytes of {file.name} are not those that were written")
                pair.append(_map(file, kind))
            values, ends = pair
            if len(ends) and (ends[0] < 0 or ends[-1] != len(values) or (np.diff(ends) < 0).any()):
                raise _foreign(
                    folder, f"the documents of {name} end at {int(ends[-1])}, and it has {len(values)} values"
                )
            columns[name] = (values, ends)
        return cls(columns, hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest())

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
        try:
            for part in parts:
                for name, arrays in part.items():
                    if not arrays:
                        continue
                    ends = size.get(name, 0) + np.cumsum([len(a) for a in arrays], dtype=np.int64)
                    size[name] = int(ends[-1])
                    dtypes[name] = str(arrays[0].dtype)
                    _append(temporary / f"{name}.bin", np.concatenate(arrays))
                    _append(temporary / f"{name}.ends.bin", ends)
            _append(temporary / _COLUMNS, json.dumps(dtypes).encode())
            hashes = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            _append(temporary / _HASHES, json.dumps(hashes).encode())
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


def _append(file: Path, values: np.ndarray | bytes) -> None:
    """Readable and writable by this user alone, whatever the umask."""
    try:
        with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600), "ab") as stream:
            stream.write(values if isinstance(values, bytes) else values.tobytes())
    except OSError as error:
        raise _cannot_write(file.parent.parent, error) from error


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def _check_owner(path: Path, is_kind: Callable[[int], bool]) -> None:
    """A cache's place and the names in it are no secret: what another user has put there must not be trained on."""
    try:
        found = path.lstat()
    except OSError as error:
        raise _foreign(path.parent, f"{path.name} cannot be read ({error.strerror})") from None
    if not is_kind(found.st_mode):
        raise _foreign(path.parent, f"{path.name} is a link, or of another kind")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise _foreign(
            path.parent, f"{path.name} belongs to user {found.st_uid} with the rights {found.st_mode & 0o777:o}"
        )


def _foreign(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenised data in {folder} is not as this user has written it: {what}; delete it, or choose another cache_dir"
    )


def _cannot_write(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"the tokenised data cannot be written to {folder} ({error.strerror}); make room there, or choose another cache_dir"
    )


def _map(file: Path, dtype: str) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r") if file.stat().st_size else np.empty(0, dtype)
