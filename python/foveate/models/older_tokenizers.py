"""Tokenizers of folders from before tokenizer.json: BERT's vocab.txt, and GPT-2's vocab.json with merges.txt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.checked_files import CheckpointError, is_there, library_errors, read_text
from foveate.tokenizer import NEED


def read_older_tokenizer(folder: Path, model_type: str | None, tokenizer_config: dict[str, Any]) -> Any:
    """A tokenizers.Tokenizer, or None where the folder has no such files."""
    words, merges = folder / "vocab.txt", folder / "merges.txt"
    try:
        if model_type == "bert" and is_there(words):
            with library_errors(f"{words} is not a vocabulary of BERT"):
                return _wordpiece(words, tokenizer_config)
        if is_there(merges) and is_there(folder / "vocab.json"):
            with library_errors(f"{folder} has a vocab.json and merges.txt that make no tokenizer"):
                return _byte_level(folder / "vocab.json", merges)
    except ImportError as error:
        raise ImportError(f"tokenizers {NEED}") from error
    return None


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


def _byte_level(vocab: Path, merges: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id("<|endoftext|>") is not None:
        tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer
