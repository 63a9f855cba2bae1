"""API keys: kept as digests, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path

from foveate.serve.errors import ApiError

# What answers without a key: the probes of an orchestrator, which say nothing of requests. Everything else needs one.
OPEN_PATHS = frozenset({"/health", "/ready"})


class Keys:
    """No keys: everybody comes in."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in dict.fromkeys(keys)]

    def check(self, path: str, headers: list[tuple[bytes, bytes]]) -> str | None:
        """The beginning of the digest of the caller's key, which names it in logs; ApiError 401 for a wrong key or none."""
        if not self._digests or path in OPEN_PATHS:
            return None
        given = _given(headers)
        if given is None:
            raise ApiError(
                401, "this server needs a key: send the header Authorization: Bearer KEY", code="missing_api_key"
            )
        digest, found = hashlib.sha256(given).digest(), None
        for known in self._digests:  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, digest):
                found = known.hex()[:8]
        if found is None:
            raise ApiError(401, "the key is not one of this server's", code="invalid_api_key")
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _given(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return None


def read_keys(file: Path) -> list[str]:
    """One key a line; empty lines and those that begin with # are none."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{file} holds no key; write one a line")
    return found
