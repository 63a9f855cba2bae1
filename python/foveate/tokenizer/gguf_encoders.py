"""The tokenizers of encoders in GGUF files: WordPiece ("bert") and SentencePiece's unigram model ("t5")."""

from __future__ import annotations

from typing import Any

from foveate.files.checked import CheckpointError
from foveate.tokenizer.unigram import Pieces, unigram

_SPACE = "\u2581"


def wordpiece(own: dict[str, Any]) -> Any:
    """own: the file's keys after "tokenizer.ggml.". Files mark the beginning of a word, BERT what continues one."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens = [_with_hashes(token) for token in own["tokens"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    special = [tokens[own[key]] for key in _SPECIAL if key in own]
    first, last = (_special(own, tokens, key, token) for key, token in (("cls", "[CLS]"), ("seperator", "[SEP]")))
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=_special(own, tokens, "unknown", "[UNK]")))
    # the file does not say whether texts are lowered: they are where no word of the vocabulary has a capital
    words = (token for token in tokens if not (token.startswith("[") and token.endswith("]")))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not any(word != word.lower() for word in words))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([*dict.fromkeys([first, last, *special])])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(token, vocab[token]) for token in (first, last)],
    )
    return tokenizer


_SPECIAL = ("unknown_token_id", "padding_token_id", "mask_token_id", "cls_token_id", "seperator_token_id")


def _with_hashes(token: str) -> str:
    if token.startswith(_SPACE):
        return token[1:]
    return token if token.startswith("[") and token.endswith("]") else f"##{token}"


def _special(own: dict[str, Any], tokens: list[str], name: str, usual: str) -> str:
    """The text of a special token that the file names, or its usual one. seperator: as GGUF spells it."""
    number = own.get(f"{name}_token_id")
    if number is not None:
        return tokens[number]
    if usual not in tokens:
        raise CheckpointError(f"the GGUF file has neither tokenizer.ggml.{name}_token_id nor a token {usual}")
    return usual


def sentencepiece_unigram(own: dict[str, Any]) -> Any:
    """As XLM-R's and T5's: what the file's table replaces, spaces at the ends dropped and runs of them made one."""
    from tokenizers import Regex, normalizers, processors

    tokens = own["tokens"]
    pieces = Pieces(tokens, own["scores"], own["token_type"], bytes(own.get("precompiled_charsmap") or b""))
    if pieces.unknown is None:
        raise CheckpointError("the GGUF file's tokenizer of kind 't5' has no token of the type unknown")
    tokenizer = unigram(pieces)
    steps: list[Any] = [normalizers.Precompiled(pieces.characters)] if pieces.characters else []
    if own.get("remove_extra_whitespaces", True):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    bos = [tokens[own["bos_token_id"]]] if own.get("add_bos_token", False) and "bos_token_id" in own else []
    eos = [tokens[own["eos_token_id"]]] if own.get("add_eos_token", True) and "eos_token_id" in own else []
    if bos or eos:
        between = eos if bos else []  # XLM-R has two separators
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *between, "$B", *eos],
            special_tokens=[(token, tokens.index(token)) for token in {*bos, *eos}],
        )
    return tokenizer
