"""Further kinds for fuzz.py: models of every kind of family, what goes beside a model, and data."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foveate import LLM, SamplingParams, Text2Text
from foveate.models import load_model, open_checkpoint

Damage = Callable[[Any, random.Random], Any]
Flip = Callable[[bytes, random.Random, int], bytes]

# model_type and transformers' class for its head: decoders with each odd part, encoders with each head, encoder-decoders.
FAMILIES = [
    ("gpt2", "CausalLM"), ("qwen2", "SequenceClassification"), ("qwen3_moe", "CausalLM"), ("gemma2", "CausalLM"), ("phi3", "CausalLM"),
    ("gpt_neox", "CausalLM"), ("deepseek_v3", "CausalLM"), ("bert", "QuestionAnswering"), ("roberta", "SequenceClassification"),
    ("distilbert", "TokenClassification"), ("modernbert", "MaskedLM"), ("bart", "Seq2SeqLM"), ("marian", "Seq2SeqLM"),
    ("t5", "Seq2SeqLM"),
]  # fmt: skip
_SOURCES: dict[str, Path] = {}


def _source(name: str, head: str, whole: Path) -> Path:
    """A folder with a small model, made once for each process, and the tokenizer of `whole`."""
    if name not in _SOURCES:
        import transformers

        from tiny_configs import tiny

        torch.manual_seed(0)
        given = {"pad_token_id": 2, "eos_token_id": 1, "bos_token_id": 0, "tie_word_embeddings": True}
        if head == "Seq2SeqLM":
            given["decoder_start_token_id"] = 2
        config = tiny(transformers.CONFIG_MAPPING[name], **given)
        folder = whole.parent / name
        getattr(transformers, f"AutoModelFor{head}").from_config(config).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(whole / file, folder)
        _SOURCES[name] = folder
    return _SOURCES[name]


def families(draw: random.Random, folder: Path, damaged: Damage, flipped: Flip) -> None:
    name, head = draw.choice(FAMILIES)
    own = folder / "model"
    shutil.copytree(_source(name, head, folder.parent / "whole"), own)
    kind = draw.random()
    if kind < 0.9:
        value = json.loads((own / "config.json").read_text())
        for _ in range(draw.choice((1, 1, 2))):
            value = damaged(value, draw)
        (own / "config.json").write_text(json.dumps(value))
    else:
        file = own / "model.safetensors"
        file.write_bytes(flipped(file.read_bytes(), draw, 4000))
    if head == "CausalLM":
        LLM(own, kv_cache_bytes=1 << 18, progress=False).generate([[5]], SamplingParams(max_tokens=1, temperature=0))
    elif head == "Seq2SeqLM":
        Text2Text(own, progress=False).generate([[5, 6]], max_new_tokens=2)
    else:
        load_model(own, progress=False)(torch.tensor([[5, 6]]))


def companions(draw: random.Random, folder: Path, damaged: Damage, flipped: Flip) -> None:
    """A draft model, an adapter beside the model, and the text of an importance matrix."""
    kind = draw.choice(["draft", "adapter", "imatrix"])
    if kind == "imatrix":
        file = folder / "text.txt"
        file.write_bytes(flipped(b'A!" b\n' * 40, draw, 240))
        LLM(folder, kv_cache_bytes=1 << 18, progress=False, quantization="q4_1", imatrix=file)
        return
    other = folder / "other"
    shutil.copytree(folder.parent / "whole", other)
    if kind == "draft":
        value = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(damaged(value, draw)))
        llm = LLM(folder, kv_cache_bytes=1 << 18, progress=False, draft_model=other)
        llm.generate([[5]], SamplingParams(max_tokens=3, temperature=0))
        return
    from foveate.train.checkpoints.adapter import save_adapter
    from foveate.train.modules.lora import LoraConfig, add_lora

    model = load_model(other, progress=False)
    add_lora(model, LoraConfig(2))
    save_adapter(model, LoraConfig(2), other, base=None)
    if draw.random() < 0.6:
        file = other / "adapter_config.json"
        file.write_text(json.dumps(damaged(json.loads(file.read_text()), draw)))
    else:
        file = other / "adapter_model.safetensors"
        file.write_bytes(flipped(file.read_bytes(), draw, 2500))
    llm = LLM(folder, kv_cache_bytes=1 << 18, progress=False)
    llm.load_adapter("a", other)
    llm.generate([[5]], SamplingParams(max_tokens=2, temperature=0), adapter="a")


ROWS: dict[str, list[Any]] = {
    "causal-lm": [
        {"text": "a b"}, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"prompt": "a", "completion": "b"}, {"instruction": "a", "input": "", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    ],
    "sequence-classification": [{"text": "a", "label": "x"}, {"text": "b", "label": 1}],
    "question-answering": [{"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [2]}},
                           {"question": "a", "context": "b c", "answers": [{"text": "c", "answer_start": 2}]}],
    "seq2seq": [{"source": "a", "target": "b"}],
}  # fmt: skip


def data(draw: random.Random, folder: Path, damaged: Damage, flipped: Flip) -> None:
    """A damaged file of rows, through each reader, to the examples of an objective."""
    from foveate.files.data_files import read_rows
    from foveate.train.config import TrainConfig
    from foveate.train.data.tokenized import tokenized
    from foveate.train.objectives import choose

    task = draw.choice(list(ROWS))
    row = draw.choice(ROWS[task])
    rows = [row, damaged(row, draw), damaged(row, draw)]
    suffix = draw.choice([".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".txt"])
    file = folder / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), file)
    else:
        text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        if suffix in (".csv", ".tsv"):
            lines = [list(row), *([str(x) for x in r.values()] if isinstance(r, dict) else ["x"] for r in rows)]
            text = "\n".join((", " if suffix == ".csv" else "\t").join(line) for line in lines)
        raw = text.encode("utf-8", "surrogatepass")
        file.write_bytes(gzip.compress(raw) if suffix.endswith(".gz") else raw)
    if draw.random() < 0.4:
        file.write_bytes(flipped(file.read_bytes(), draw, 2000))
    for _ in read_rows([str(file)]):
        pass
    config = TrainConfig(
        output_dir=str(folder / "out"), model=str(folder), train_data=[str(file)], objective=task, max_length=16
    )
    tokenizer = open_checkpoint(folder).tokenizer()
    assert tokenizer is not None
    objective = choose.make_objective(config, tokenizer, {"model_type": "bart", "decoder_start_token_id": 2})
    objective.examples(tokenized([str(file)], objective, tokenizer, cache=folder / "cache", progress=False))


KINDS = {"families": families, "companions": companions, "data": data}
