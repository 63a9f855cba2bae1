"""A tokenizer as the metadata of a GGUF file: the way back of `gguf.py`, from a `tokenizers.Tokenizer`."""

from __future__ import annotations

import json
from typing import Any

from foveate.files.checked import CheckpointError
from foveate.tokenizer import Tokenizer
from foveate.tokenizer.pre_tokenizers import name_of

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_NO_MERGE = -1e9  # the score of a piece that nothing merges into


def add_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Writes tokenizer.ggml.*: byte-level BPE with its pre-tokenizer's name, or SentencePiece's BPE. vocab_size: rows of the embedding,
    which may be more than the tokens.

    CheckpointError for other kinds of tokenizer, for pre-tokenizers that have no name, and for more tokens than rows.
    """
    backend = tokenizer.backend
    state = json.loads(backend.to_str())
    model = state["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"the tokenizer is of kind {model.get('type')}; those of decoders in GGUF files are BPE: --to safetensors takes every kind"
        )
    tokens, kinds = _tokens(backend, state, vocab_size)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, model["merges"]))
        writer.add_token_types(_sentencepiece_kinds(tokens, kinds, model.get("unk_token")))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name_of(backend, bool(model.get("ignore_merges")), state.get("normalizer")))
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    _add_special(writer, tokenizer, tokens)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(backend: Any, state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of each id; ids without a token are "unused" ones."""
    vocab = backend.get_vocab(with_added_tokens=True)
    if vocab and max(vocab.values()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer has ids up to {max(vocab.values())}, and the embedding has {vocab_size} rows; take the tokenizer of these "
            "weights"
        )
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [_UNUSED] * vocab_size
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, _NORMAL
    for entry in state.get("added_tokens") or ():
        kinds[entry["id"]] = _CONTROL if entry["special"] else _USER_DEFINED
    return tokens, kinds


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Merges come in the order of the scores of what they make: the earlier, the higher."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        scores.setdefault("".join(_pair(merge)), -float(rank))
    return [scores.get(token, _NO_MERGE) for token in tokens]


def _sentencepiece_kinds(tokens: list[str], kinds: list[int], unknown: str | None) -> list[int]:
    def kind(token: str, found: int) -> int:
        if token == unknown:
            return _UNKNOWN
        return _BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else found

    return [kind(token, found) for token, found in zip(tokens, kinds)]


def _adds_space(state: dict[str, Any]) -> bool:
    for part in (state.get("normalizer"), state.get("pre_tokenizer")):
        for step in [part, *((part or {}).get("normalizers") or ()), *((part or {}).get("pretokenizers") or ())]:
            if step and (
                step.get("type") == "Prepend"
                or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
            ):
                return True
    return False


def _add_special(writer: Any, tokenizer: Tokenizer, tokens: list[str]) -> None:
    ids = {"bos": tokenizer.bos_id, "eos": next(iter(sorted(tokenizer.eos_ids)), None), "pad": tokenizer.pad_id}
    named = tokenizer.special.get("eos_token")
    if named is not None and (token := tokenizer.backend.token_to_id(named)) is not None:
        ids["eos"] = token
    unknown = tokenizer.special.get("unk_token")
    ids["unk"] = None if unknown is None else tokenizer.backend.token_to_id(unknown)
    for name, token in ids.items():
        if token is not None and token < len(tokens):
            getattr(writer, f"add_{name}_token_id")(token)
    others = sorted(tokenizer.eos_ids - {ids["eos"]})
    if others:  # the end of a turn
        writer.add_eot_token_id(others[0])
    with_ends, plain = tokenizer.encode("a"), tokenizer.encode("a", add_special_tokens=False)
    writer.add_add_bos_token(bool(with_ends) and with_ends[0] == ids["bos"] and with_ends[: len(plain)] != plain)
    writer.add_add_eos_token(
        len(with_ends) > len(plain) and with_ends[-1] in tokenizer.eos_ids and with_ends[-len(plain) :] != plain
    )
