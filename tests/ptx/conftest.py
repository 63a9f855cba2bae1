from __future__ import annotations

from pathlib import Path

import ptx_programs
import pytest


@pytest.fixture(scope="session")
def machine() -> Path:
    return ptx_programs.machine()
