"""The tokenizer inside a GGUF file: byte-level BPE with the pre-tokenizer that the file names, SentencePiece's, WordPiece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, library_errors
from foveate.tokenizer import NEED
from foveate.tokenizer.gguf_encoders import sentencepiece_unigram, wordpiece
from foveate.tokenizer.pre_tokenizers import kind_of, pre_tokenizer

_NORMAL, CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
_LONGEST = 1024  # characters of a SentencePiece token: its merges are found by trying each place to cut it

_NEEDED = {
    "gpt2": ("tokens", "token_type", "merges"), "llama": ("tokens", "token_type", "scores"), "t5": ("tokens", "token_type", "scores"),
    "bert": ("tokens",),
}  # fmt: skip


def read_tokenizer(fields: dict[str, Any], path: Path | str = "the GGUF file") -> Any:
    """A tokenizers.Tokenizer of a GGUF file's metadata. CheckpointError for other kinds of tokenizer and unknown pre-tokenizers."""
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind = own.get("model")
    if kind not in _NEEDED:
        raise CheckpointError(
            f"the GGUF file's tokenizer is of kind {kind!r}; read are 'gpt2' (byte-level BPE), 'llama' (SentencePiece's BPE), 't5' (its "
            "unigram model) and 'bert' (WordPiece): "
            "use the model's Hugging Face folder, which has a tokenizer.json"
        )
    _check_lists(own, path, _NEEDED[kind])
    with library_errors(f"the tokenizer of {path} cannot be built"):
        if kind in ("bert", "t5"):
            return wordpiece(own) if kind == "bert" else sentencepiece_unigram(own)
        return _build(own, kind)


def _check_lists(own: dict[str, Any], path: Path | str, needed: tuple[str, ...]) -> None:
    """What the keys must have in common; each alone has been checked."""
    for name in needed:
        if own.get(name) is None:
            raise CheckpointError(f"{path} lacks tokenizer.ggml.{name} in its metadata")
        if name != "merges" and len(own[name]) != len(own["tokens"]):
            raise CheckpointError(
                f"{path} has {len(own[name])} values of tokenizer.ggml.{name} for {len(own['tokens'])} tokens; it needs one for each"
            )
    for name, token in own.items():
        if name.endswith("_token_id") and token >= len(own["tokens"]):
            raise CheckpointError(f"{path} has tokenizer.ggml.{name}={token} among {len(own['tokens'])} tokens")
    for merge in own.get("merges") or ():
        if not merge.partition(" ")[0] or not merge.partition(" ")[2]:
            raise CheckpointError(f"{path} has the merge {merge[:40]!r}; it must be two tokens with a space between")


def _build(own: dict[str, Any], kind: str) -> Any:
    from tokenizers import Tokenizer, processors

    tokenizer: Tokenizer = _byte_level(own) if kind == "gpt2" else _sentencepiece(own)
    tokens, kinds = own["tokens"], own["token_type"]
    tokenizer.add_special_tokens([token for token, k in zip(tokens, kinds) if k == CONTROL])
    tokenizer.add_tokens([token for token, k in zip(tokens, kinds) if k == _USER_DEFINED])
    cut = kind_of(own.get("pre", "default"))
    by_itself = kind == "llama" or (cut is not None and cut.whole_words)
    bos = [_named(own, "bos")] if own.get("add_bos_token", by_itself and own.get("bos_token_id") is not None) else []
    eos = [_named(own, "eos")] if own.get("add_eos_token", False) else []
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, tokens.index(token)) for token in {*bos, *eos}],
        )
    return tokenizer


def _named(own: dict[str, Any], name: str) -> str:
    if own.get(f"{name}_token_id") is None:
        raise CheckpointError(f"tokenizer.ggml.add_{name}_token is set, and there is no tokenizer.ggml.{name}_token_id")
    return own["tokens"][own[f"{name}_token_id"]]


def _byte_level(own: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = own.get("pre", "default")
    cut = kind_of(pre)
    merges = [tuple(merge.split(" ", 1)) for merge in own["merges"]]
    vocab = {token: i for i, token in enumerate(own["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=cut is not None and cut.whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if cut is not None and cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(own: dict[str, Any]) -> Any:
    """The file has a score for each piece and no merges: two pieces merge if their union is a piece, the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = own["tokens"], own["scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, own["token_type"]) if kind == _NORMAL}
    merges = []
    longest = max(map(len, normal), default=0)
    if longest > _LONGEST:
        raise CheckpointError(f"a token has {longest} characters; SentencePiece's have at most {_LONGEST}")
    for token in sorted(normal, key=lambda token: (-scores[vocab[token]], vocab[token])):
        for cut in range(1, len(token)):
            if token[:cut] in normal and token[cut:] in normal:
                merges.append((token[:cut], token[cut:]))
    if not tokens:
        raise CheckpointError("tokenizer.ggml.tokens is empty")
    unknown = tokens[own.get("unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "\u2581")
    decoding = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if own.get("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
        tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer
