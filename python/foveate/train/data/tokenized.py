"""Data files as tokens: encoded in parallel, with a bar, and kept for the next run."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.files.data_files import data_files, left_out, read_rows
from foveate.progress import ProgressBar
from foveate.tokenizer import Tokenizer
from foveate.train.data.examples import Columns, at_row
from foveate.train.data.token_store import TokenStore

if TYPE_CHECKING:
    from foveate.train.objectives.base import Objective

_VERSION = 3  # of what is stored; raised when an objective's columns change their meaning
_ROWS = 512  # encoded at once, by as many threads as there are cores


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "foveate" / "train"


def tokenized(
    paths: Sequence[str], objective: Objective, tokenizer: Tokenizer, *, cache: Path | None, progress: bool | None
) -> TokenStore:
    """The tokens of all rows. A store is found again if objective, tokenizer, and the files (paths, sizes, times, inodes) are the same."""
    if progress is not False:
        for sentence in filter(None, map(left_out, paths)):
            print(sentence, file=sys.stderr)
    folder = (cache or default_cache()) / _key(paths, objective, tokenizer)
    if folder.exists():
        return TokenStore.open(folder)
    shown = sys.stderr.isatty() if progress is None else progress
    with ProgressBar("tokenising:", "{task.completed:,} rows", "elapsed", shown=shown) as bar:
        return TokenStore.write(folder, _parts(paths, objective, bar.advance))


def _parts(paths: Sequence[str], objective: Objective, advance: Callable[[int], None]) -> Iterator[Columns]:
    rows = read_rows(paths)
    while batch := list(itertools.islice(rows, _ROWS)):
        yield _encode(objective, batch)
        advance(len(batch))


def _encode(objective: Objective, batch: Sequence[dict[str, Any]]) -> Columns:
    """ValueError with the file and the row that it is about."""
    try:
        return objective.encode(batch)
    except (ImportError, MemoryError):
        raise
    except Exception:  # the tokenizers library raises plain ones
        for row in batch:
            try:
                objective.encode([row])
            except Exception as error:
                raise at_row(row, error) from error
        raise


def _key(paths: Sequence[str], objective: Objective, tokenizer: Tokenizer) -> str:
    files: list[Any] = []
    for path in paths:
        for file in data_files(path):
            for part in sorted(file.rglob("*")) if file.is_dir() else [file]:
                stat = part.stat()
                # the time of change too, which nothing sets: archives and copies give another content the same size and time of writing
                files.append([str(part.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino])
    made_from = [
        _VERSION, type(objective).__name__, objective.signature(), files, tokenizer.backend.to_str(), tokenizer.chat_template,
        tokenizer.special, sorted(tokenizer.eos_ids),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:32]
