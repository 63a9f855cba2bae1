"""tokenizer: trains BPE, unigram or WordPiece, and compares tokenizers by bytes per token."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.data.cleaning import Paths
from foveate.data.corpus import Corpus, Row, text_of
from foveate.data.rewrite import bar
from foveate.data.tokens import library, read_tokenizer
from foveate.progress import ProgressBar

KINDS = ("bpe", "unigram", "wordpiece")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_WORDPIECE_SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
_BATCH = 256


def tokenizer(
    paths: Paths,
    output: str | os.PathLike[str] | None = None,
    *,
    kind: str = "bpe",
    vocab_size: int = 32000,
    min_frequency: int = 2,
    special: Mapping[str, str] | None = None,
    extra_special: Sequence[str] = (),
    lowercase: bool = False,
    compare: Sequence[str] = (),
    by: str | None = None,
    text_field: str = "text",
    documents: str = "pieces",
    overwrite: bool = False,
    progress: bool | None = None,
) -> dict[str, Any]:
    """A tokenizer trained on the documents, in the folder `output` (tokenizer.json, tokenizer_config.json), which `foveate train
    --tokenizer`, `foveate.tokenizer.Tokenizer` and transformers read; without output, only the comparison.

    kind:
      bpe        byte-level BPE (Sennrich et al. 2016; bytes as GPT-2 has them): no text is unknown, every text comes back as it was
      unigram    Kudo 2018, "Subword Regularization", as SentencePiece; unknown characters fall back to bytes
      wordpiece  BERT's, for masked-lm: words are parted at spaces and punctuation, letters that were not seen become [UNK]
    vocab_size: tokens, special ones included; fewer come out of small data. special: {"bos_token": text, ...}, by default <s>, </s> and
    <pad>, or BERT's five; extra_special: more, such as <|user|>.

    compare: folders of tokenizers, or names of models, measured beside the new one: {"comparison": {group: {tokenizer: {"bytes_per_token",
    "tokens", "unknown", "lossless"}}}}. by: a field (such as "language") by which documents are grouped, or "file". lossless: the share of
    documents that decode to what they were. The comparison is on the documents of training; for others, call again without output.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if output is None and not compare:
        raise ValueError("there is neither an output folder for a new tokenizer nor one to compare")
    start = time.monotonic()
    corpus = Corpus(paths, documents)
    shown = sys.stderr.isatty() if progress is None else progress
    result: dict[str, Any] = {}
    backends: dict[str, Any] = {}
    if output is not None:
        folder = Path(output).expanduser()
        if (folder / "tokenizer.json").exists() and not overwrite:
            raise FileExistsError(
                f"{folder} has a tokenizer already; choose another output, or replace it with overwrite (--overwrite)"
            )
        names = dict(special if special is not None else _WORDPIECE_SPECIAL if kind == "wordpiece" else SPECIAL)
        if kind == "wordpiece" and "unk_token" not in names:
            raise ValueError("a WordPiece tokenizer needs an unk_token among its special tokens")
        backend = _trained(
            corpus,
            kind,
            vocab_size,
            min_frequency,
            [*names.values(), *extra_special],
            lowercase,
            text_field,
            shown,
            names,
        )
        _save(folder, backend, names, extra_special)
        backends[str(output)] = backend
        result |= {"output": str(output), "kind": kind, "vocab_size": backend.get_vocab_size()}
    for path in compare:
        backends[path] = read_tokenizer(path)
    result["comparison"] = _compared(corpus, backends, by, text_field, shown)
    return result | {"seconds": round(time.monotonic() - start, 3)}


def _trained(
    corpus: Corpus, kind: str, vocab_size: int, min_frequency: int, special: list[str], lowercase: bool, field: str, shown: bool,
    names: Mapping[str, str],
) -> Any:  # fmt: skip
    tk = library()
    options: dict[str, Any] = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": False}
    least = len(special) + 256
    if kind != "wordpiece" and vocab_size < least:
        raise ValueError(
            f"vocab_size={vocab_size} must be at least {least}: 256 bytes and {len(special)} special tokens"
        )
    if kind == "bpe":
        backend = tk.Tokenizer(tk.models.BPE())
        backend.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tk.decoders.ByteLevel()
        alphabet = sorted(tk.pre_tokenizers.ByteLevel.alphabet())
        trainer = tk.trainers.BpeTrainer(min_frequency=min_frequency, initial_alphabet=alphabet, **options)
    elif kind == "unigram":
        backend = tk.Tokenizer(tk.models.Unigram())
        backend.pre_tokenizer = tk.pre_tokenizers.Metaspace()
        backend.decoder = tk.decoders.Sequence([tk.decoders.ByteFallback(), tk.decoders.Metaspace()])
        options["vocab_size"] = vocab_size - 257  # bytes and <unk>, which come after training
        trainer = tk.trainers.UnigramTrainer(**options)
    else:
        backend = tk.Tokenizer(tk.models.WordPiece(unk_token=names["unk_token"]))
        backend.normalizer = tk.normalizers.BertNormalizer(lowercase=lowercase)
        backend.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
        backend.decoder = tk.decoders.WordPiece()
        trainer = tk.trainers.WordPieceTrainer(min_frequency=min_frequency, **options)
    if lowercase and kind != "wordpiece":
        backend.normalizer = tk.normalizers.Lowercase()
    with bar("reading", corpus.size, shown) as progress:
        batches = _batches(corpus, field, progress)
        first = next(batches, None)
        if first is None:
            raise ValueError("the documents are empty: there is no text to learn a tokenizer from")
        backend.train_from_iterator(itertools.chain([first], batches), trainer)
    if kind == "unigram":
        backend = _with_bytes(backend, special)
    if kind == "wordpiece" and {"cls_token", "sep_token"} <= names.keys():
        cls, sep = names["cls_token"], names["sep_token"]
        ids = [(token, backend.token_to_id(token)) for token in (cls, sep)]
        backend.post_processor = tk.processors.TemplateProcessing(
            f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", ids
        )
    return backend


def _with_bytes(backend: Any, special: Sequence[str]) -> Any:
    """The unigram model with <unk> and a token for each byte, of low score: what no other token covers becomes bytes."""
    tk = library()
    state = json.loads(backend.to_str())
    vocab = state["model"]["vocab"]
    worst = min(score for _, score in vocab) if vocab else 0.0
    head, tail = vocab[: len(special)], vocab[len(special) :]
    extra = [["<unk>", 0.0], *([f"<0x{byte:02X}>", worst - 10.0] for byte in range(256))]
    known = {token for token, _ in extra}
    state["model"] |= {
        "vocab": [*head, *extra, *(entry for entry in tail if entry[0] not in known)], "unk_id": len(head), "byte_fallback": True,
    }  # fmt: skip
    return tk.Tokenizer.from_str(json.dumps(state))


def _batches(corpus: Corpus, field: str, progress: ProgressBar) -> Iterator[list[str]]:
    rows = corpus.rows()
    while batch := [text_of(row, field) for row in itertools.islice(rows, _BATCH)]:
        yield batch
        progress.advance(sum(map(len, batch)))


def _save(folder: Path, backend: Any, names: Mapping[str, str], extra: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": 10**30, **names,
    }  # fmt: skip
    if extra:
        config["additional_special_tokens"] = list(extra)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _compared(corpus: Corpus, backends: Mapping[str, Any], by: str | None, field: str, shown: bool) -> dict[str, Any]:
    sums: dict[str, dict[str, list[float]]] = {}
    rows = corpus.rows()
    with bar("comparing", corpus.size, shown) as progress:
        while batch := list(itertools.islice(rows, _BATCH)):
            groups = [_group(row, by) for row in batch]
            texts = [text_of(row, field) for row in batch]
            for name, backend in backends.items():
                unknown = getattr(backend.model, "unk_token", None)
                encoded = backend.encode_batch(texts, add_special_tokens=False)
                decoded = backend.decode_batch([e.ids for e in encoded], skip_special_tokens=False)
                for group, text, e, back in zip(groups, texts, encoded, decoded):
                    for key in {"all", group}:
                        totals = sums.setdefault(key, {}).setdefault(name, [0, 0, 0, 0, 0])
                        counts = (
                            len(text.encode("utf-8", "replace")),
                            len(e.ids),
                            e.tokens.count(unknown) if unknown else 0,
                            back == text,
                            1,
                        )
                        for i, value in enumerate(counts):
                            totals[i] += value
            progress.advance(sum(map(len, texts)))
    return {
        group: {
            name: {
                "bytes_per_token": round(size / max(1, tokens), 4), "tokens": int(tokens), "unknown": int(unknown),
                "lossless": round(same / documents, 4),
            }
            for name, (size, tokens, unknown, same, documents) in totals.items()
        }
        for group, totals in sums.items()
    }  # fmt: skip


def _group(row: Row, by: str | None) -> str:
    if by is None:
        return "all"
    if by == "file":
        return row.place.partition(" of ")[2].partition(" (line")[0]
    return str(row.get(by))
