"""The progress bar, on stderr and by rich, of what takes long: loading, tokenising, generating, training."""

from __future__ import annotations

import types
from typing import Any


class ProgressBar:
    """A context manager, or start() and stop(). With shown=False nothing is imported and nothing happens.

    columns, after the description: "bar", "count" (done/total), "bytes", "speed", "elapsed", "remaining", "note" (the last one that was
    given), or a text with fields of rich's task, such as "{task.completed:,} rows". total: None where it is not known, for which a spinner
    comes first. ImportError without rich.
    """

    def __init__(
        self, description: str, *columns: str, total: float | None = None, completed: float = 0, shown: bool = True
    ) -> None:
        self._total = total
        self._bar: Any = None
        if not shown:
            return
        try:
            from rich import progress
            from rich.console import Console
        except ImportError as error:
            raise ImportError('rich is not installed: pip install "foveate[models]"') from error
        kinds: dict[str, Any] = {
            "bar": progress.BarColumn, "count": progress.MofNCompleteColumn, "bytes": progress.DownloadColumn,
            "speed": progress.TransferSpeedColumn, "elapsed": progress.TimeElapsedColumn, "remaining": progress.TimeRemainingColumn,
            "note": lambda: text("{task.fields[note]}"),
        }  # fmt: skip

        def text(form: str) -> Any:
            return progress.TextColumn(form, markup=False)  # names may have brackets

        first = [] if total is not None else [progress.SpinnerColumn()]
        rest = [kinds[name]() if name in kinds else text(name) for name in columns]
        self._bar = progress.Progress(*first, text("{task.description}"), *rest, console=Console(stderr=True))
        self._task = self._bar.add_task(description, total=total, completed=completed, note="")

    def start(self) -> None:
        if self._bar is not None:
            self._bar.start()

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, amount: float, note: str | None = None) -> None:
        self._update(note, advance=amount)

    def reach(self, completed: float, note: str | None = None) -> None:
        self._update(note, completed=completed)

    def _update(self, note: str | None, **change: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, **change, **({} if note is None else {"note": note}))

    def print(self, text: str) -> None:
        """A line above the bar, which must be shown."""
        self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        if kind is None and self._total is not None:
            self.reach(self._total)
        self.stop()
