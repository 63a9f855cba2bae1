"""A model's config from its file, and what can be said against it before anything of its size is built."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from foveate.files.checked import CheckpointError, check
from foveate.models.checkpoint.schemas import CONFIG

_LAYER = re.compile(r"(?:^|.*\.)(?:layers|layer|block|h)\.(\d{1,9})\..*")

_EXPERT = re.compile(r".*\.experts\.(\d{1,9})\..*")


def read_config(kind: Any, config: dict[str, Any], where: Any = "the config") -> Any:
    """The `config_class` of a model class, from config.json's keys. CheckpointError for values outside of what they allow."""
    check(config, CONFIG, where)
    made = kind.config_class.from_hf(config)
    heads, kv_heads = made.num_heads, getattr(made, "num_kv_heads", made.num_heads)
    if heads % kv_heads:
        raise CheckpointError(f"{where} has {heads} query heads, which are not a multiple of its {kv_heads} KV heads")
    return made


def check_layers(config: Any, stored: Iterable[str], where: Any) -> None:
    """CheckpointError for a config of more layers than the weights have: a number in a header must not be built before it is true."""
    stored = list(stored)
    found = {int(match[1]) for name in stored if (match := _LAYER.fullmatch(name))}
    for layers in (getattr(config, "stored_layers", 0) or config.num_layers, getattr(config, "num_decoder_layers", 0)):
        if layers > len(found):
            raise CheckpointError(
                f"{where} lacks layers: the config says {layers}, and there are weights of {len(found)}; download it again, or take the "
                "config that belongs to these weights"
            )
    experts = getattr(config, "experts", None)
    if experts is not None:
        numbers = {int(match[1]) for name in stored if (match := _EXPERT.fullmatch(name))}
        if experts.count > len(numbers):
            raise CheckpointError(
                f"{where} is a mixture of {experts.count} experts by its config, and there are weights of {len(numbers)}; download "
                "it again, or take the config that belongs to these weights"
            )
