"""The routes to encoders and to encoder-decoders, and the vectors of causal models: embeddings, scores, classes, answers, text to text."""

from __future__ import annotations

import base64
import struct
import time
import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from foveate.serve.bodies import parse_body, takes
from foveate.serve.errors import bad_request, json_response
from foveate.serve.keys import caller
from foveate.serve.protocol import AnswersBody, ClassifyBody, EmbeddingBody, RerankBody, ScoreBody, Text2TextBody
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState


def encoder_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", openapi_extra=takes(EmbeddingBody))
    @routes.post("/v1/engines/{engine:path}/embeddings", include_in_schema=False)
    async def embeddings(request: Request) -> Response:
        body = await parse_body(state, request, EmbeddingBody)
        served = state.open_model(body.model)
        pipeline = served.embedder()
        rows, count = await state.encode(served, _embed, pipeline, _texts(body.input, "input"))
        data = [
            {"object": "embedding", "index": i, "embedding": row if body.encoding_format == "float" else _base64(row)}
            for i, row in enumerate(rows)
        ]
        _charge(state, count)
        return json_response({"object": "list", "data": data, "model": served.name, "usage": _usage(count)})

    @routes.post("/v1/rerank", openapi_extra=takes(RerankBody))
    @routes.post("/rerank", include_in_schema=False)
    @routes.post("/v2/rerank", include_in_schema=False)
    async def rerank(request: Request) -> Response:
        body = await parse_body(state, request, RerankBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "rankings", "Reranker")
        found, count = await state.encode(served, _rerank, pipeline, body)
        _charge(state, count)
        results = [
            {"index": row["index"], "relevance_score": row["score"]}
            | ({"document": {"text": row["text"]}} if body.return_documents else {})
            for row in found
        ]
        number = f"rerank-{uuid.uuid4().hex}"
        return json_response({"id": number, "model": served.name, "results": results, "usage": _usage(count)})

    @routes.post("/v1/score", openapi_extra=takes(ScoreBody))
    @routes.post("/score", include_in_schema=False)
    async def score(request: Request) -> Response:
        """How alike two texts are: a cross-encoder's score, or the cosine of an embedder's vectors."""
        body = await parse_body(state, request, ScoreBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "scores", "Reranker", "Embedder")
        firsts, seconds = _paired(body)
        scores, count = await state.encode(served, _score, pipeline, firsts, seconds)
        data = [{"index": i, "object": "score", "score": value} for i, value in enumerate(scores)]
        _charge(state, count)
        return json_response(_listed("score", served, data, count))

    @routes.post("/v1/classify", openapi_extra=takes(ClassifyBody))
    @routes.post("/classify", include_in_schema=False)
    async def classify(request: Request) -> Response:
        body = await parse_body(state, request, ClassifyBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "classes", "TextClassifier")
        rows, count = await state.encode(served, _classify, pipeline, _texts(body.input, "input"))
        labels = pipeline.labels
        data = [
            {
                "index": i,
                "label": labels[max(range(len(row)), key=row.__getitem__)],
                "probs": row,
                "num_classes": len(row),
            }
            for i, row in enumerate(rows)
        ]
        _charge(state, count)
        return json_response(_listed("classify", served, data, count))

    @routes.post("/v1/answers", openapi_extra=takes(AnswersBody))
    async def answers(request: Request) -> Response:
        body = await parse_body(state, request, AnswersBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "answers", "QuestionAnswerer")
        found, count = await state.encode(served, _answer, pipeline, body)
        _charge(state, count)
        return json_response({"object": "list", "data": found, "model": served.name, "usage": _usage(count)})

    @routes.post("/v1/text2text", openapi_extra=takes(Text2TextBody))
    async def text2text(request: Request) -> Response:
        body = await parse_body(state, request, Text2TextBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "text to text", "Text2Text")
        texts = _texts(body.input, "input")
        options = body.model_dump(exclude={"model", "input"}, exclude_none=True)
        outputs, read, written = await state.encode(served, _write, pipeline, texts, options)
        data = [{"index": i, "texts": found} for i, found in enumerate(outputs)]
        _charge(state, read, written)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return json_response({"object": "list", "data": data, "model": served.name, "usage": usage})

    return routes


def _pipeline(served: ServedModel, what: str, *kinds: str) -> Any:
    holds = type(served.pipeline or served.llm).__name__
    if holds not in kinds:
        raise bad_request(
            f"{served.name} gives no {what}: it is of the kind {holds}, and they come from the kind {' or '.join(kinds)}",
            "model",
        )
    return served.pipeline


def _texts(given: str | list[str], name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not texts:
        raise bad_request(f"{name} is empty; give a text, or a list of texts", name)
    return texts


def _paired(body: ScoreBody) -> tuple[list[str], list[str]]:
    firsts, seconds = _texts(body.text_1, "text_1"), _texts(body.text_2, "text_2")
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise bad_request(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}; give one text_1 for all, or as many of both",
            "text_1",
        )
    return firsts, seconds


def _charge(state: ServerState, read: int, written: int = 0) -> None:
    """To the caller's key, whose next minutes pay what is beyond its limit."""
    key = caller.get()
    if key is not None:
        key.settle(0, read + written)
        state.metrics.charge(key.name, read, written)


def _usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": count, "total_tokens": count}


def _listed(kind: str, served: ServedModel, data: list[Any], count: int) -> dict[str, Any]:
    return {
        "id": f"{kind}-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": served.name, "data": data,
        "usage": _usage(count),
    }  # fmt: skip


def _count(pipeline: Any, texts: list[str]) -> int:
    tokenizer = getattr(pipeline, "tokenizer", None)
    return sum(len(tokenizer.encode(text)) for text in texts) if tokenizer is not None else 0


def _embed(pipeline: Any, texts: list[str]) -> tuple[list[list[float]], int]:
    return pipeline.encode(texts).float().tolist(), _count(pipeline, texts)


def _rerank(pipeline: Any, body: RerankBody) -> tuple[list[dict[str, Any]], int]:
    return pipeline(body.query, body.documents, top_k=body.top_n), _count(pipeline, [body.query, *body.documents])


def _score(pipeline: Any, firsts: list[str], seconds: list[str]) -> tuple[list[float], int]:
    count = _count(pipeline, [*firsts, *seconds])
    if type(pipeline).__name__ == "Reranker":
        return pipeline.scores(list(zip(firsts, seconds))), count
    rows = pipeline.encode([*firsts, *seconds]).float()
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return (rows[: len(firsts)] * rows[len(firsts) :]).sum(-1).tolist(), count


def _classify(pipeline: Any, texts: list[str]) -> tuple[list[list[float]], int]:
    return pipeline.scores(pipeline.logits(texts)).tolist(), _count(pipeline, texts)


def _answer(pipeline: Any, body: AnswersBody) -> tuple[list[dict[str, Any]], int]:
    options = body.model_dump(exclude={"model", "question", "context"})
    found = pipeline(body.question, body.context, **options)
    return [found] if isinstance(found, dict) else found, _count(pipeline, [body.question, body.context])


def _write(pipeline: Any, texts: list[str], options: dict[str, Any]) -> tuple[list[list[str]], int, int]:
    found = pipeline(texts, **options)
    outputs = [[one] if isinstance(one, str) else list(one) for one in found]
    return outputs, _count(pipeline, texts), sum(_count(pipeline, row) for row in outputs)


def _base64(row: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
