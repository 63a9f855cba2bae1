"""foveate.inspect: attention, logit lens, choices and attributions against transformers with the same weights; forms, errors, command."""

from __future__ import annotations

import io
import json

import pytest
import torch

import foveate
import generation_toys as toys
import pipeline_toys
from foveate.cli import main
from foveate.inspect import Inspector, captum_function, forward
from foveate.inspect.wanted import wanted
from model_cases import randomize

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "qwen3": ("Qwen3ForCausalLM", {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}),
    "olmo2": ("Olmo2ForCausalLM", {**SIZES, "intermediate_size": 48, "eos_token_id": 1}),
    "opt": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 1},
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 99, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            **SIZES,
            "num_key_value_heads": 2,
            "intermediate_size": 32,
            "head_dim": 8,
            "sliding_window": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "bert": ("BertForMaskedLM", {**SIZES, "intermediate_size": 48}),
    "roberta": ("RobertaForMaskedLM", {**SIZES, "intermediate_size": 48, "pad_token_id": 1}),
    "mpnet": ("MPNetForMaskedLM", {**SIZES, "intermediate_size": 48, "pad_token_id": 1}),
    "albert": ("AlbertForMaskedLM", {**SIZES, "intermediate_size": 48, "embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", {**SIZES, "intermediate_size": 48, "local_attention": 8}),
}
TOKENS = [5, 17, 90, 3, 44, 44, 8, 61, 29, 70, 11]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """transformers' model with eager attention, and an Inspector of the same weights."""
    name, sizes = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    kind = getattr(transformers, name)
    torch.manual_seed(1)
    model = kind(kind.config_class(**sizes)).eval()
    randomize(model, 0.2)
    model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model, Inspector(str(folder))


def test_attention_and_logits_equal_transformers(pair, monkeypatch):
    model, inspector = pair
    monkeypatch.setattr("foveate.inspect.inspector.CHUNK", 4)
    found = inspector.inspect(TOKENS, rows=[0, -1, 4], heads=[3, 1], layers=[2, 0], lens_top=4, top=3)
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS]), output_attentions=True)
    for place, layer in enumerate(found.layers):
        expected = theirs.attentions[layer][0][[3, 1]][:, [0, 10, 4]]
        torch.testing.assert_close(found.attention[place], expected, rtol=1e-3, atol=2e-5)
    logprobs = theirs.logits[0].log_softmax(-1)
    # after the last layer the lens is the model's own output
    best = logprobs[[0, 10, 4]].exp().topk(4)
    torch.testing.assert_close(found.lens.probabilities[-1], best.values, rtol=1e-3, atol=1e-5)
    assert found.lens.ids[-1].tolist() == best.indices.tolist()
    causal = inspector.parts.kind == "causal"
    assert len(found.choices) == len(TOKENS) + causal and (found.choices[0] is None) == causal
    for i in range(1, len(TOKENS)):
        choice, row = found.choices[i], logprobs[i - causal]
        assert choice.token_id == TOKENS[i]
        assert choice.logprob == pytest.approx(float(row[TOKENS[i]]), abs=1e-3)
        assert choice.rank == int((row > row[TOKENS[i]]).sum()) + 1
        assert choice.entropy == pytest.approx(float(-(row.exp() * row).sum()), abs=1e-3)
        assert [token for token, _, _ in choice.alternatives] == row.topk(3).indices.tolist()
    if causal:
        assert found.choices[-1].token_id is None and found.choices[-1].logprob is None


@pytest.mark.parametrize("pair", ["llama", "gemma2", "gpt2"], indirect=True)  # of an encoder it is given elsewhere
def test_lens_reads_the_stream_of_transformers(pair):
    model, inspector = pair
    found = inspector.inspect(TOKENS, rows=range(len(TOKENS)), lens_top=99)
    with torch.no_grad():
        states = model(torch.tensor([TOKENS]), output_hidden_states=True).hidden_states
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    for layer, state in enumerate(states[:-1]):  # the last one has been normed
        logits = model.lm_head(norm(state[0]))
        cap = getattr(model.config, "final_logit_softcapping", None)
        logits = logits if cap is None else cap * torch.tanh(logits / cap)
        ours = torch.zeros_like(logits).scatter(-1, found.lens.ids[layer], found.lens.probabilities[layer])
        torch.testing.assert_close(ours, logits.softmax(-1), rtol=1e-3, atol=1e-5)


def test_rollout_is_the_product_of_all_layers(pair, monkeypatch):
    model, inspector = pair
    monkeypatch.setattr("foveate.inspect.inspector.CHUNK", 4)
    monkeypatch.setattr("foveate.inspect.rollout._BLOCK", 3)
    found = inspector.inspect(TOKENS, rows=[-1, 2], rollout=True, attention=False, lens_top=0, choices=False)
    with torch.no_grad():
        attentions = model(torch.tensor([TOKENS]), output_attentions=True).attentions
    product = torch.eye(len(TOKENS))
    for layer in attentions:
        product = (layer[0].mean(0) + torch.eye(len(TOKENS))) / 2 @ product
    torch.testing.assert_close(found.rollout, product[[-1, 2]], rtol=1e-3, atol=1e-5)
    assert found.attention is None and found.lens is None and found.choices == []


def test_gradients_equal_transformers(pair):
    model, inspector = pair
    found = inspector.attribute(TOKENS, target=7, row=5).attributions[0]
    embedding = model.get_input_embeddings()
    x = embedding(torch.tensor([TOKENS])).detach()
    # a scale of the embedding comes after the table here, and within the embedding there
    leaf = x.clone().requires_grad_()
    score = model(inputs_embeds=leaf).logits[0, 5, 7]
    (gradient,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(found.values, (gradient * x).sum(-1)[0].detach(), rtol=2e-3, atol=2e-4)
    assert found.score == pytest.approx(float(score.detach()), abs=1e-3) and "at token 5" in found.target
    whole = inspector.attribute(TOKENS, target=7, row=5, method="integrated gradients", steps=300).attributions[0]
    assert abs(whole.gap) < 0.05 * max(1.0, abs(whole.score - whole.baseline_score))
    assert whole.values.sum() == pytest.approx(whole.score - whole.baseline_score + whole.gap, abs=1e-3)
    other = inspector.attribute(TOKENS, target=7, row=5, method="integrated gradients", baseline=3).attributions[0]
    assert other.baseline_score != whole.baseline_score


def test_an_llm_is_looked_into_and_left_as_it_was(tmp_path):
    path = str(toys.folder(tmp_path))
    llm = foveate.LLM(path, num_pages=40)
    expected = Inspector(path).inspect("the quick brown fox", rollout=True)
    before = llm.generate("the quick", foveate.SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids
    inspector = Inspector(llm)
    found = inspector.inspect("the quick brown fox", rollout=True)
    torch.testing.assert_close(found.attention, expected.attention, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.rollout, expected.rollout, rtol=1e-4, atol=1e-6)
    assert [c and c.rank for c in found.choices] == [c and c.rank for c in expected.choices]
    inspector.attribute("the quick brown fox")
    after = llm.generate("the quick", foveate.SamplingParams(temperature=0, max_tokens=8))[0].outputs[0].token_ids
    assert before == after
    left = [m for m in inspector.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == [] and found.tokens == ["the", " quick", " brown", " fox"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    found = {}
    for head in ("BertForQuestionAnswering", "BertForSequenceClassification", "BertModel"):
        found[head] = tmp_path_factory.mktemp(head)
        options = {"id2label": {0: "bad", 1: "good"}} if head == "BertForSequenceClassification" else {}
        pipeline_toys.save_encoder(found[head], head, **options)
    return {name: str(folder) for name, folder in found.items()}


def test_what_an_answer_rests_on(encoders):
    answerer = foveate.QuestionAnswerer(encoders["BertForQuestionAnswering"])
    question, context = "in ada", "ada lives in a, b lives in c."
    found = Inspector(answerer).attribute(question, context, method="integrated gradients", steps=200)
    expected = answerer(question, context, top_k=3)
    assert found.result["answer"] in [answer["answer"] for answer in expected]
    start, end = found.attributions
    assert "start at token" in start.target and "end at token" in end.target
    for one in (start, end):
        assert abs(one.gap) < 0.05 * max(1.0, abs(one.score - one.baseline_score))
    # a context in many windows: the one with the answer
    long = "ada lives in a. " * 40
    part = Inspector(answerer).attribute(question, long)
    assert len(part.token_ids) <= 64 and part.result["answer"] in long


def test_what_a_class_rests_on(encoders):
    classifier = foveate.TextClassifier(encoders["BertForSequenceClassification"])
    best = classifier("ada lives in a")["label"]
    inspector = Inspector(classifier)
    found = inspector.attribute("ada lives in a")
    assert found.attributions[0].target == f"logit of {best}"
    other = inspector.attribute("ada lives in a", target={"bad": "good", "good": "bad"}[best])
    assert not torch.equal(other.attributions[0].values, found.attributions[0].values)
    assert inspector.inspect("ada lives", "in a").attention.shape[:2] == (2, 4)


def test_captum(encoders):
    captum = pytest.importorskip("captum.attr", reason="captum is not installed")
    inspector = Inspector(encoders["BertForSequenceClassification"])
    function, embeddings = captum_function(inspector, "ada lives in a", target="good")
    base = torch.zeros_like(embeddings)
    theirs = captum.IntegratedGradients(function).attribute(
        embeddings, baselines=base, n_steps=64, method="riemann_middle"
    )
    ours = inspector.attribute(
        "ada lives in a", target="good", method="integrated gradients", steps=64, baseline=base[0]
    )
    torch.testing.assert_close(theirs.sum(-1)[0].detach().float(), ours.attributions[0].values, rtol=1e-3, atol=1e-4)


def test_the_forward_function_of_captum_is_differentiable_for_each_row(encoders):
    inspector = Inspector(encoders["BertForSequenceClassification"])
    function, embeddings = captum_function(inspector, "ada lives in a")
    rows = torch.cat([embeddings, embeddings * 0.5]).requires_grad_()
    scores = function(rows)
    assert scores.shape == (2,) and scores[0] != scores[1]
    (gradient,) = torch.autograd.grad(scores[0], rows)
    assert gradient[0].any() and not gradient[1].any()


def test_forms(tmp_path):
    inspector = Inspector(str(toys.folder(tmp_path)))
    found = inspector.inspect("the quick $brown$ fox\n</script>", rollout=True)
    found.attributions = inspector.attribute("the quick $brown$ fox\n</script>").attributions
    data = json.loads(found.to_json(digits=4))
    assert data["tokens"] == found.tokens and data["attention"]["layers"] == [0, 1]
    weights = torch.tensor(data["attention"]["weights"])
    torch.testing.assert_close(weights, found.attention, rtol=1e-3, atol=1e-6)
    assert data["choices"][0] is None and data["choices"][1]["alternatives"][0][1]
    assert len(data["logit_lens"]["texts"]) == 3 and len(data["attributions"][0]["values"]) == len(found.tokens)
    text = found.to_html(tmp_path / "page.html", "<b>title</b>")
    assert text == (tmp_path / "page.html").read_text() and "<title>&lt;b&gt;title" in text
    assert text.count("</script>") == 2 and "http://" not in text and "https://" not in text
    pytest.importorskip("matplotlib")
    found.to_png(tmp_path / "page.png")
    found.to_png(tmp_path / "head.png", layer=0, head=1)
    pictures = [(tmp_path / name).read_bytes() for name in ("page.png", "head.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]
    with pytest.raises(ValueError, match="layer has 2; there are 2 recorded layers"):
        found.to_png(tmp_path / "none.png", layer=2)


def test_errors(tmp_path, encoders):
    inspector = Inspector(str(toys.folder(tmp_path)))
    text = "the quick brown fox"
    for options, words in (
        ({"rows": [4]}, "rows has 4; there are 4 tokens, so rows go from -4 to 3"),
        ({"layers": 9}, "layers has 9; there are 2 layers"),
        ({"heads": []}, "heads is empty"),
        ({"lens_top": 1000}, "lens_top=1000 must be an integer from 0"),
        ({"max_weights": 10}, "2 layers x 4 heads x 4 rows x 4 keys are 128 numbers, more than 10; choose fewer"),
        ({"text_pair": "more"}, "text_pair is for encoders"),
    ):
        with pytest.raises(ValueError, match=words):
            inspector.inspect(text, **options)
    with pytest.raises(ValueError, match="tokens do not fit the model's .* positions; shorten the text"):
        inspector.inspect([5] * 100_000)
    with pytest.raises(ValueError, match="no tokens"):
        inspector.inspect([])
    with pytest.raises(ValueError, match="token id 99999; this model's ids go from 0"):
        inspector.inspect([99999])
    with pytest.raises(TypeError, match="rows has 0.5, which is no integer"):
        inspector.inspect(text, rows=[0.5])
    for options, words in (
        ({"method": "saliency"}, "method='saliency' is not one of 'gradient x input', 'integrated gradients'"),
        ({"steps": 0}, "steps=0 must be"),
        ({"baseline": 3}, "baseline=3 belongs to"),
        ({"target": "the quick"}, "target='the quick' is 2 tokens"),
        ({"target": -1}, "target=-1 is no token id"),
        ({"row": 7}, "row has 7; there are 4 tokens"),
        ({"method": "integrated gradients", "baseline": torch.zeros(3)}, r"baseline has shape \[3\]"),
    ):
        with pytest.raises(ValueError, match=words):
            inspector.attribute(text, **options)
    plain = Inspector(encoders["BertModel"])
    assert plain.inspect("ada").lens is None
    with pytest.raises(ValueError, match="a Bert has no language-model head"):
        plain.inspect("ada", lens_top=2)
    with pytest.raises(ValueError, match="a Bert has no head that gives a score"):
        plain.attribute("ada")
    with pytest.raises(ValueError, match="'neutral' is no class of this model; there are 'bad', 'good'"):
        Inspector(encoders["BertForSequenceClassification"]).attribute("ada", target="neutral")
    with pytest.raises(ValueError, match="takes two texts: the question, and the context"):
        Inspector(encoders["BertForQuestionAnswering"]).attribute("ada")
    with pytest.raises(ValueError, match="does not know the parts of a Linear"):
        Inspector(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="there is no tokenizer"):
        Inspector(inspector.model).inspect("the")


def test_only_what_is_asked_for_is_kept(tmp_path):
    """A run keeps neither q and k nor the stream unless they are needed."""
    inspector = Inspector(str(toys.folder(tmp_path)))
    asked = wanted(inspector.parts, 4, attention=False, lens_top=0, choices=False)
    run = forward.Pass(inspector.parts, [1, 2, 3, 4], asked, inspector.texts)
    assert run.step()
    assert run.recorder.attention is None and run.recorder.stream is None and not any(run.recorder.queries)


def test_the_example(tmp_path, capsys):
    import look_inside

    look_inside.main(
        ["--model", str(toys.folder(tmp_path)), "--prompt", "the quick", "--html", str(tmp_path / "p.html")]
    )
    shown = capsys.readouterr().out
    assert shown.startswith("'the quick' goes on with") and "of 2 layers" in shown and (tmp_path / "p.html").exists()


def test_the_command(tmp_path, capsys, monkeypatch, encoders):
    path = str(toys.folder(tmp_path))
    assert main(["inspect", "--model", path, "--text", "the quick", "--rollout", "--gradients"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("token") and "(next)" in shown and "rollout of token 1" in shown and "layer 1" in shown
    files = ["--html", str(tmp_path / "p.html"), "--png", str(tmp_path / "p.png")]
    monkeypatch.setattr("sys.stdin", io.StringIO("the quick brown"))
    assert main(["inspect", "--model", path, "--layers", "0-1", "--rows=-1,0", "--heads", "2", "--json", *files]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["attention"]["heads"] == [2] and data["rows"] == [2, 0]
    assert "the" in (tmp_path / "p.html").read_text() and (tmp_path / "p.png").exists()
    answers = encoders["BertForQuestionAnswering"]
    options = ["inspect", "--model", answers, "--question", "ada", "--context", "ada lives in a."]
    assert main([*options, "--integrated-gradients", "20"]) == 0
    assert "answer: " in capsys.readouterr().out
    for arguments, status, words in (
        (["--model", path, "--question", "a"], 2, "--question and --context go together"),
        (["--model", answers, "--text", "a"], 2, "answers questions: give --question and --context"),
        (["--model", path, "--text", "a", "--baseline", "x"], 2, "--baseline belongs to --integrated-gradients"),
        (["--model", path, "--text", "the", "--rows", "7"], 1, "rows has 7; there are 1 tokens"),
    ):
        assert main(["inspect", *arguments]) == status
        assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["inspect", "--model", path, "--text", "a", "--rows", "first"])
    assert "'first' must be numbers and ranges" in capsys.readouterr().err
