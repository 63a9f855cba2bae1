"""API keys: kept as digests, compared in constant time, each with its limits."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.serve.errors import ApiError
from foveate.serve.limits import Bucket
from foveate.serve.page import PAGE_PATHS

# What answers without a key: the probes of an orchestrator, which say nothing of requests, and the files of the page.
# Everything else needs one.
OPEN_PATHS = frozenset({"/health", "/ready"}) | PAGE_PATHS
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHORTEST = 8


@dataclass(frozen=True)
class Key:
    """name: in logs and metrics. requests and tokens: what it may use in a minute, None without a limit. models: None for all.

    priority: of its requests, lower first. admin: whether it may load, reload and unload models and adapters.
    cache: whose prompts it shares the prefix cache with, those of all keys with this word; None for its own alone.
    """

    name: str
    digest: bytes = field(repr=False)
    requests: Bucket | None = None
    tokens: Bucket | None = None
    models: frozenset[str] | None = None
    priority: int = 0
    admin: bool = False
    cache: str | None = None

    @property
    def salt(self) -> str:
        """The time to a first token tells whether somebody's prompt began in the same way: only those with the same salt can see it."""
        return f"key {self.digest.hex()}" if self.cache is None else f"group {self.cache}"

    @classmethod
    def of(cls, key: str) -> Key:
        """Without limits. ValueError for a short one."""
        if len(key) < _SHORTEST:
            raise ValueError(
                f"an API key has fewer than {_SHORTEST} characters, which is soon guessed; use a longer one"
            )
        digest = hashlib.sha256(key.encode()).digest()
        return cls(digest.hex()[:8], digest)

    def check_model(self, name: str) -> None:
        """ApiError 403 for one that it may not use."""
        if self.models is not None and name not in self.models:
            raise ApiError(
                403,
                f"this key may not use {name}; it may use {', '.join(sorted(self.models))}",
                param="model",
                code="model_not_allowed",
            )

    def begin(self) -> None:
        """Counts a request. ApiError 429 when there have been too many in the last minute, or more tokens than the minute has."""
        self.reserve(0)
        if self.requests is not None and (wait := self.requests.take(1)):
            raise _limited(f"this key may make {self.requests.per_minute:g} requests a minute", wait)

    def reserve(self, tokens: int) -> None:
        """Takes tokens from the minute's. ApiError 429 when they are used up, 400 when a minute never has so many."""
        if self.tokens is None:
            return
        if tokens > self.tokens.per_minute:
            raise ApiError(
                400,
                f"this request may take {tokens} tokens, and this key {self.tokens.per_minute:g} a minute; shorten the prompt, or lower "
                "max_tokens",
                param="max_tokens", code="tokens_per_minute",
            )  # fmt: skip
        wait = self.tokens.take(tokens)
        if wait:
            raise _limited(f"this key may use {self.tokens.per_minute:g} tokens a minute", wait)

    def settle(self, reserved: int, used: int) -> None:
        """At the end: what a request did not use is given back, what it used beyond is owed."""
        if self.tokens is not None:
            self.tokens.give(reserved - used)


def _limited(why: str, wait: float) -> ApiError:
    after = max(1, int(-(-wait // 1)))
    return ApiError(429, f"{why}; try again in {after} s", code="rate_limited", retry_after=after)


# The caller's, within the handling of a request; None where the server has no keys.
caller: ContextVar[Key | None] = ContextVar("caller", default=None)


class Keys:
    """No keys: everybody comes in."""

    def __init__(self, keys: Iterable[str | Key]) -> None:
        made = [key if isinstance(key, Key) else Key.of(key) for key in keys]
        self._keys = list({key.digest: key for key in made}.values())

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def names(self) -> list[str]:
        return [key.name for key in self._keys]

    def check(self, path: str, headers: list[tuple[bytes, bytes]]) -> Key | None:
        """The caller's key; ApiError 401 for a wrong one or none."""
        if not self._keys or path in OPEN_PATHS:
            return None
        given = _given(headers)
        if given is None:
            raise ApiError(
                401, "this server needs a key: send the header Authorization: Bearer KEY", code="missing_api_key"
            )
        digest, found = hashlib.sha256(given).digest(), None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise ApiError(401, "the key is not one of this server's", code="invalid_api_key")
        return found


def may_use(model: str) -> bool:
    """Whether the caller may use the model of this name."""
    key = caller.get()
    return key is None or key.models is None or model in key.models


def require_admin() -> None:
    """ApiError 403 unless the caller's key has "admin"."""
    key = caller.get()
    if key is None or not key.admin:
        raise ApiError(
            403,
            'this needs a key with "admin": true in the file of --api-key-file',
            code="not_admin",
        )


def _given(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip()
        if name == b"x-api-key":
            return value.strip()
    return None


_FIELDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "name": (str, "a name"), "sha256": (str, "64 hexadecimal digits"), "requests_per_minute": (int, "a whole number above 0"),
    "tokens_per_minute": (int, "a whole number above 0"), "models": (list, "a list of names"), "priority": (int, "a whole number"),
    "admin": (bool, "true or false"), "cache": (str, "a word"),
}  # fmt: skip


def read_keys(file: Path) -> list[Key]:
    """One key a line: the key itself, or a JSON object with its name, its SHA-256 digest and its limits. Empty lines and those that begin
    with # are none. ValueError, with the line, for what is wrong."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            found.append(_described(json.loads(line)) if line.startswith("{") else Key.of(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{file} holds no key; write one a line")
    names = [key.name for key in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{file} names two keys {twice!r}; names tell them apart in logs and metrics")
    return found


def _described(entry: dict[str, Any]) -> Key:
    unknown = sorted(set(entry) - set(_FIELDS))
    if unknown:
        raise ValueError(f"{unknown[0]} is not known; there are {', '.join(_FIELDS)}")
    for name, value in entry.items():
        kind, wanted = _FIELDS[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{name}={value!r} must be {wanted}")
    if not _DIGEST.fullmatch(entry.get("sha256", "")):
        raise ValueError("sha256 must be the 64 hexadecimal digits that `printf %s KEY | sha256sum` prints")
    for name in ("requests_per_minute", "tokens_per_minute"):
        if entry.get(name, 1) < 1:
            raise ValueError(f"{name}={entry[name]} must be above 0")

    def bucket(name: str) -> Bucket | None:
        return Bucket(entry[name]) if name in entry else None

    models = entry.get("models")
    return Key(
        entry.get("name") or entry["sha256"][:8], bytes.fromhex(entry["sha256"]), bucket("requests_per_minute"),
        bucket("tokens_per_minute"), None if models is None else frozenset(models), entry.get("priority", 0), entry.get("admin", False),
        entry.get("cache"),
    )  # fmt: skip
