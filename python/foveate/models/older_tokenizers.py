"""Tokenizers of folders from before tokenizer.json: BERT's vocab.txt, and GPT-2's vocab.json with merges.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.tokenizer import NEED


def read_older_tokenizer(folder: Path, model_type: str | None, tokenizer_config: dict[str, Any]) -> Any:
    """A tokenizers.Tokenizer, or None where the folder has no such files."""
    words, merges = folder / "vocab.txt", folder / "merges.txt"
    try:
        if model_type == "bert" and words.exists():
            return _wordpiece(words, tokenizer_config)
        if merges.exists() and (folder / "vocab.json").exists():
            return _byte_level(folder / "vocab.json", merges)
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    return None


def _wordpiece(words: Path, tokenizer_config: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    lines = words.read_text(encoding="utf-8").split("\n")
    vocab = {word: i for i, word in enumerate(lines if lines[-1] else lines[:-1])}
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


def _byte_level(vocab: Path, merges: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
