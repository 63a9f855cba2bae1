"""Rows of preferences as people have them: two answers to a prompt, one answer with a verdict, and prompts alone."""

from __future__ import annotations

from typing import Any

from foveate.tokenizer import Tokenizer
from foveate.train.data import chat
from foveate.train.data.chat import Sample
from foveate.train.data.chat_template import checked
from foveate.train.data.formats import read_row

# Names of a text that asks. With a chat template it is a user's message, but for "prompt", which is a text as it is.
_ASKS = ("question", "instruction", "query", "input")
_PAIR = (
    '; rows are {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} with the prompt at the beginning of both'
)
_YES, _NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0", "-1", "-1.0")


def pair(row: dict[str, Any], tokenizer: Tokenizer) -> tuple[Sample, Sample]:
    """The chosen and the rejected answer, each with its prompt before it. Texts, lists of messages, or a prompt of one kind and answers of
    the other. Without a prompt it is what both answers begin with: messages, or characters.

    ValueError for what is no pair.
    """
    row = {name: value for name, value in row.items() if value is not None}
    answers = []
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"there is no {name!r}; the fields are {', '.join(map(repr, row)) or 'none'}{_PAIR}")
        if not isinstance(row[name], (str, list)):
            raise ValueError(
                f"{name!r} is {row[name]!r:.60}, of type {type(row[name]).__name__}; it must be a text or a list of messages"
            )
        answers.append(row[name])
    prompt = _prompt(row, tokenizer)
    if prompt is None:
        if type(answers[0]) is not type(answers[1]):
            raise ValueError(
                "'chosen' and 'rejected' are a text and a list of messages; without a 'prompt' both must be of one kind"
            )
        prompt, answers = _implicit(*answers)
    first, second = (_sample(row, prompt, answer, tokenizer) for answer in answers)
    return first, second


def judged(row: dict[str, Any], tokenizer: Tokenizer) -> list[tuple[Sample, bool]]:
    """{"prompt", "completion", "label"} as one answer and whether it is good; a pair as two. ValueError for what is neither."""
    given = {name: value for name, value in row.items() if value is not None}
    if "chosen" in given and "rejected" in given:
        return list(zip(pair(given, tokenizer), (True, False)))
    if "label" not in given:
        raise ValueError(
            f"there is no 'label'; the fields are {', '.join(map(repr, given)) or 'none'}; rows are "
            '{"prompt", "completion", "label"} with a label of true or false, or {"prompt", "chosen", "rejected"}'
        )
    good = verdict(given["label"])
    if "messages" in given:
        return [(_one(chat.samples({"messages": given["messages"]}, None, tokenizer)), good)]
    prompt = _prompt(given, tokenizer)
    if prompt is None:
        raise ValueError(f"there is no 'prompt'; the fields are {', '.join(map(repr, given))}")
    if not isinstance(given.get("completion"), (str, list)):
        raise ValueError(f"'completion' is {given.get('completion')!r:.60}; it must be a text or a list of messages")
    return [(_sample(given, prompt, given["completion"], tokenizer), good)]


def verdict(value: Any) -> bool:
    """A label of a row: true or false, 1 or 0, or one of these as a text. ValueError for anything else."""
    text = str(value).strip().lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise ValueError(
        f"the label is {value!r:.40}; it must be true or false (or 1 or 0): whether the completion is a good one"
    )


def prompt_tokens(row: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """What a model is given to answer: "prompt" as a text or messages, or "messages" up to the last user's."""
    row = {name: value for name, value in row.items() if value is not None}
    prompt = row["messages"] if isinstance(row.get("messages"), list) else _prompt(row, tokenizer)
    if prompt is None:
        raise ValueError(f"there is no 'prompt'; the fields are {', '.join(map(repr, row)) or 'none'}")
    if isinstance(prompt, str):
        return tokenizer.backend.encode(prompt).ids
    messages = list(prompt)
    while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
        messages.pop()  # a data set of whole chats, whose last answer the model writes anew
    if not messages:
        raise ValueError("the prompt has no message of a user")
    rest = {"tools": row["tools"]} if row.get("tools") else {}
    text = tokenizer.apply_chat_template(checked(messages), add_generation_prompt=True, **rest)
    return tokenizer.backend.encode(text, add_special_tokens=False).ids


def _prompt(row: dict[str, Any], tokenizer: Tokenizer) -> Any:
    """A text or messages; None where there is none."""
    prompt = row.get("prompt")
    system = (
        [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []
    )
    if prompt is not None:
        if not isinstance(prompt, (str, list)):
            raise ValueError(f"'prompt' is {prompt!r:.60}; it must be a text or a list of messages")
        if not system:
            return prompt
        return [*system, *(prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}])]
    ask = next((name for name in _ASKS if isinstance(row.get(name), str)), None)
    if ask is None:
        return None
    if tokenizer.chat_template is None:
        if system:
            raise ValueError("'system' needs a chat template, which this model does not have")
        return f"{row[ask]}\n"
    return [*system, {"role": "user", "content": row[ask]}]


def _implicit(chosen: Any, rejected: Any) -> tuple[Any, list[Any]]:
    """What both begin with, and what is left of each."""
    if isinstance(chosen, str):
        shorter = min(len(chosen), len(rejected))
        end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
        if end and end < shorter and chosen[end - 1] == " ":
            end -= 1  # a space belongs to the word after it
        return chosen[:end], [chosen[end:], rejected[end:]]
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    if end and end == min(len(chosen), len(rejected)):
        end -= 1  # the same answer twice
    if not end:
        raise ValueError(
            "'chosen' and 'rejected' begin with different messages, so they answer no common prompt; give a 'prompt'"
        )
    return chosen[:end], [chosen[end:], rejected[end:]]


def _sample(row: dict[str, Any], prompt: Any, answer: Any, tokenizer: Tokenizer) -> Sample:
    if isinstance(prompt, str) and isinstance(answer, str):
        return Sample(prompt + answer, [(len(prompt), len(prompt) + len(answer))], False, True)
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    messages = read_row({"prompt": prompt, "completion": answer, **tools}, text_field=None, template=True)
    return _one(chat.samples(messages, None, tokenizer))


def _one(found: list[Sample]) -> Sample:
    if len(found) != 1:
        raise ValueError(
            f"an answer must be one reply of the assistant, and the chat template makes {len(found)} texts of it; give the earlier "
            "replies in the prompt"
        )
    if not found[0].spans:
        raise ValueError("the answer has no message of the assistant")
    return found[0]
