"""What `foveate serve` is told: models, limits, keys."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.serve.keys import Key
from foveate.serve.processors import Processors


@dataclass(frozen=True)
class ServeSettings:
    """models: paths by the names that requests use; the first is also what `default` means. options: of `foveate.LLM`, for each.
    adapters: folders with LoRA adapters of the first model, by their names.
    candidates: by the name of a model the path of its next version, and the share of the requests that it gets, from 0 to 1.
    aliases: of names that clients ask for, the model or adapter that they get.

    max_queue: samples that may wait beside those that run; max_queue_tokens: prompt tokens that may wait. Beyond: 429.
    max_body_bytes: of a request; body_timeout: seconds that it may take to arrive. request_timeout: seconds for a whole answer.
    send_timeout: seconds that a client may take no bytes. keep_alive: seconds of silence in a stream before a comment.
    drain_timeout: seconds that running requests get after SIGTERM. stall_timeout: age of a step from which /ready fails;
    hang_timeout: from which the engine is restarted, max_engine_restarts times, and then /health fails.
    max_logprobs: alternatives per token that may be asked for.
    http_processors: that the event loop keeps for itself, see `Processors`; 0: it shares all with the model.
    log_texts: prompts and replies in the log. canary: a file of golden prompts, run every canary_every seconds.
    guard: a policy file, for prompts and answers.
    quality_reference: a saved answer of /quality, with whose prompts those of now are compared; the first ones by default.
    """

    models: dict[str, str | Path]
    options: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str | Path] = field(default_factory=dict)
    candidates: dict[str, tuple[str | Path, float]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str | Key, ...] = ()
    insecure: bool = False
    max_queue: int = 256
    max_queue_tokens: int = 262_144
    max_body_bytes: int = 4 * 2**20
    body_timeout: float = 30.0
    request_timeout: float = 600.0
    send_timeout: float = 60.0
    keep_alive: float = 15.0
    drain_timeout: float = 60.0
    stall_timeout: float = 30.0
    hang_timeout: float = 300.0
    max_engine_restarts: int = 3
    max_logprobs: int = 20
    http_processors: int = 0
    log_requests: bool = True
    log_texts: bool = False
    canary: Path | None = None
    canary_every: float = 300.0
    quality_reference: Path | None = None
    guard: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("there is no model to serve; give --model PATH or --model NAME=PATH")
        twice = sorted(set(self.models) & set(self.adapters))
        if twice:
            raise ValueError(f"a model and an adapter are called {twice[0]}; name them apart")
        for name, model in self.aliases.items():
            if name in self.models or name in self.adapters:
                raise ValueError(f"the alias {name} is the name of a model or adapter; choose another")
            if model not in self.models and model not in self.adapters:
                there = ", ".join([*self.models, *self.adapters])
                raise ValueError(f"the alias {name} is for {model}, which is not served; there are {there}")
        for name, (_, share) in self.candidates.items():
            if name not in self.models:
                raise ValueError(
                    f"the candidate for {name} is for none of the models; there are {', '.join(self.models)}"
                )
            if not 0 <= share <= 1:
                raise ValueError(
                    f"the share of the candidate for {name} is {100 * share:g}%; it must be from 0% to 100%"
                )
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("max_queue", "max_logprobs", "max_engine_restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
        Processors.check(self.http_processors)
        for key in self.api_keys:
            if isinstance(key, str):
                Key.of(key)  # ValueError for a short one
        if not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"--host {self.host} is open to other machines, and there is no key: anybody could use the model. Give --api-key-file, "
                "or --insecure if something in front of the server decides who comes in"
            )
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("TLS needs both --tls-certificate and --tls-key")


_POSITIVE = (
    "max_queue_tokens", "max_body_bytes", "body_timeout", "request_timeout", "send_timeout", "keep_alive", "drain_timeout",
    "stall_timeout", "hang_timeout", "canary_every",
)  # fmt: skip


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
