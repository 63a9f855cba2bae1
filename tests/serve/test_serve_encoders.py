"""The routes to encoders and encoder-decoders, by the pipelines of the checkpoints, which the server finds by itself."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import shutil
import struct

import pytest
import torch

import foveate
import generation_toys as toys
import serve_toys
from foveate.serve.served import loader

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from pipeline_toys import make_text2text
    from pipeline_toys import save_encoder as save

    made = {name: tmp_path_factory.mktemp(name) for name in ("embed", "rank", "sort", "answer", "write")}
    save(made["embed"], "BertModel")
    save(made["rank"], "BertForSequenceClassification", num_labels=1)
    save(made["sort"], "BertForSequenceClassification", id2label={0: "good", 1: "bad", 2: "neither"})
    save(made["answer"], "BertForQuestionAnswering")
    make_text2text(made["write"])
    return made


@pytest.fixture(scope="module")
def encoders(folders):
    with serve_toys.serving(
        {name: loader(path, {"progress": False, "num_pages": 64}) for name, path in folders.items()}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def decoders(folder, tmp_path_factory):
    """A causal model; one whose folder has a pooling, as Qwen3-Embedding's; one without a tokenizer; and an adapter of the first."""
    pooled, ids = tmp_path_factory.mktemp("pooled"), tmp_path_factory.mktemp("ids")
    for copied in (pooled, ids):
        shutil.copytree(folder, copied, dirs_exist_ok=True)
    (ids / "tokenizer.json").unlink()
    parts = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"} for i, path, kind in parts
    ]
    (pooled / "modules.json").write_text(json.dumps(modules))
    (pooled / "1_Pooling").mkdir()
    (pooled / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    adapter = toys.adapter(tmp_path_factory.mktemp("adapter"), 1)
    paths = {"toy": folder, "pooled": pooled, "ids": ids}
    loaders = {name: loader(path, {"progress": False, "num_pages": 64}) for name, path in paths.items()}
    with serve_toys.serving(loaders, adapters={"tuned": adapter}) as running:
        yield running


def test_embeddings(encoders, folders):
    texts = ["ada lives in rome", "paris"]
    expected = foveate.Embedder(folders["embed"]).encode(texts)
    found = encoders.post("/v1/embeddings", model="embed", input=texts).json()
    assert [entry["index"] for entry in found["data"]] == [0, 1] and found["object"] == "list"
    for entry, row in zip(found["data"], expected.tolist()):
        assert entry["embedding"] == row
    packed = encoders.post("/v1/embeddings", model="embed", input=texts[0], encoding_format="base64").json()["data"][0][
        "embedding"
    ]
    assert list(struct.unpack("<32f", base64.b64decode(packed))) == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] > 4
    assert encoders.error(400, "/v1/embeddings", model="embed", input=[])["param"] == "input"
    for ids in ([5, 6], [[5, 6]]):  # of OpenAI's tokenizer, as LangChain sends them
        assert "send texts" in encoders.error(400, "/v1/embeddings", model="embed", input=ids)["message"]
    by_path = encoders.post("/v1/engines/embed/embeddings", input=texts).json()  # as openai 0.28 writes engine=
    assert by_path["data"] == found["data"]


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank(encoders, folders, path):
    documents = ["paris", "rome in ada", "x"]
    expected = foveate.Reranker(folders["rank"])("ada", documents)
    answer = encoders.post(path, model="rank", query="ada", documents=documents).json()
    found = answer["results"]
    assert answer["id"] and answer["usage"]["total_tokens"] > 4
    assert [(entry["index"], entry["document"]["text"]) for entry in found] == [
        (entry["index"], entry["text"]) for entry in expected
    ]
    assert [entry["relevance_score"] for entry in found] == pytest.approx(
        [entry["score"] for entry in expected], abs=1e-6
    )
    best = encoders.post(path, model="rank", query="ada", documents=documents, top_n=1, return_documents=False).json()[
        "results"
    ]
    assert len(best) == 1 and set(best[0]) == {"index", "relevance_score"}


def test_score(encoders, folders):
    """A cross-encoder's is the reranker's, an embedder's the cosine."""
    documents = ["paris", "rome in ada"]
    expected = {row["index"]: row["score"] for row in foveate.Reranker(folders["rank"])("ada", documents)}
    found = encoders.post("/v1/score", model="rank", text_1="ada", text_2=documents).json()
    assert [row["score"] for row in found["data"]] == pytest.approx([expected[0], expected[1]], abs=1e-6)
    assert found["usage"]["total_tokens"] > 0 and found["object"] == "list"
    alike = encoders.post("/v1/score", model="embed", text_1=["paris", "x"], text_2=["paris", "rome"]).json()["data"]
    assert alike[0]["score"] == pytest.approx(1, abs=1e-5) and alike[1]["score"] < 0.999
    assert encoders.error(400, "/v1/score", model="rank", text_1=["a", "b"], text_2=["c"])["param"] == "text_1"


def test_classify(encoders, folders):
    texts = ["ada lives", "in rome"]
    expected = foveate.TextClassifier(folders["sort"])(texts, top_k=3)
    found = encoders.post("/v1/classify", model="sort", input=texts).json()["data"]
    for row, best in zip(found, expected):
        assert row["label"] == best[0]["label"] and row["num_classes"] == 3
        assert max(row["probs"]) == pytest.approx(best[0]["score"], abs=1e-6) and sum(row["probs"]) == pytest.approx(1)


def test_answers(encoders, folders):
    question, context = "who lives", "ada lives in rome, bob in paris."
    expected = foveate.QuestionAnswerer(folders["answer"])(question, context, top_k=2)
    found = encoders.post("/v1/answers", model="answer", question=question, context=context, top_k=2).json()["data"]
    assert [(row["answer"], row["start"]) for row in found] == [(row["answer"], row["start"]) for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], abs=1e-6)
    assert all(context[row["start"] : row["end"]] == row["answer"] for row in found)
    assert encoders.error(400, "/v1/answers", model="answer", question="", context=context)


def test_text2text(encoders, folders):
    texts = ["w5 w9 w3", "w20 w4"]
    expected = foveate.Text2Text(folders["write"])(texts, max_new_tokens=6, num_beams=2, num_return_sequences=2)
    asked = {"model": "write", "input": texts, "max_new_tokens": 6, "num_beams": 2, "num_return_sequences": 2}
    found = encoders.post("/v1/text2text", **asked).json()
    assert [row["texts"] for row in found["data"]] == expected and found["usage"]["completion_tokens"] > 0
    assert encoders.error(400, "/v1/text2text", **(asked | {"num_beams": 0}))["param"] is None
    assert "64" in encoders.error(400, "/v1/text2text", **(asked | {"num_beams": 64}))["message"]


@pytest.mark.parametrize("name, pooling, normalize", [("toy", "lasttoken", False), ("pooled", "mean_tokens", True)])
def test_embeddings_of_causal_models(decoders, folder, name, pooling, normalize):
    """Of the last token, or as the folder says; beside what runs in the engine, whose tokens stay what they are."""
    texts = ["Ada lives in Rome.", "Paris", "Bob lives in Paris, and Ada does not."]
    expected = foveate.Embedder(folder, pooling=pooling, normalize=normalize).encode(texts)
    if name == "toy":
        before = decoders.text(model="toy", prompt="Ada", temperature=0, max_tokens=8)
    found = decoders.post("/v1/embeddings", model=name, input=texts).json()
    rows = torch.tensor([entry["embedding"] for entry in found["data"]])
    torch.testing.assert_close(rows, expected, atol=1e-4, rtol=1e-4)
    assert found["usage"]["prompt_tokens"] > 10
    if name == "toy":
        assert decoders.text(model="toy", prompt="Ada", temperature=0, max_tokens=8) == before


def test_embeddings_that_a_causal_model_cannot_give(decoders, encoders):
    def refused(model, text="x"):
        return decoders.error(400, "/v1/embeddings", model=model, input=text)["message"]

    assert "adapter" in refused("tuned") and "toy" in refused("tuned")
    assert "no tokenizer" in refused("ids")
    assert "the text 1 has no tokens" in refused("toy", ["x", ""])
    assert "max_seq_length is 256" in refused("toy", "word " * 300)
    assert "Reranker" in encoders.error(400, "/v1/embeddings", model="rank", input="x")["message"]
    assert "Embedder" in decoders.error(400, model="pooled", prompt="x")["message"]


@pytest.mark.parametrize(
    "model_type, architecture, kind",
    [
        ("bert", "BertModel", "Embedder"), ("modernbert", "ModernBertForMaskedLM", "Embedder"),
        ("roberta", "RobertaForSequenceClassification", "Reranker"), ("qwen3", "Qwen3ForSequenceClassification", "Reranker"),
        ("distilbert", "DistilBertForQuestionAnswering", "QuestionAnswerer"), ("bart", "BartForConditionalGeneration", "Text2Text"),
        ("bart", "BartForQuestionAnswering", "QuestionAnswerer"), ("llama", "LlamaForCausalLM", "LLM"), ("gpt2", "GPT2LMHeadModel", "LLM"),
    ],
)  # fmt: skip
def test_kinds_of_checkpoints(monkeypatch, tmp_path, model_type, architecture, kind):
    """By the registry's families, all of which a server can open."""
    config = {"model_type": model_type, "architectures": [architecture], "num_labels": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = []
    for name in ("Embedder", "Reranker", "QuestionAnswerer", "Text2Text", "LLM", "TextClassifier"):
        monkeypatch.setattr(foveate, name, lambda *_, name=name, **__: made.append(name))
    loader(tmp_path, {})()
    assert made == [kind]


def test_the_wrong_kind_is_named(encoders):
    assert "Embedder" in encoders.error(400, model="embed", prompt="x")["message"]
    assert "Reranker" in encoders.error(400, "/rerank", model="embed", query="x", documents=["y"])["message"]
    assert "64" in encoders.error(400, "/rerank", model="rank", query="x " * 100, documents=["y"])["message"]


def test_many_at_once(encoders):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(encoders.post, "/v1/embeddings", model="embed", input="ada " * (i % 5 + 1)) for i in range(20)
        ]
        rows = [future.result().json()["data"][0]["embedding"] for future in asked]
    assert all(rows[i] == rows[i % 5] for i in range(20))
