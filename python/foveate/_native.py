"""The compiled module, or the reason why it is not there. torch is imported first: the kernels share its OpenMP runtime."""

from __future__ import annotations

from types import ModuleType

import torch  # noqa: F401

_C: ModuleType | None
try:
    from foveate import _C  # type: ignore[attr-defined,no-redef]

    missing_reason: str | None = None
except ImportError as error:
    _C = None
    missing_reason = (
        f"the compiled module is missing or does not load ({error}); reinstall foveate or build it with `pip install .`"
    )
