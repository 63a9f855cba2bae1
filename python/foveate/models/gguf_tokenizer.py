"""The tokenizer inside a GGUF file: byte-level BPE with the pre-tokenizer that the file names."""

from __future__ import annotations

from typing import Any

from foveate.models.checkpoint import NEED_MODELS

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

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
        from tokenizers import Tokenizer, decoders, models, normalizers, processors
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED_MODELS}") from error

    def value(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    kind = value("model")
    if kind != "gpt2":
        raise ValueError(
            f"the GGUF file's tokenizer is of kind {kind!r}; read are those of kind 'gpt2' (byte-level BPE): use the model's "
            "Hugging Face folder, which has a tokenizer.json"
        )
    pre = value("pre", "default")
    tokens, kinds = value("tokens"), value("token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in value("merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([token for token, k in zip(tokens, kinds) if k == _CONTROL])
    tokenizer.add_tokens([token for token, k in zip(tokens, kinds) if k == _USER_DEFINED])
    if value("add_bos_token", False):
        bos = tokens[value("bos_token_id")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])]
        )
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
