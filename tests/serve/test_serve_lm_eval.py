"""lm-evaluation-harness over HTTP gives the numbers of the model in process, to the last bit."""

from __future__ import annotations

import json
import shutil

import pytest

import serve_toys
from foveate import SamplingParams

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
PAIRS = [
    ("the quick brown", " fox jumps"),
    ("the lazy", " dog, again"),
    ("naïve", " café über"),
    ("the", " the"),
    ("count", ": 12"),
]


@pytest.fixture(scope="module")
def named(folder, tmp_path_factory):
    """The toy, which says what its end token is, as the harness asks."""
    path = shutil.copytree(folder, tmp_path_factory.mktemp("named"), dirs_exist_ok=True)
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<eos>"}))
    with serve_toys.serving({"toy": lambda: serve_toys.make_llm(path)}) as running:
        yield running


@pytest.fixture(scope="module", params=[1, 4])
def harness(named, request):
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=named.url + "/v1/completions",
        model="toy",
        tokenizer_backend="remote",
        batch_size=request.param,
        max_length=256,
    )


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_log_likelihoods(harness, llm):
    found = harness.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(PAIRS, found):
        ids, start = llm.encode(context + continuation), len(llm.encode(context))
        [output] = llm.generate([ids], SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0))
        own = [output.prompt_logprobs[i][ids[i]] for i in range(start, len(ids))]
        assert total == sum(entry.logprob for entry in own) and greedy == all(entry.rank == 1 for entry in own)


def test_texts(harness, llm):
    asked = [(context, {"until": ["o"], "max_gen_toks": 9, "temperature": 0}) for context, _ in PAIRS]
    found = harness.generate_until(instances("generate_until", asked), disable_tqdm=True)
    outputs = llm.generate([context for context, _ in PAIRS], SamplingParams(max_tokens=9, temperature=0, stop=["o"]))
    assert found == [output.outputs[0].text for output in outputs]
