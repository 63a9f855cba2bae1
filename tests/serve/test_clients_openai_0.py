"""openai 0.28, with programs as they stand but for the address. It runs in a process, since today's client has the same name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import client_toys

OLD = Path(os.environ.get("FOVEATE_CLIENTS", "nowhere")) / "openai-0"
client_toys.needed((OLD / "openai").is_dir(), "openai 0.28")
pytestmark = pytest.mark.clients

SEED = """
import openai
openai.api_key = "unused"

def generate(prompt):
    response = openai.Completion.create(engine="toy", prompt=prompt, max_tokens=100, n=1, stop=None, temperature=0.7)
    return response.choices[0].text.strip()

response = generate("Once upon a time")
print("LENGTH", len(response))
"""
MORE = """
import openai
openai.api_key = "unused"
asked = {"prompt": "the quick", "max_tokens": 12, "seed": 1, "temperature": 0.7}
whole = openai.Completion.create(model="toy", logprobs=2, **asked).choices[0]
assert whole.text == "".join(c.choices[0].text for c in openai.Completion.create(engine="toy", stream=True, **asked))
assert len(whole.logprobs.top_logprobs[0]) in (2, 3)
messages = [{"role": "user", "content": "x"}]
chat = {"messages": messages, "max_tokens": 8, "seed": 1}
whole = openai.ChatCompletion.create(model="toy", **chat).choices[0].message.content
assert whole == openai.ChatCompletion.create(engine="toy", **chat).choices[0].message.content
assert whole == "".join(c.choices[0].delta.get("content", "") for c in openai.ChatCompletion.create(model="toy", stream=True, **chat))
by_engine = openai.Embedding.create(engine="embed", input="ada")["data"][0]["embedding"]
by_model = openai.Embedding.create(model="embed", input=["ada"])["data"][0]["embedding"]
assert len(by_model) == 32 and max(abs(a - b) for a, b in zip(by_engine, by_model)) == 0
assert "toy" in [model.id for model in openai.Model.list().data] and openai.Model.retrieve("toy").id == "toy"
try:
    openai.Completion.create(engine="davinci", prompt="x")
except openai.error.InvalidRequestError as error:
    assert error.code == "model_not_found" and "toy" in str(error)
else:
    raise AssertionError
print("DONE")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with client_toys.serving(tmp_path_factory.mktemp("models")) as running:
        yield running


@pytest.mark.parametrize("program, ends", [(SEED, "LENGTH"), (MORE, "DONE")], ids=["seed", "more"])
def test_the_program_runs(server, program, ends, tmp_path):
    """With an environment variable for the address, as 0.28 reads it."""
    environment = {**os.environ, "PYTHONPATH": str(OLD), "OPENAI_API_BASE": server.url + "/v1"}
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert ends in done.stdout
