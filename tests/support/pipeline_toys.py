"""Small models and tokenizers for the tests of pipelines, and of what serves and shows them."""

from __future__ import annotations

import json
import string
import warnings
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

from foveate.pipelines.text2text import Text2Text
from foveate.tokenizer import Tokenizer
from model_cases import randomize

VOCAB, PAD, EOS, START = 24, 0, 1, 2
_LETTERS = string.ascii_lowercase
ENCODER_VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *_LETTERS,
    *("##" + c for c in _LETTERS),
    ".",
    ",",
    "ada",
    "lives",
    "in",
]


def text2text_tokenizer() -> Tokenizer:
    """Words w3 .. w23, and </s> at the end of each text."""
    vocab = {"<pad>": PAD, "</s>": EOS, "<s>": START} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<pad>", "</s>", "<s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", EOS)]
    )
    return Tokenizer(backend, config={"eos_token_id": EOS, "pad_token_id": PAD})


def make_text2text(folder: Path, seed: int = 0, std: float = 0.25) -> tuple[Any, Text2Text]:
    """transformers' model and ours with the same weights; </s> comes early in some outputs, late or never in others."""
    torch.manual_seed(seed)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, feed_forward_proj="gated-gelu", pad_token_id=PAD, eos_token_id=EOS,
        decoder_start_token_id=START,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    randomize(model, std)
    with torch.no_grad():
        model.shared.weight *= 4
        model.shared.weight[EOS] *= 2.5
    model.save_pretrained(folder)
    text2text_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return model, Text2Text(folder)


def question_tokenizer() -> Tokenizer:
    """Some words, and pieces of one letter for all others."""
    letters, words = (
        "abcdefghijklmnopqrstuvwxyz0123456789.,!?é中",
        ["the", "cat", "sat", "on", "mat", "and", "then", "ran"],
    )
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words, *letters, *(f"##{c}" for c in letters), ";"]
    backend = tokenizers.Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return Tokenizer(backend)


def save_encoder(folder: Path, head: str, seed: int = 0, **config: Any) -> Any:
    """transformers' BERT with this head, in a folder."""
    torch.manual_seed(seed)
    shape = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64
    )
    model = getattr(transformers, head)(
        transformers.BertConfig(vocab_size=len(ENCODER_VOCAB), initializer_range=0.5, **shape, **config)
    ).eval()
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(ENCODER_VOCAB) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    return model
