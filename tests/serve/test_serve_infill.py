"""`suffix` and /infill: the prompt is what a model of code was trained on, for each family of tokens; other models refuse exactly."""

from __future__ import annotations

import json
import shutil

import pytest

import serve_toys
from foveate import SamplingParams
from foveate.serve.infill import FillInTheMiddle

QWEN = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>"]


@pytest.fixture(scope="module")
def coder(folder, tmp_path_factory):
    """The toy, whose tokenizer has tokens for it, in the rows of its embedding that were free."""
    path = shutil.copytree(folder, tmp_path_factory.mktemp("coder"), dirs_exist_ok=True)
    found = json.loads((path / "tokenizer.json").read_text())
    size = len(found["model"]["vocab"])
    for i, token in enumerate(QWEN):
        entry = {"id": size + i, "content": token, "special": True, "normalized": False}
        found["added_tokens"].append(entry | {"single_word": False, "lstrip": False, "rstrip": False})
    (path / "tokenizer.json").write_text(json.dumps(found))
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(path)}) as running:
        yield running


@pytest.fixture
def llm(coder):
    return coder.state.models["toy"].llm


def ids(llm, *parts: str) -> list[int]:
    """Tokens of the family by their text, all else encoded."""
    found = []
    for part in parts:
        token = llm.tokenizer.backend.token_to_id(part) if part in QWEN else None
        found += [token] if token is not None else llm.encode(part)
    return found


def test_suffix(coder, llm):
    prompt = ids(llm, QWEN[0], "the quick ", QWEN[1], " fox", QWEN[2])
    holes = FillInTheMiddle(coder.state.models["toy"], "suffix")
    params = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=holes.stops)
    expected = llm.generate([prompt], params)[0].outputs[0]
    asked = {"prompt": "the quick ", "suffix": " fox", "max_tokens": 9, "temperature": 0}
    found = coder.post("/v1/completions", **asked).json()
    assert found["choices"][0]["text"] == expected.text and found["usage"]["prompt_tokens"] == len(prompt)
    assert "".join(e["choices"][0]["text"] for e in coder.events("/v1/completions", **asked)) == expected.text
    assert coder.error(400, **asked, echo=True)["param"] == "suffix"
    assert coder.error(400, **(asked | {"prompt": [3, 4]}))["param"] == "suffix"


def test_infill(coder, llm):
    body = {"input_prefix": "the ", "prompt": "qui", "input_suffix": " fox", "n_predict": 8, "temperature": 0}
    body["input_extra"] = [{"filename": "a.py", "text": "lazy"}]
    prompt = ids(llm, QWEN[3], "a.py\nlazy\n", QWEN[3], QWEN[0], "the qui", QWEN[1], " fox", QWEN[2])
    found = coder.post("/infill", **body).json()
    holes = FillInTheMiddle(coder.state.models["toy"], "suffix")
    expected = llm.generate([prompt], SamplingParams(max_tokens=8, temperature=0, stop_token_ids=holes.stops))[
        0
    ].outputs[0]
    assert found["content"] == expected.text and found["tokens_evaluated"] == len(prompt) and found["stop"] is True
    assert found["stop_type"] == ("limit" if expected.finish_reason == "length" else "eos")
    with coder.client.stream("POST", coder.url + "/infill", json=body | {"stream": True}) as response:
        events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert "".join(event["content"] for event in events) == expected.text
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]


def test_an_infill_ends_where_another_file_would_begin(coder, llm):
    end = llm.tokenizer.backend.token_to_id(QWEN[3])
    found = coder.post(
        "/v1/completions", prompt="x", suffix="y", logit_bias={str(end): 100}, max_tokens=9, temperature=0
    )
    assert found.json()["choices"][0]["finish_reason"] == "stop" and found.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("path, body, param", [
    ("/infill", {"input_prefix": "x"}, "input_suffix"),
    ("/v1/completions", {"prompt": "x", "suffix": "y"}, "suffix"),
])  # fmt: skip
def test_a_model_without_the_tokens(toy, path, body, param):
    error = toy.error(400, path, **body)
    assert error["param"] == param and "toy has no tokens for fill-in-the-middle" in error["message"]


@pytest.mark.parametrize(
    "changes, param", [({"n_predict": 0}, "n_predict"), ({"n_predict": -2}, "n_predict"), ({"slot": 1}, "slot")]
)
def test_fields_of_infills(coder, changes, param):
    assert coder.error(400, "/infill", input_prefix="x", **changes)["param"] == param
