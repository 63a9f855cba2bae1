"""The routes that clients use: OpenAI's, and vLLM's for tokens."""

from __future__ import annotations

import base64
import struct
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

from foveate.serve.chat import chat, plain_messages, template_options
from foveate.serve.completions import complete
from foveate.serve.errors import bad_request, json_response
from foveate.serve.protocol import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    RerankBody,
    TokenizeBody,
)
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState

_T = TypeVar("_T", bound=Body)
_LARGE = 100_000  # bytes of a body that are parsed in a thread


def _takes(kind: type[Body]) -> dict[str, Any]:
    """For the OpenAPI description: what the body is; `body_schemas` has the rest."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def body_schemas() -> dict[str, Any]:
    """The components that the descriptions of bodies refer to."""
    kinds = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, EmbeddingBody, RerankBody)
    _, found = models_json_schema([(kind, "validation") for kind in kinds], ref_template="#/components/schemas/{model}")
    return found["$defs"]


def api_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    async def parsed(request: Request, kind: type[_T]) -> _T:
        body: bytes = request.scope["foveate_body"]
        return await state.prepare(kind.parse, body, heavy=len(body) > _LARGE)

    def described(served: ServedModel) -> dict[str, Any]:
        longest = getattr(served.llm, "max_model_len", None)
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "foveate",
            "max_model_len": longest,
        }

    @routes.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [described(served) for served in state.models.values()]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(described(state.model(name)))

    @routes.post("/v1/completions", openapi_extra=_takes(CompletionBody))
    async def completions(request: Request) -> Any:
        return await complete(state, await parsed(request, CompletionBody))

    @routes.post("/v1/chat/completions", openapi_extra=_takes(ChatBody))
    async def chat_completions(request: Request) -> Any:
        return await chat(state, await parsed(request, ChatBody))

    @routes.post("/tokenize", openapi_extra=_takes(TokenizeBody))
    @routes.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        body = await parsed(request, TokenizeBody)
        llm = _with_tokenizer(state.model(body.model))
        ids = await state.prepare(_tokenize, llm, body)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": llm.max_model_len, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [llm.tokenizer.backend.id_to_token(token) for token in ids]
        return json_response(found)

    @routes.post("/detokenize", openapi_extra=_takes(DetokenizeBody))
    @routes.post("/v1/detokenize", include_in_schema=False)
    async def detokenize(request: Request) -> Response:
        body = await parsed(request, DetokenizeBody)
        llm = _with_tokenizer(state.model(body.model))
        vocabulary = llm.tokenizer.vocab_size
        wrong = next((token for token in body.tokens if not 0 <= token < vocabulary), None)
        if wrong is not None:
            raise bad_request(
                f"the token id {wrong} is not among this model's, which go from 0 to {vocabulary - 1}", "tokens"
            )
        text = await state.prepare(llm.tokenizer.decode, body.tokens, False)
        return json_response({"prompt": text})

    @routes.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> Response:
        tokenizer = _with_tokenizer(state.model(model)).tokenizer
        special = {key: tokenizer.special.get(key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return json_response({**special, "vocab_size": tokenizer.vocab_size, "chat_template": tokenizer.chat_template})

    @routes.post("/v1/embeddings", openapi_extra=_takes(EmbeddingBody))
    async def embeddings(request: Request) -> Response:
        body = await parsed(request, EmbeddingBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "encode", "embeddings")
        texts = [body.input] if isinstance(body.input, str) else body.input
        if not texts:
            raise bad_request("input is empty; give a text, or a list of texts", "input")
        rows, count = await state.encode(served, _embed, pipeline, texts)
        data = [
            {"object": "embedding", "index": i, "embedding": row if body.encoding_format == "float" else _base64(row)}
            for i, row in enumerate(rows)
        ]
        used = {"prompt_tokens": count, "total_tokens": count}
        return json_response({"object": "list", "data": data, "model": served.name, "usage": used})

    @routes.post("/v1/rerank", openapi_extra=_takes(RerankBody))
    @routes.post("/rerank", include_in_schema=False)
    async def rerank(request: Request) -> Response:
        body = await parsed(request, RerankBody)
        served = state.open_model(body.model)
        pipeline = _pipeline(served, "__call__", "rerank")
        found = await state.encode(served, _rerank, pipeline, body)
        results = [
            {"index": row["index"], "relevance_score": row["score"]}
            | ({"document": {"text": row["text"]}} if body.return_documents else {})
            for row in found
        ]
        return json_response({"model": served.name, "results": results})

    return routes


def _with_tokenizer(served: ServedModel) -> Any:
    llm, _ = served.causal()
    if llm.tokenizer is None:
        raise bad_request(f"{served.name} has no tokenizer", "model")
    return llm


def _tokenize(llm: Any, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give prompt or messages, one of them", "prompt")
    if body.prompt is not None:
        return llm.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    assert body.messages is not None
    if body.add_special_tokens is not None:
        raise bad_request(
            "add_special_tokens is for a prompt; the chat template writes them for messages", "add_special_tokens"
        )
    return llm.encode_chat(plain_messages(body.messages), **template_options(body, body.tools))


def _pipeline(served: ServedModel, method: str, what: str) -> Any:
    kind = {"encode": "Embedder", "__call__": "Reranker"}[method]
    if type(served.pipeline).__name__ != kind:
        holds = type(served.pipeline or served.llm).__name__
        raise bad_request(f"{served.name} gives no {what}: it is a {holds}, and they come from a {kind}", "model")
    return served.pipeline


def _embed(pipeline: Any, texts: list[str]) -> tuple[list[list[float]], int]:
    count = sum(len(pipeline.tokenizer.encode(text)) for text in texts)
    return pipeline.encode(texts).float().tolist(), count


def _rerank(pipeline: Any, body: RerankBody) -> list[dict[str, Any]]:
    return pipeline(body.query, body.documents, top_k=body.top_n)


def _base64(row: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
