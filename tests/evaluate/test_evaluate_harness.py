"""foveate as a model class of lm-evaluation-harness: equal to its Hugging Face backend, and tasks that need no hub."""

from __future__ import annotations

import json

import pytest
import torch

import generation_toys as toys

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning"),
]  # fmt: skip
PAIRS = [
    ("the quick brown", " fox jumps"), ("the quick brown", " dog"), ("the lazy ", "dog, again"), ("", "naïve café"), ("count", ": 12"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = toys.folder(tmp_path_factory.mktemp("harness"))
    file = path / "tokenizer_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | {"eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return path


@pytest.fixture(scope="module")
def ours(folder):
    from foveate.evaluate.harness import FoveateLM

    return FoveateLM(folder, num_pages=256, page_size=4, progress=False)


@pytest.fixture(scope="module")
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    from lm_eval.models.huggingface import HFLM

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return HFLM(
        pretrained=model, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=2, device="cpu"
    )


def instances(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=one, idx=i) for i, one in enumerate(arguments)]


def test_registered():
    from lm_eval.api.registry import get_model

    from foveate.evaluate.harness import FoveateLM

    assert get_model("foveate") is FoveateLM


def test_log_likelihoods_are_those_of_the_hugging_face_backend(ours, theirs):
    found = ours.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    torch.testing.assert_close([one[0] for one in found], [float(one[0]) for one in expected], atol=2e-4, rtol=1e-5)
    assert [one[1] for one in found] == [bool(one[1]) for one in expected]


def test_rolling_texts_in_windows(ours, theirs):
    texts = [(text * 12,) for text in toys.TEXT]
    most = min(ours.max_length, theirs.max_length)
    ours.max_length = theirs._max_length = min(64, most)
    found = ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    torch.testing.assert_close(found, [float(one) for one in expected], atol=5e-3, rtol=1e-5)
    ours.max_length = theirs._max_length = most


def test_generated_texts(ours, theirs):
    asked = [
        (context, {"until": [until], "max_gen_toks": 8}) for (context, _), until in zip(PAIRS[:3], ["o", "zz", "a"])
    ]
    found = ours.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert found == theirs.generate_until(instances("generate_until", asked), disable_tqdm=True)
    with pytest.raises(ValueError, match="odd=1 in generation"):
        ours.generate_until(instances("generate_until", [("a", {"odd": 1, "max_gen_toks": 4})]), disable_tqdm=True)


def test_chat_templates(ours):
    history = [{"role": "user", "content": "naïve"}]
    assert ours.apply_chat_template(history) == ours.tokenizer.apply_chat_template(history)


def test_a_task_of_local_files_needs_no_hub(ours, tmp_path):
    for name in ("sacrebleu", "datasets", "evaluate", "rouge_score", "sqlitedict", "word2number"):
        pytest.importorskip(name, reason=f"lm_eval's own tasks need {name}")
    from foveate.evaluate.harness import run_tasks

    rows = [{"q": "the quick brown", "c": ["fox", "the"], "a": 0}, {"q": "the lazy", "c": ["dog", "fox"], "a": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\n'
        "metric_list:\n  - metric: acc\n"
    )
    found = run_tasks(ours.llm, ["mine"], include=[tmp_path])
    scores = ours.loglikelihood(
        instances("loglikelihood", [(r["q"], " " + c) for r in rows for c in r["c"]]), disable_tqdm=True
    )
    totals = [one[0] for one in scores]
    expected = ((totals[0] > totals[1]) + (totals[3] > totals[2])) / 2
    assert found["results"]["mine"]["acc,none"] == expected and found["n"]["mine"]["effective"] == 2
    with pytest.raises(ValueError, match="knows no task 'nothing'"):
        run_tasks(ours.llm, ["nothing"], include=[tmp_path])
