"""The tokenizer inside a GGUF file: byte-level BPE with the pre-tokenizer that the file names, or SentencePiece's BPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, library_errors
from foveate.tokenizer import NEED

_NORMAL, CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type
_LONGEST = 1024  # characters of a SentencePiece token: its merges are found by trying each place to cut it

# How text is cut before BPE. {digits} is how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.format(digits="{1,3}")
_QWEN2 = _WORDS.format(digits="")
# Mistral's: upper and lower case apart, so that a word's capitals are a piece of their own.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN, "smaug-bpe": _LLAMA3}
_SAME_AS = {
    "default": "gpt-2", "gpt2": "gpt-2", "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "pixtral": "llama-bpe",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2", "kormo": "qwen2",
}  # fmt: skip
# Whole words that are tokens are not merged, and a text begins with BOS where the file does not say otherwise, as llama.cpp has it.
_WHOLE_WORDS = ("llama-bpe", "tekken")


def read_tokenizer(fields: dict[str, Any], path: Path | str = "the GGUF file") -> Any:
    """A tokenizers.Tokenizer of a GGUF file's metadata. CheckpointError for other kinds of tokenizer and unknown pre-tokenizers."""
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind = own.get("model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"the GGUF file's tokenizer is of kind {kind!r}; read are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE): "
            "use the model's Hugging Face folder, which has a tokenizer.json"
        )
    _check_lists(
        own, path, ("tokens", "token_type", "merges") if kind == "gpt2" else ("tokens", "token_type", "scores")
    )
    with library_errors(f"the tokenizer of {path} cannot be built"):
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
    by_itself = kind == "llama" or _SAME_AS.get(own.get("pre", ""), own.get("pre")) in _WHOLE_WORDS
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
    merges = [tuple(merge.split(" ", 1)) for merge in own["merges"]]
    vocab = {token: i for i, token in enumerate(own["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=_SAME_AS.get(pre, pre) in _WHOLE_WORDS))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if _SAME_AS.get(pre, pre) == "qwen2":
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


def pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    kind = _SAME_AS.get(name, name)
    if kind == "gpt-2":
        return ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    if kind in _PATTERNS:
        return Sequence([Split(Regex(_PATTERNS[kind]), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(["gpt-2", "smollm", *_PATTERNS, *_SAME_AS])
    raise CheckpointError(
        f"the GGUF file asks for the pre-tokenizer {name!r}; known are {known}: use the model's Hugging Face folder, which has a "
        "tokenizer.json"
    )
