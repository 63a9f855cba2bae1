"""The tokenizer inside a GGUF file: byte-level BPE with the pre-tokenizer that the file names, or SentencePiece's BPE."""

from __future__ import annotations

from typing import Any

from foveate.tokenizer import NEED

_NORMAL, CONTROL, _USER_DEFINED = 1, 3, 4  # of tokenizer.ggml.token_type

# How text is cut before BPE. {digits} is how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.format(digits="{1,3}")
_QWEN2 = _WORDS.format(digits="")


def read_tokenizer(fields: dict[str, Any]) -> Any:
    """A tokenizers.Tokenizer of a GGUF file's metadata. ValueError for other kinds of tokenizer and unknown pre-tokenizers."""
    try:
        from tokenizers import Tokenizer, processors
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    own = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    kind = own.get("model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"the GGUF file's tokenizer is of kind {kind!r}; read are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece's BPE): "
            "use the model's Hugging Face folder, which has a tokenizer.json"
        )
    tokenizer: Tokenizer = _byte_level(own) if kind == "gpt2" else _sentencepiece(own)
    tokens, kinds = own["tokens"], own["token_type"]
    tokenizer.add_special_tokens([token for token, k in zip(tokens, kinds) if k == CONTROL])
    tokenizer.add_tokens([token for token, k in zip(tokens, kinds) if k == _USER_DEFINED])
    bos = [tokens[own["bos_token_id"]]] if own.get("add_bos_token", kind == "llama") else []
    eos = [tokens[own["eos_token_id"]]] if own.get("add_eos_token", False) else []
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B", *eos],
            special_tokens=[(token, tokens.index(token)) for token in {*bos, *eos}],
        )
    return tokenizer


def _byte_level(own: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = own.get("pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in own["merges"]]
    vocab = {token: i for i, token in enumerate(own["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in ("llama-bpe", "llama3")))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(own: dict[str, Any]) -> Any:
    """The file has a score for each piece and no merges: two pieces merge if their union is a piece, the highest score first."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, scores = own["tokens"], own["scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, own["token_type"]) if kind == _NORMAL}
    merges = []
    for token in sorted(normal, key=lambda token: (-scores[vocab[token]], vocab[token])):
        for cut in range(1, len(token)):
            if token[:cut] in normal and token[cut:] in normal:
                merges.append((token[:cut], token[cut:]))
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


def _pre_tokenizer(name: str) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if name in ("gpt-2", "gpt2", "default"):
        return ByteLevel(add_prefix_space=False)
    if name == "smollm":
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    patterns = {"llama-bpe": _LLAMA3, "llama3": _LLAMA3, "qwen2": _QWEN2}
    if name in patterns:
        return Sequence([Split(Regex(patterns[name]), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(["default", "gpt-2", "smollm", *patterns])
    raise ValueError(f"the GGUF file asks for the pre-tokenizer {name!r}; known are {known}")
