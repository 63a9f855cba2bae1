"""/v1/embeddings and /v1/rerank, by the pipelines of the checkpoints, which the server finds by itself."""

from __future__ import annotations

import base64
import concurrent.futures
import struct

import pytest

import foveate
import serve_toys
from foveate.serve.served import loader

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from pipeline_toys import save_encoder as save

    made = {name: tmp_path_factory.mktemp(name) for name in ("embed", "rank")}
    save(made["embed"], "BertModel")
    save(made["rank"], "BertForSequenceClassification", num_labels=1)
    return made


@pytest.fixture(scope="module")
def encoders(folders):
    with serve_toys.serving(
        {name: loader(path, {"progress": False, "num_pages": 64}) for name, path in folders.items()}
    ) as running:
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


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank"])
def test_rerank(encoders, folders, path):
    documents = ["paris", "rome in ada", "x"]
    expected = foveate.Reranker(folders["rank"])("ada", documents)
    found = encoders.post(path, model="rank", query="ada", documents=documents).json()["results"]
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
