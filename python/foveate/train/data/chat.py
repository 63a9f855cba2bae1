"""What of a row is text, and which of its characters are to be predicted: chats through the checkpoint's template, prompts, plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from foveate.files.data_files import CONTINUES
from foveate.tokenizer import Tokenizer
from foveate.train.data import examples
from foveate.train.data.chat_template import Spans, conversations, render
from foveate.train.data.formats import read_row

__all__ = ["Sample", "render", "samples", "tokens_of"]


class Sample(NamedTuple):
    """spans: the characters to be predicted, None for all. rendered: by a template, which writes special tokens itself.

    ended: the end token follows, to be predicted.
    """

    text: str
    spans: Spans | None
    rendered: bool
    ended: bool


def samples(row: dict[str, Any], field: str | None, tokenizer: Tokenizer) -> list[Sample]:
    """What a row teaches. `field`, if it is given and the row has it, wins over "messages", and these over "prompt" and "completion";
    without any of them the text is in "text". A column of None, as tables of mixed rows have them, counts as absent."""
    row = read_row(row, text_field=field, template=tokenizer.chat_template is not None)
    row = {name: value for name, value in row.items() if value is not None}
    if field is None or field not in row:
        if "messages" in row:
            tools = {"tools": row["tools"]} if row.get("tools") else {}
            found = conversations(row["messages"], tokenizer, **tools)
            return [Sample(text, spans, True, ended) for text, spans, ended in found]
        if "completion" in row or ("prompt" in row and (field or "text") not in row):
            prompt, completion = (examples.text_of(row, name, "") for name in ("prompt", "completion"))
            return [Sample(prompt + completion, [(len(prompt), len(prompt) + len(completion))], False, True)]
    return [Sample(examples.text_of(row, field or "text"), None, False, CONTINUES not in row)]


def has_more(row: dict[str, Any], field: str) -> bool:
    """Whether a row with a text in `field` has a chat or a completion too, which `samples` passes over."""
    return row.get(field) is not None and any(row.get(name) is not None for name in ("messages", "completion"))


def tokens_of(
    sample: Sample, encoding: Any, backend: Any, end_id: int | None
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Ids, and for each whether it is to be predicted: every token with a character in a span.

    encoding: of the whole text. Where one of its tokens has characters of a prompt and of its reply, they are encoded apart, as they are
    when the model answers: there the prompt comes alone. If that would spell another text (a tokenizer that begins each text with a
    space), the token counts as the reply's.
    """
    tokens, target = list(encoding.ids), _flags(encoding.offsets, sample.spans)
    borders = [start for start, _ in sample.spans or () if _crossed(sample.text, start, encoding.offsets)]
    if borders:
        ids, flags = _apart(sample, backend, borders)
        if backend.decode(ids, skip_special_tokens=False) == backend.decode(tokens, skip_special_tokens=False):
            tokens, target = ids, flags
    if sample.ended and end_id is not None:
        if tokens[-1:] != [end_id]:
            tokens, target = [*tokens, end_id], [*target, 0]
        target[-1] = 1
    return tokens, target


def _crossed(text: str, border: int, offsets: Sequence[tuple[int, int]]) -> bool:
    """Whether a token has characters on both sides, also where the tokenizer leaves white space out of its offsets."""
    if any(a < border < b for a, b in offsets):
        return True
    if not text[:border][-1:].isspace():
        return False
    return not any(a < border <= b or a == b == border for a, b in offsets)


def _apart(sample: Sample, backend: Any, borders: list[int]) -> tuple[list[int], list[int]]:
    """The parts of the text between `borders`, each encoded by itself."""
    ids: list[int] = []
    flags: list[int] = []
    for first, last in zip([0, *borders], [*borders, len(sample.text)]):
        part = backend.encode(sample.text[first:last], add_special_tokens=not (sample.rendered or first))
        ids += part.ids
        flags += _flags([(a + first, b + first) for a, b in part.offsets], sample.spans)
    return ids, flags


def _flags(offsets: Sequence[tuple[int, int]], spans: Spans | None) -> list[int]:
    """For each token, whether it has a character in a span. White space that a tokenizer leaves out of its offsets lies before them."""
    if spans is None:
        return [1] * len(offsets)
    flags = []
    at = 0
    for start, end in offsets:
        if start == end:
            start -= 1
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        flags.append(int(at < len(spans) and end > spans[at][0]))
    return flags
