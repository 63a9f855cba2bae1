"""The routes to causal models: OpenAI's, llama.cpp's /infill, and vLLM's for tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from foveate.serve.bodies import T, parse_body, takes
from foveate.serve.chat import chat, plain_messages, template_options
from foveate.serve.completions import complete
from foveate.serve.errors import bad_request, json_response
from foveate.serve.infill import infill
from foveate.serve.keys import may_use
from foveate.serve.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    InfillBody,
    TokenizeBody,
)
from foveate.serve.responses import respond
from foveate.serve.responses_protocol import ResponsesBody
from foveate.serve.served import ServedModel
from foveate.serve.state import ServerState


def api_routes(state: ServerState) -> APIRouter:
    routes = APIRouter()

    async def parsed(request: Request, kind: type[T]) -> T:
        return await parse_body(state, request, kind)

    def described(served: ServedModel) -> dict[str, Any]:
        longest = getattr(served.llm, "max_model_len", None)
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "foveate",
            "max_model_len": longest,
            "parent": served.base.name if served.adapter else None,
        }

    @routes.get("/v1/models")
    async def models() -> Response:
        return json_response(
            {"object": "list", "data": [described(served) for served in state.models.values() if may_use(served.name)]}
        )

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(described(state.model(name)))

    @routes.post("/v1/chat/completions", openapi_extra=takes(ChatBody))
    @routes.post("/v1/engines/{engine:path}/chat/completions", include_in_schema=False)
    async def chat_completions(request: Request) -> Any:
        return await chat(state, await parsed(request, ChatBody))

    @routes.post("/v1/completions", openapi_extra=takes(CompletionBody))
    @routes.post("/v1/engines/{engine:path}/completions", include_in_schema=False)  # after the chat's, which ends alike
    async def completions(request: Request) -> Any:
        return await complete(state, await parsed(request, CompletionBody))

    @routes.post("/v1/responses", openapi_extra=takes(ResponsesBody))
    async def responses(request: Request) -> Any:
        return await respond(state, await parsed(request, ResponsesBody))

    @routes.post("/infill", openapi_extra=takes(InfillBody))
    async def fill_in(request: Request) -> Any:
        return await infill(state, await parsed(request, InfillBody))

    @routes.post("/tokenize", openapi_extra=takes(TokenizeBody))
    @routes.post("/v1/tokenize", include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        body = await parsed(request, TokenizeBody)
        llm = _with_tokenizer(state.model(body.model))
        ids = await state.prepare(_tokenize, llm, body)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": llm.max_model_len, "tokens": ids}
        if body.return_token_strs:
            found["token_strs"] = [llm.tokenizer.backend.id_to_token(token) for token in ids]
        return json_response(found)

    @routes.post("/detokenize", openapi_extra=takes(DetokenizeBody))
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

    return routes


def _with_tokenizer(served: ServedModel) -> Any:
    llm, _ = served.causal()
    if llm.tokenizer is None:
        raise bad_request(f"{served.name} has no tokenizer", "model")
    return llm


def _tokenize(llm: Any, body: TokenizeBody) -> list[int]:
    if body.prompt is not None and body.messages is None:
        return llm.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    if body.messages is None or body.prompt is not None:
        raise bad_request("give prompt or messages, one of them", "prompt")
    if body.add_special_tokens is not None:
        raise bad_request(
            "add_special_tokens is for a prompt; the chat template writes them for messages", "add_special_tokens"
        )
    return llm.encode_chat(plain_messages(body.messages), **template_options(body, body.tools))
