"""Small encoders and encoder-decoders, their tokenizers and questions, for the tests of objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from foveate.tokenizer import Tokenizer
from foveate.train.checkpoints.model import export_tokenizer
from train_toys import WORDS, sentences, write_jsonl

BERT: dict[str, Any] = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
T5_CONFIG: dict[str, Any] = {
    "model_type": "t5", "d_model": 32, "d_ff": 48, "d_kv": 16, "num_heads": 2, "num_layers": 2, "dropout_rate": 0.0,
    "pad_token_id": 0, "decoder_start_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
BART_CONFIG: dict[str, Any] = {
    "model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0,
    "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip


def wordpiece(folder: Path) -> str:
    """[PAD] [UNK] [CLS] [SEP] [MASK], words, and pieces that continue a word."""
    from foveate.tokenizer.vocab_files import read_older_tokenizer

    pieces = [*sorted(set(WORDS)), *"abcdefghijklmnopqrstuvwxyz", "fox", "##es", "##ing", ".", "?", "who", "what"]
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    special = {"mask_token": "[MASK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = Tokenizer(read_older_tokenizer(folder, "bert", {}), tokenizer_config=special)
    return save(tokenizer, folder / "wordpiece")


def unigram(folder: Path) -> str:
    """Words, <pad> 0, </s> 1, and 20 sentinels."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    tokens = ["<pad>", "</s>", "<unk>", *sorted(set(WORDS)), *(f"<extra_id_{i}>" for i in range(20))]
    backend = tokenizers.Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([t for t in tokens if t.startswith("<")])
    return save(Tokenizer(backend, tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>"}), folder / "unigram")


def save(tokenizer: Tokenizer, folder: Path) -> str:
    """A folder that serves as `tokenizer`."""
    folder.mkdir()
    export_tokenizer(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return str(folder)


def squad(folder: Path, count: int = 40, seed: int = 0) -> str:
    """Who did it? The word before "over"."""
    rows = []
    for i, text in enumerate(sentences(count, seed)):
        name = WORDS[i % 7]
        context = f"{text} {name} over {text}"
        rows.append({
            "id": str(i), "question": "who jumps over ?", "context": context,
            "answers": [{"text": name, "answer_start": context.index(f"{name} over", len(text))}],
        })  # fmt: skip
    return write_jsonl(folder / f"squad{seed}.jsonl", rows)
