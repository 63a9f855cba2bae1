"""Several threads call one pipeline at once: each gets what it gets alone. A call keeps what it computes in variables of its own."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.models import bert
from model_cases import randomize
from pipeline_toys import make_text2text, question_tokenizer, save_encoder

CONTEXT = "The Cat sat on the mat, and then ran. The catalogue sat; then the MAT ran on and on, the mat sat. Xylophones ran then."


def answers(folder: Path) -> list[Any]:
    tokenizer = question_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4, "max_positions": 128}
    model = bert.BertForQuestionAnswering(bert.BertConfig(vocab_size=tokenizer.vocab_size, **sizes))
    randomize(model, 0.5)
    ask = foveate.QuestionAnswerer(model.eval(), tokenizer)
    return [
        lambda n=n: ask("What ran?", CONTEXT[n:], top_k=3, max_seq_len=24 + n, doc_stride=4, batch_size=2)
        for n in range(0, 40, 5)
    ]


def texts(folder: Path) -> list[Any]:
    _, write = make_text2text(folder, 0)
    sources = [" ".join(f"w{3 + (5 * n + i) % 17}" for i in range(1 + n)) for n in range(8)]
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 7}, {"repetition_penalty": 1.5}]
    return [lambda s=s, n=n: write([s, s + " w4"], max_new_tokens=6 + n, **ways[n % 4]) for n, s in enumerate(sources)]


def tags(folder: Path) -> list[Any]:
    save_encoder(folder, "BertForTokenClassification", id2label=dict(enumerate(["O", "B-PER", "I-PER"])))
    tag = foveate.TokenClassifier(folder)
    return [lambda n=n: tag(["Ada lives in Paris"[n:], "Bob in Rome"], tokens_per_batch=9) for n in range(8)]


def vectors(folder: Path) -> list[Any]:
    save_encoder(folder, "BertModel")
    embed = foveate.Embedder(folder, max_seq_length=9)
    return [
        lambda n=n: _encoded(embed, ["Ada lives in Paris" * (1 + n % 2), "Bob in Rome"], n % 4 < 2) for n in range(8)
    ]


def _encoded(embed: foveate.Embedder, texts: list[str], truncate: bool) -> Any:
    try:
        return embed.encode(texts, truncate=truncate).tolist()
    except ValueError as error:
        return str(error)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("make, rounds", [(answers, 4), (texts, 3), (tags, 4), (vectors, 40)])
def test_each_thread_gets_its_own(make: Any, rounds: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls = make(tmp_path)
    alone = [call() for call in calls]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        order = [n % len(calls) for n in range(rounds * len(calls))]
        together = list(threads.map(lambda n: (n, calls[n]()), order))
    assert all(found == alone[n] for n, found in together)
