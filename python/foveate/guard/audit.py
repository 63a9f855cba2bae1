"""The audit log: a line of JSON for each finding, without the text unless that is asked for."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foveate.guard.screen import Finding


class AuditLog:
    """Appends to a file that only its owner may read. texts: whether a line has what was found. Several threads may add.

    A line: {"time": seconds since 1970, "request", "side", "rule", "label", "action", "start", "end"}, with texts also "text".
    """

    def __init__(self, file: str | os.PathLike[str], *, texts: bool = False) -> None:
        self.file, self.texts = Path(file), texts
        self._lock = threading.Lock()
        try:
            self._open()
        except OSError as error:
            raise ValueError(f"the audit log {self.file} cannot be written: {error.strerror}") from error

    def _open(self) -> None:
        os.close(os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))

    def add(self, found: Finding, request: str = "") -> None:
        line = {
            "time": round(time.time(), 3), "request": request, "side": found.side, "rule": found.rule, "label": found.label,
            "action": found.action, "start": found.start, "end": found.end,
        }  # fmt: skip
        if self.texts:
            line["text"] = found.text
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        with self._lock:
            place = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(place, data)  # one call, so lines of several processes stay whole
            finally:
                os.close(place)
