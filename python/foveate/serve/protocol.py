"""The bodies of requests: OpenAI's fields and vLLM's extra ones. A field that is not here is refused, none is ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from foveate.serve.errors import invalid_fields

# What OpenAI's API has and this server does not do, with the values that ask for nothing and are taken.
_NOTHING_ASKED: dict[str, tuple[Any, ...]] = {
    "store": (False,), "service_tier": ("auto", "default"), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (), "safety_identifier": (), "prompt_cache_key": (),
    "function_call": ("none",), "functions": ([],), "use_beam_search": (False,), "best_of": (1,),
    "echo": (False,), "num_beams": (1,),
}  # fmt: skip
_T = TypeVar("_T", bound="Body")
# A million wrong elements are one error, not a million.
Texts = Annotated[list[str], Field(fail_fast=True)]
Ids = Annotated[list[int], Field(fail_fast=True)]


class Body(BaseModel):
    """Numbers are no strings, whole numbers no fractions, and null means that a field is left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        return {
            name: given
            for name, given in value.items()
            if given is not None
            and not (name not in known and name in _NOTHING_ASKED and given in _NOTHING_ASKED[name])
        }

    @classmethod
    def parse(cls: type[_T], body: bytes) -> _T:
        """ApiError 400, with the field and why, for what cannot be taken."""
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise invalid_fields(error, list(cls.model_fields)) from None


class StreamOptions(Body):
    include_usage: bool = False


class StructuredOutputs(Body):
    """vLLM's: one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class InspectAttention(Body):
    """None: all of them."""

    layers: list[int] | None = None
    heads: list[int] | None = None


class InspectLens(Body):
    top: int = Field(3, ge=1, le=20)


class InspectBody(Body):
    """foveate's: what of the model's inside comes with the answer. rows: tokens of prompt and reply, -1 the last."""

    rows: list[int] = Field([-1], min_length=1)
    attention: InspectAttention | None = None
    logit_lens: InspectLens | None = None


class Sampling(Body):
    """What completions and chat completions share."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, ge=-1000, le=1000)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    # foveate's
    prompt_lookup: int | None = None
    inspect: InspectBody | None = None


class CompletionBody(Sampling):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(fail_fast=True)]
    logprobs: int | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool = True


class TextPart(Body):
    type: Literal["text"]
    text: str


class FunctionCall(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """What a role may be is the template's affair."""

    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def plain(self) -> dict[str, Any]:
        """As chat templates read it: the content is one text."""
        found = self.model_dump(exclude_none=True)
        if isinstance(self.content, list):
            found["content"] = "\n".join(part.text for part in self.content)
        return found


class Function(Body):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class ChatBody(Sampling):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = Field(None, min_length=1)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class TokenizeBody(Body):
    """vLLM's: a prompt, or messages for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool = False


class DetokenizeBody(Body):
    model: str | None = None
    tokens: Ids


class EmbeddingBody(Body):
    model: str | None = None
    input: str | Texts
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _no_ids(cls, value: Any) -> Any:
        """Clients make them with a tokenizer of OpenAI's, and an embedding of the wrong words would look like any other."""
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            raise ValueError(
                "input has token ids, and nothing says that they are of this model's tokenizer; send texts "
                "(LangChain does with check_embedding_ctx_length=False)"
            )
        return value


class ScoreBody(Body):
    """vLLM's: one text against one or several, or as many as there are, each against its own."""

    model: str | None = None
    text_1: str | Texts
    text_2: str | Texts


class ClassifyBody(Body):
    """vLLM's."""

    model: str | None = None
    input: str | Texts


class AnswersBody(Body):
    """foveate's: the parts of a text that answer a question; see foveate.QuestionAnswerer."""

    model: str | None = None
    question: str
    context: str
    top_k: int = Field(1, ge=1, le=100)
    max_answer_len: int = Field(15, ge=1)
    max_seq_len: int | None = None
    doc_stride: int | None = None
    max_question_len: int = Field(64, ge=1)
    handle_impossible_answer: bool = False
    align_to_words: bool = True


class Text2TextBody(Body):
    """foveate's: what an encoder-decoder writes for each text; see foveate.Text2TextParams."""

    model: str | None = None
    input: str | Texts
    max_new_tokens: int | None = Field(None, le=4096)
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    num_beams: int | None = Field(None, le=32)
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    num_return_sequences: int | None = Field(None, le=32)
    repetition_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    bad_words: list[str] | None = None
    source_language: str | None = None
    target_language: str | None = None
    stop: str | list[str] | None = None


class ExtraFile(Body):
    """A file of the same project that an infill may look at."""

    filename: str
    text: str


class InfillBody(Body):
    """llama.cpp's: the text between a prefix and a suffix."""

    model: str | None = None
    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraFile] | None = None
    prompt: str = ""  # the beginning of what is between them
    n_predict: int | None = None
    stream: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repetition_penalty: float | None = None
    cache_prompt: Literal[True] = True


class RerankBody(Body):
    """Jina's and Cohere's."""

    model: str | None = None
    query: str
    documents: Texts = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
