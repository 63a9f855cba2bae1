"""The pre-tokenizers of byte-level BPE by the names that GGUF files have for them: how text is cut before its pieces are merged.

A kind is a sequence of regular expressions. Each cuts the pieces that the one before it has left into what it matches and what is between.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from foveate.files.checked import CheckpointError


class Kind(NamedTuple):
    """whole_words: words that are tokens are not merged, and a text begins with BOS where the file does not say otherwise."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# {digits} is how many digits stay together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS.format(digits="{1,3}"), _WORDS.format(digits="")
_CAPITALS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Upper and lower case apart, so that a word's capitals are a piece of their own.
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*|\p{{N}}{_REST}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*{_ENDINGS}"
    rf"|\p{{N}}{{1,3}}{_REST}"
)
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_IDEOGRAPHS = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_QWEN35 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_HAN_APART = r"(?=[^\p{Han}])"
_KIMI = (
    rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?(?:{_HAN_APART}{_CAPITALS})*(?:{_HAN_APART}{_SMALL})+{_ENDINGS}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?(?:{_HAN_APART}{_CAPITALS})+(?:{_HAN_APART}{_SMALL})*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

KINDS: dict[str, Kind] = {
    "gpt-2": Kind((_GPT2,)),
    "smollm": Kind((r"\p{N}", _GPT2)),
    "llama-bpe": Kind((_LLAMA3,), whole_words=True),
    "smaug-bpe": Kind((_LLAMA3,)),
    "qwen2": Kind((_QWEN2,), nfc=True),
    "qwen35": Kind((_QWEN35,), nfc=True),
    "tekken": Kind((_TEKKEN,), whole_words=True),
    "gpt-4o": Kind((_GPT4O,)),
    "deepseek-llm": Kind(
        (r"[\r\n]", "\\s?[A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
         "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
         "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
         "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
         "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
         "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
         "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
         "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb"
         "\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943]+",
         "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", _IDEOGRAPHS, r"\p{N}+")
    ),
    "deepseek-coder": Kind((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, r"\p{N}")),
    "deepseek-v3": Kind((r"\p{N}{1,3}", _CJK, _DEEPSEEK3)),
    "falcon": Kind((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")),
    "bloom": Kind((_BLOOM,)),
    "viking": Kind((_BLOOM, r"\p{N}")),
    "superbpe": Kind((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "seed-coder": Kind((_SEED,)),
    "kimi-k2": Kind((_KIMI,)),
}  # fmt: skip
_SAME_AS = {
    "gpt-2": "default gpt2 phi-2 jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code gigachat a.x-4.0 mellum modern-bert mpt "
    "olmo jais trillion granite-docling roberta-bpe exaone4",
    "smollm": "starcoder refact command-r codeshell exaone minerva-7b",
    "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    "smaug-bpe": "dbrx chatglm-bpe glm4 minimax-m2 grok-2",
    "qwen2": "deepseek-r1-qwen megrez kormo stablelm2 hunyuan solar-open bailingmoe bailingmoe2 llada-moe",
    "gpt-4o": "llama4 kanana2",
    "deepseek-v3": "hunyuan-dense",
    "bloom": "poro-chat gpt3-finnish",
}
_OTHER_NAMES = {name: kind for kind, names in _SAME_AS.items() for name in names.split()}
# What a tokenizer is told by: how it cuts this.
_PROBE = (
    "Hello, world's  first 12345678 tests!\n\n\tI'LL we've DON'T camelCaseWORDSHere x=3.14+y2; (a|b)  \u00c9t\u00e9 na\u00efve\r\n"
    " \u0441\u0442\u0440\u0430\u0443\u0441 \u4f60\u597d\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f\u30ab\u30ca \ud55c\uad6d\uc5b4"
    "\u0905\u0928\u0941\u0938\u094d\u0935\u093e\u0930 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \U0001f600\U0001f680 $100 50% #tag @me -- ..."
    " \u2026 \u00bd \u2167 /path/to/file.txt\n\n\nnext line\n </s>_id__x \u00a0 end   \n "
)


def names() -> list[str]:
    return [*KINDS, *_OTHER_NAMES]


def kind_of(name: str) -> Kind | None:
    """None for an unknown name."""
    return KINDS.get(_OTHER_NAMES.get(name, name))


def pre_tokenizer(name: str) -> Any:
    """A pre-tokenizer of the tokenizers library. CheckpointError for an unknown name."""
    kind = kind_of(name)
    if kind is None:
        raise CheckpointError(
            f"the GGUF file asks for the pre-tokenizer {name!r}; known are {', '.join(names())}: use the model's Hugging Face folder, "
            "which has a tokenizer.json"
        )
    return _built(kind)


def _built(kind: Kind) -> Any:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    return Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.lru_cache(maxsize=64)
def _cut(kind: Kind) -> tuple[str, ...]:
    return tuple(piece for piece, _ in _built(kind).pre_tokenize_str(_PROBE))


def name_of(backend: Any, whole_words: bool, normalizer: dict[str, Any] | None) -> str:
    """The name of how a tokenizers.Tokenizer cuts text, told by a text that every kind cuts in its own way. CheckpointError if none does
    the same."""
    cut = (
        ()
        if backend.pre_tokenizer is None
        else tuple(piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(_PROBE))
    )
    same = [name for name, kind in KINDS.items() if _cut(kind) == cut]
    if not same:
        raise CheckpointError(
            "the tokenizer cuts text as no pre-tokenizer that GGUF has a name for; llama.cpp would read the file and make other tokens: "
            "--to safetensors keeps the tokenizer.json"
        )
    return next((name for name in same if KINDS[name].whole_words == whole_words), same[0])
