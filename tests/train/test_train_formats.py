"""Rows of instructions in the formats of common data sets."""

from __future__ import annotations

import pytest

from foveate.train.data.formats import read_row

USER, REPLY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = {"messages": [USER, REPLY]}


def chat(row):
    return read_row(row, text_field=None, template=True)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a", "input": "", "output": "b"},
        {"instruction": "a", "input": None, "output": "b", "completion": None},
        {"instruction": "a", "context": "", "response": "b"},
        {"prompt": "a", "response": "b"},
        {"question": "a", "answer": "b"},
        {"input": "a", "output": "b"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"conversations": [USER, REPLY]},
        {"prompt": [USER], "completion": [REPLY]},
        {"prompt": "a", "completion": [REPLY]},
        {"prompt": [USER], "response": "b"},
    ],
)
def test_formats_of_one_exchange(row):
    assert chat(row) == CHAT


def test_more_of_a_conversation():
    system = {"role": "system", "content": "s"}
    told = {"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]], "system": "s", "tools": [1]}
    assert chat(told) == {
        "tools": [1],
        "messages": [system, USER, REPLY, {"role": "user", "content": "c\n\nd"}, {"role": "assistant", "content": "e"}],
    }
    shared = [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "observation", "value": "t"}]
    assert chat({"conversations": shared})["messages"] == [system, USER, {"role": "tool", "content": "t"}]
    # what the assistant said in the prompt is not learnt
    assert chat({"prompt": [USER, REPLY, USER], "completion": [REPLY]}) == {
        "messages": [USER, REPLY | {"weight": 0}, USER, REPLY]
    }


def test_without_a_template_a_pair_is_prompt_and_completion():
    row = {"instruction": "a", "input": "x", "output": "b"}
    assert read_row(row, text_field=None, template=False) == {"prompt": "a\n\nx\n", "completion": "b"}
    with pytest.raises(ValueError, match="'system' and 'history' need a chat template"):
        read_row(row | {"system": "s"}, text_field=None, template=False)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a"},
        {"text": "whole", "instruction": "a", "output": "b"},
        {"prompt": "a", "completion": "b"},
        {"messages": [USER, REPLY], "prompt": "x"},
        {"body": "a"},
    ],
)
def test_rows_that_are_known_stay(row):
    assert chat(row) is row
    assert read_row({"own": "a", "question": "a", "answer": "b"}, text_field="own", template=True)["own"] == "a"


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "'chosen' and 'rejected' are preferences"),
        (
            {"conversations": [{"from": "narrator", "value": "a"}]},
            "a message is from 'narrator', which is none of human",
        ),
        ({"prompt": [USER]}, "there is no 'completion'"),
        ({"prompt": [USER], "completion": [3]}, "must be texts or lists of messages"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' must be a list of"),
    ],
)
def test_what_is_refused(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        chat(row)
