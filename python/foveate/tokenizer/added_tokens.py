"""Tokens that a Hugging Face folder names beside tokenizer.json: in tokenizer_config.json, added_tokens.json, special_tokens_map.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, read_json, shown

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def special_tokens(tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config with the keys of special_tokens_map.json, which is from before `added_tokens_decoder` and is ignored beside it."""
    if "added_tokens_decoder" in tokenizer_config:
        return dict(tokenizer_config)
    return {**tokenizer_config, **special_tokens_map}


def add_named_tokens(backend: Any, tokenizer_config: Mapping[str, Any], folder: Path) -> None:
    """Adds what the backend lacks, in the order of the ids, as transformers does. tokenizer_config: that of `special_tokens`.

    CheckpointError where a token would get another id than its file says: ids before it are missing.
    """
    from tokenizers import AddedToken

    wanted: dict[int, Any] = {}
    named = [_content(tokenizer_config[key]) for key in _NAMED if tokenizer_config.get(key)]
    for entry in _extra(tokenizer_config):
        named.append(_content(entry))
    decoder = tokenizer_config.get("added_tokens_decoder")
    if decoder is not None:
        for number, entry in decoder.items():
            flags = {flag: bool(entry[flag]) for flag in _FLAGS if flag in entry}
            wanted[int(number)] = AddedToken(entry["content"], **flags)
    else:
        for text, number in read_json(folder / "added_tokens.json").items():
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise CheckpointError(
                    f"{folder / 'added_tokens.json'} has {shown(text)}={shown(number)}; it must be a token's id"
                )
            special = text in named
            wanted[int(number)] = AddedToken(text, normalized=not special, special=special)
    known = backend.get_added_tokens_decoder()
    for number, token in sorted(wanted.items()):
        if number in known and known[number].content == token.content:
            continue
        present = backend.token_to_id(token.content)
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
        found = backend.token_to_id(token.content)
        if found != number and present is None:
            raise CheckpointError(
                f"{folder} gives the token {token.content!r} the id {number}, and the vocabulary ends at {found - 1}: tokens are missing"
            )
    for text in dict.fromkeys(named):
        if text and not _is_added(backend, text):
            backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _is_added(backend: Any, text: str) -> bool:
    return any(entry.content == text for entry in backend.get_added_tokens_decoder().values())


def _extra(tokenizer_config: Mapping[str, Any]) -> list[Any]:
    entries: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = tokenizer_config.get(key) or []
        entries += list(value.values()) if isinstance(value, dict) else list(value)
    return entries


def _content(value: Any) -> str:
    return value["content"] if isinstance(value, dict) else str(value)
