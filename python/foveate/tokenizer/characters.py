"""A tokenizer of single characters, for small models from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from foveate.tokenizer import NEED, Tokenizer

UNKNOWN, PAD, END = "<unk>", "<pad>", "<eos>"


def char_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Ids 0, 1, 2 are <unk>, for characters that are not in `texts`, <pad> and <eos>; then the characters in order of code points."""
    try:
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    if not characters:
        raise ValueError("the training data has no characters to make a tokenizer from; is the text field right?")
    vocab = {token: i for i, token in enumerate([UNKNOWN, PAD, END, *sorted(characters)])}
    backend: Any = Backend(models.WordLevel(vocab, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([UNKNOWN, PAD, END])
    special = {"unk_token": UNKNOWN, "pad_token": PAD, "eos_token": END}
    return Tokenizer(backend, tokenizer_config=special)
