"""From the fields of a request to SamplingParams."""

from __future__ import annotations

import json
from typing import Any

from foveate.generation.params import SamplingParams
from foveate.serve.errors import ApiError, bad_request, refused
from foveate.serve.keys import caller
from foveate.serve.protocol import ChatBody, CompletionBody, Sampling

# Fields that SamplingParams has under the same name and with the same meaning.
_SAME = (
    "temperature", "top_p", "n", "stop", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "stop_token_ids", "ignore_eos", "bad_words", "include_stop_str_in_output", "skip_special_tokens", "prompt_logprobs",
    "prompt_lookup", "best_of",
)  # fmt: skip
_DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
_MOST_STOPS = 32
_MOST_GRAMMAR_CHARACTERS = 65536


def completion_params(body: CompletionBody, defaults: SamplingParams, max_logprobs: int) -> SamplingParams:
    """max_tokens=0, which asks for the prompt's log-probabilities alone, draws one token that the answer leaves out."""
    given = _given(body)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens=0 asks for no text; it makes sense with echo=true only", "max_tokens")
    given["max_tokens"] = _DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens or 1
    if body.logprobs is not None:
        given["logprobs"] = _within(body.logprobs, "logprobs", max_logprobs)
        if body.echo and body.prompt_logprobs is None:
            given["prompt_logprobs"] = body.logprobs
    return _made(body, defaults, given, max_logprobs)


def chat_params(body: ChatBody, defaults: SamplingParams, max_logprobs: int) -> SamplingParams:
    given = _given(body)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise bad_request(
            f"max_tokens={body.max_tokens} and max_completion_tokens={body.max_completion_tokens} differ; give one of them",
            "max_tokens",
        )
    # None: to the end of the context
    given["max_tokens"] = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request(f"top_logprobs={body.top_logprobs} needs logprobs=true", "top_logprobs")
    if body.logprobs:
        given["logprobs"] = _within(body.top_logprobs or 0, "top_logprobs", max_logprobs)
    return _made(body, defaults, given, max_logprobs)


def priority_of(given: int | None) -> int:
    """Lower first. ApiError 400 for one before that of the caller's key."""
    key = caller.get()
    own = 0 if key is None else key.priority
    if given is not None and key is not None and given < own:
        raise bad_request(f"priority={given} is before this key's, which is {own}; give {own} or more", "priority")
    return own if given is None else given


def _given(body: Sampling) -> dict[str, Any]:
    return {name: value for name in _SAME if (value := getattr(body, name, None)) is not None}


def _made(body: Sampling, defaults: SamplingParams, given: dict[str, Any], max_logprobs: int) -> SamplingParams:
    if body.prompt_logprobs is not None:
        _within(body.prompt_logprobs, "prompt_logprobs", max_logprobs)
        if body.stream:
            raise bad_request(
                "prompt_logprobs cannot be streamed; leave stream or prompt_logprobs out", "prompt_logprobs"
            )
    if isinstance(body.stop, list) and len(body.stop) > _MOST_STOPS:
        raise bad_request(f"stop has {len(body.stop)} strings; at most {_MOST_STOPS} are taken", "stop")
    if body.stop == []:
        del given["stop"]
    if body.stream and given.get("best_of", 0) > given.get("n", 1):
        raise bad_request(f"best_of={given['best_of']} cannot be streamed: the best are known at the end", "best_of")
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream=true", "stream_options")
    if body.logit_bias:
        given["logit_bias"] = _bias(body.logit_bias)
    given |= _grammar(body)
    try:
        return defaults.with_(**given)
    except (ValueError, TypeError) as error:
        raise refused(error) from None


def _within(value: int, name: str, most: int) -> int:
    if not 0 <= value <= most:
        raise bad_request(f"{name}={value} must be from 0 to {most}, the most that this server gives", name)
    return value


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): value for token, value in given.items()}
    except ValueError:
        wrong = next(token for token in given if not token.lstrip("-").isdigit())
        raise bad_request(
            f'logit_bias has the key {wrong[:40]!r}; keys are token ids, such as "42"', "logit_bias"
        ) from None


def _grammar(body: Sampling) -> dict[str, Any]:
    """json_schema or regex, from whichever of the fields asks for it. ApiError when two do."""
    asked: dict[str, dict[str, Any]] = {}
    form = body.response_format
    if form is not None and form.type == "json_object":
        asked["response_format"] = {"json_schema": {"type": "object"}}
    elif form is not None and form.type == "json_schema":
        asked["response_format"] = {"json_schema": _schema_of(form.json_schema)}
    if form is not None and form.type != "json_schema" and form.json_schema is not None:
        raise bad_request(f'response_format has a json_schema, but its type is "{form.type}"', "response_format")
    if body.guided_json is not None:
        asked["guided_json"] = {"json_schema": body.guided_json}
    if body.guided_regex is not None:
        asked["guided_regex"] = {"regex": body.guided_regex}
    if body.guided_choice is not None:
        asked["guided_choice"] = {"regex": _choices(body.guided_choice, "guided_choice")}
    if body.structured_outputs is not None:
        asked |= _structured(body.structured_outputs)
    if len(asked) > 1:
        raise bad_request(f"{' and '.join(asked)} each restrict the output; give one of them", next(iter(asked)))
    for name, found in asked.items():
        [value] = found.values()
        size = len(value if isinstance(value, str) else json.dumps(value))
        if size > _MOST_GRAMMAR_CHARACTERS:
            raise bad_request(f"{name} has {size} characters; at most {_MOST_GRAMMAR_CHARACTERS} are taken", name)
        return found
    return {}


def _schema_of(wrapped: dict[str, Any] | None) -> Any:
    """OpenAI's {"name": ..., "schema": {...}}."""
    found = (wrapped or {}).get("schema")
    if not isinstance(found, dict):
        raise bad_request(
            'response_format of type json_schema needs {"json_schema": {"name": ..., "schema": {...}}}',
            "response_format",
        )
    unknown = sorted(set(wrapped or {}) - {"name", "schema", "strict", "description"})
    if unknown:
        raise bad_request(f"response_format.json_schema has {unknown[0]}, which is not known", "response_format")
    return found


def _structured(asked: Any) -> dict[str, dict[str, Any]]:
    given = {name: value for name in ("json_", "regex", "choice") if (value := getattr(asked, name)) is not None}
    if len(given) != 1:
        raise bad_request("structured_outputs needs exactly one of json, regex and choice", "structured_outputs")
    if "choice" in given:
        return {"structured_outputs": {"regex": _choices(given["choice"], "structured_outputs")}}
    return {"structured_outputs": {"regex": given["regex"]} if "regex" in given else {"json_schema": given["json_"]}}


def _choices(texts: list[str], name: str) -> str:
    if not texts or not all(texts):
        raise bad_request(f"{name} needs at least one text to choose from, none of them empty", name)
    special = set("\\^$.|?*+()[]{}/-")
    return "|".join("".join(f"\\{c}" if c in special else c for c in text) for text in texts)


def check_finished(reason: str | None, why: Any) -> None:
    """ApiError for a sample that ended because its tokens could not be chosen: the client's rules forbid all, or the model is broken."""
    if reason != "abort":
        return
    sentence = str(why or "the request was aborted")
    if sentence.startswith(("no token is allowed", "the grammar")):
        raise bad_request(sentence)
    raise ApiError(500, sentence, code="engine_error")
