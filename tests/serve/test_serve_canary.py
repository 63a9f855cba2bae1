"""Golden prompts: the same under any load, and an alarm when the model is another one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json

import pytest

import generation_toys as toys
import serve_toys
from foveate.serve.canary import TIE, Golden, Seen, difference, read_golden


@pytest.fixture
def goldens(tmp_path):
    file = tmp_path / "golden.jsonl"
    lines = [
        {"prompt": "the quick brown fox", "max_tokens": 12},
        {"prompt": toys.prompts(1, 60, 60)[0], "max_tokens": 8},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return file


def test_no_false_alarm_under_load_and_a_true_one_after_damage(folder, goldens):
    made = {}

    def load():
        made["llm"] = serve_toys.make_llm(folder, num_pages=96, max_prefill_tokens=16)
        return made["llm"]

    with serve_toys.serving({"toy": load}, canary=goldens, canary_every=0.05) as running:
        running.wait(lambda: running.get("/canary").json()["rounds"] >= 1)
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [
                pool.submit(running.post, "/v1/completions", prompt=prompt, max_tokens=20, seed=i, ignore_eos=True)
                for i, prompt in enumerate(toys.prompts(36, 5, 60))
            ]
            assert {future.result().status_code for future in asked} == {200}
        running.wait(lambda: running.get("/canary").json()["rounds"] >= 3)
        before = running.get("/canary").json()
        assert before["status"] == "same"
        assert running.metric("foveate:canary_runs_total", model_name="toy", result="drift") == 0
        # what it saw is a file that expects it
        file = goldens.with_name("expected.jsonl")
        file.write_text("\n".join(json.dumps(entry["expected"]) for entry in before["prompts"]))
        assert [golden.token_ids for golden in read_golden(file)] == [
            entry["expected"]["token_ids"] for entry in before["prompts"]
        ]

        model = made["llm"].model
        exact = model.logits
        model.logits = lambda hidden: exact(hidden) * 1.001  # as of weights that are not quite those of the file
        # each prompt in its turn: the round that was under way has judged some of them by the old weights
        running.wait(lambda: {entry["result"] for entry in running.get("/canary").json()["prompts"]} == {"drift"})
        assert running.metric("foveate:canary_runs_total", model_name="toy", result="drift") >= 2
        report = running.get("/canary").json()
        assert report["status"] == "drift" and all("log-probability" in entry["why"] for entry in report["prompts"])


def test_ties_may_fall_either_way():
    golden = Golden("x", token_ids=[1, 2, 3], logprobs=[-1.0, -2.0, -3.0], margins=[1.0, TIE / 2, 1.0])
    assert difference(golden, Seen([1, 2, 3], [-1.0, -2.0, -3.0])) is None
    assert difference(golden, Seen([1, 9, 9], [-1.0, -2.0, -7.0])) is None
    assert difference(golden, Seen([9, 2, 3], [-1.0, -2.0, -3.0])) == "token 0 is 9, not 1"
    assert "log-probability" in difference(golden, Seen([1, 2, 3], [-1.0, -2.1, -3.0]))
    assert "log-probability" in difference(golden, Seen([1, 2, 3], [-1.0, float("nan"), -3.0]))
    assert difference(golden, Seen([1, 2], [-1.0, -2.0])) == "2 tokens came, not 3"


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{", "line 1"), ('{"prompt": "a", "seed": 1}', "seed is not known"), ('{"prompt": "a", "max_tokens": 0}', "max_tokens=0"),
        ('{"prompt": "a", "token_ids": [1]}', "go together"), ("", "holds no prompt"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, line, sentence):
    (tmp_path / "golden").write_text(line + "\n")
    with pytest.raises(ValueError, match=sentence):
        read_golden(tmp_path / "golden")


def test_an_engine_that_fails_is_no_drift(folder, goldens):
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(folder)}, canary=goldens, canary_every=60) as running:
        running.wait(lambda: running.get("/canary").json()["rounds"] == 1)
        running.engine.step = lambda: 1 / 0
        future = asyncio.run_coroutine_threadsafe(running.state.canary.round(), running.server._loop)
        future.result(10)
        assert running.get("/canary").json()["status"] == "failed"
