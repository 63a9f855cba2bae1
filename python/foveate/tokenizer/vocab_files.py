"""Tokenizers of folders from before tokenizer.json: BERT's vocab.txt, vocab.json with merges.txt of GPT-2 and Qwen 2, SentencePiece's,
DeBERTa's spm.model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.files.checked import CheckpointError, is_there, library_errors, read_text
from foveate.tokenizer import NEED
from foveate.tokenizer.pre_tokenizers import pre_tokenizer
from foveate.tokenizer.sentencepiece import read_sentencepiece
from foveate.tokenizer.unigram import read_deberta

_WORDPIECE = ("BertTokenizer", "BertTokenizerFast")
_GPT2 = ("GPT2Tokenizer", "GPT2TokenizerFast")
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_DEBERTA = ("DebertaV2Tokenizer", "DebertaV2TokenizerFast")
_OTHERS = ("tokenizer.model", "spiece.model", "spm.model", "vocab.txt", "vocab.json")


def read_older_tokenizer(folder: Path, model_type: str | None, tokenizer_config: dict[str, Any]) -> Any:
    """A tokenizers.Tokenizer, or None where the folder has no such files. CheckpointError for those of other tokenizers."""
    if (pieces := read_sentencepiece(folder, model_type, tokenizer_config)) is not None:
        return pieces
    words, merges = folder / "vocab.txt", folder / "merges.txt"
    kind = tokenizer_config.get("tokenizer_class") or _class_of(model_type)
    try:
        if kind in _WORDPIECE and is_there(words):
            with library_errors(f"{words} is not a vocabulary of BERT"):
                return _wordpiece(words, tokenizer_config)
        if kind in _DEBERTA and is_there(folder / "spm.model"):
            with library_errors(f"{folder / 'spm.model'} makes no tokenizer"):
                return read_deberta(folder, tokenizer_config)
        if kind in (*_GPT2, *_QWEN2) and is_there(merges) and is_there(folder / "vocab.json"):
            with library_errors(f"{folder} has a vocab.json and merges.txt that make no tokenizer"):
                tokenizer = _byte_level(folder / "vocab.json", merges, tokenizer_config)
                return _as_qwen2(tokenizer) if kind in _QWEN2 else tokenizer
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    others = [name for name in _OTHERS if is_there(folder / name)]
    if others:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and its {' and '.join(others)} cannot be read as a {kind or 'tokenizer of unknown class'}: "
            "write a tokenizer.json once, by transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    return None


def _class_of(model_type: str | None) -> str | None:
    known = {
        "bert": _WORDPIECE[0], "gpt2": _GPT2[0], "qwen2": _QWEN2[0], "qwen3": _QWEN2[0], "deberta-v2": _DEBERTA[0],
    }  # fmt: skip
    return known.get(model_type or "")


def _as_qwen2(tokenizer: Any) -> Any:
    from tokenizers import normalizers

    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizer("qwen2")
    return tokenizer


def _wordpiece(words: Path, tokenizer_config: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = read_text(words).split("\n")
    vocab = {word: i for i, word in enumerate(lines if lines[-1] else lines[:-1])}
    absent = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if absent:
        raise CheckpointError(f"{words} lacks {' and '.join(absent)}, so it is not a vocabulary of BERT")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=tokenizer_config.get("do_lower_case", True),
        strip_accents=tokenizer_config.get("strip_accents"),
        handle_chinese_chars=tokenizer_config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([t for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]") if t in vocab])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return tokenizer


def _byte_level(vocab: Path, merges: Path, tokenizer_config: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(tokenizer_config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
