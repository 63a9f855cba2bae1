"""The pipelines of encoders against transformers' pipelines with the same random weights, and Embedder against transformers' states."""

from __future__ import annotations

import io
import json

import pytest
import torch

import foveate
from foveate.models import load_model
from foveate.pipelines.embedding import POOLINGS
from pipeline_toys import save_encoder as save

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
TEXTS = ["Ada lives in Paris, Bob in Rome.", "a", "Zoe \u4e2d lives, in xyz. ada ADA adaada"]


def pipeline(task, folder, **options):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return transformers.pipeline(task, model=str(folder), tokenizer=tokenizer, device="cpu", **options)


def assert_equal(ours, theirs):
    """Dictionaries, or lists of them; floats within 1e-4."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert a == pytest.approx({key: float(v) if key == "score" else v for key, v in b.items()}, abs=1e-4)


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tagger")
    save(folder, "BertForTokenClassification", id2label=dict(enumerate(TAGS)))
    return folder


@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(tagger, strategy):
    theirs = pipeline("token-classification", tagger, aggregation_strategy=strategy)
    ours = foveate.TokenClassifier(tagger, aggregation_strategy=strategy)
    for a, b in zip(ours(TEXTS, tokens_per_batch=40), theirs(TEXTS)):
        assert_equal(a, b)
    one = ours(TEXTS[0])
    assert one, "the case finds no entity"
    assert [TEXTS[0][e["start"] : e["end"]].lower() for e in one] == [e["word"].replace("##", "") for e in one]
    everything = foveate.TokenClassifier(tagger, aggregation_strategy=strategy, ignore_labels=())
    assert_equal(
        everything(TEXTS[0]), pipeline("ner", tagger, aggregation_strategy=strategy, ignore_labels=[])(TEXTS[0])
    )


def test_heads_are_not_taken_for_one_another(tagger, tmp_path):
    assert type(load_model(tagger)).__name__ == "BertForTokenClassification"
    with pytest.raises(
        ValueError, match="is a BertForTokenClassification, whose head is not 'sequence-classification'"
    ):
        foveate.TextClassifier(tagger)
    other = load_model(tagger, head="sequence-classification", new_head=True)
    stored = load_model(tagger).classifier.weight
    assert other.classifier.weight.shape == stored.shape and not torch.equal(other.classifier.weight, stored)
    save(tmp_path, "BertForNextSentencePrediction")
    with pytest.raises(ValueError, match="the head of BertForNextSentencePrediction is not supported.*head='encoder'"):
        load_model(tmp_path)
    assert type(load_model(tmp_path, head="encoder")).__name__ == "Bert"


def test_names_of_tensorflow_checkpoints(tmp_path):
    from safetensors.torch import load_file, save_file

    model = save(tmp_path, "BertForMaskedLM")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "LayerNorm" in name:
                p.add_(torch.randn_like(p) * 0.3)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
        for n, w in weights.items()
    }
    assert any(name.endswith("gamma") for name in weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.arange(10)[None] + 5
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "problem, labels", [(None, 1), ("regression", 1), ("multi_label_classification", 3), (None, 3)]
)
def test_scores_of_text_classification(tmp_path, problem, labels):
    save(tmp_path, "BertForSequenceClassification", num_labels=labels, problem_type=problem)
    ours, theirs = foveate.TextClassifier(tmp_path), pipeline("text-classification", tmp_path)
    assert_equal(ours(TEXTS), theirs(TEXTS))
    if labels > 1:
        for a, b in zip(ours(TEXTS, top_k=labels), theirs(TEXTS, top_k=None)):
            assert_equal(a, b)


def test_reranking(tmp_path):
    model = save(tmp_path, "BertForSequenceClassification", num_labels=1)
    documents = ["paris", "rome in ada", "x"]
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)(
        ["ada"] * 3, documents, padding=True, return_tensors="pt"
    )
    logits = model(**tokens).logits[:, 0]
    found = foveate.Reranker(tmp_path)("ada", documents)
    assert [entry["index"] for entry in found] == logits.argsort(descending=True).tolist()
    for entry in found:
        assert entry["score"] == pytest.approx(float(logits[entry["index"]].sigmoid()), abs=1e-4)
        assert entry["text"] == documents[entry["index"]]
    assert foveate.Reranker(tmp_path)("ada", documents, top_k=1) == found[:1]
    assert foveate.Reranker(tmp_path)("ada", []) == []
    with pytest.raises(TypeError, match="documents is a str"):
        foveate.Reranker(tmp_path)("ada", "paris")
    save(tmp_path, "BertForSequenceClassification", num_labels=2)
    with pytest.raises(ValueError, match="has 2 outputs; a reranker has one"):
        foveate.Reranker(tmp_path)


def test_fill_mask(tmp_path):
    save(tmp_path, "BertForMaskedLM")
    ours, theirs = foveate.FillMask(tmp_path), pipeline("fill-mask", tmp_path)
    texts = ["ada lives [MASK] paris.", "a [MASK]", "[MASK] in [MASK]."]
    for a, b in zip(ours(texts), theirs(texts)):
        if isinstance(b[0], list):
            for row, expected in zip(a, b):
                assert_equal(row, expected)
        else:
            assert_equal(a, b)
    assert_equal(ours(texts[0], targets=["in", "a"]), theirs(texts[0], targets=["in", "a"]))
    with pytest.raises(ValueError, match="the text has no \\[MASK\\]"):
        ours("ada")
    with pytest.raises(ValueError, match="'lives in' is not a token of the vocabulary"):
        ours(texts[0], targets=["lives in"])


@pytest.mark.parametrize(
    "names", [["contradiction", "neutral", "entailment"], ["Entailment", "neutral", "contradiction"]]
)
def test_zero_shot(tmp_path, names):
    save(
        tmp_path,
        "BertForSequenceClassification",
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    ours, theirs = foveate.ZeroShotClassifier(tmp_path), pipeline("zero-shot-classification", tmp_path)
    for multi_label in (False, True):
        for found, expected in zip(
            ours(TEXTS[:2], ["ada", "rome", "x"], multi_label=multi_label),
            theirs(TEXTS[:2], ["ada", "rome", "x"], multi_label=multi_label),
        ):
            assert found["labels"] == expected["labels"] and found["sequence"] == expected["sequence"]
            assert found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    with pytest.raises(ValueError, match="has no {} where the label goes"):
        ours("a", ["b"], hypothesis_template="no place")


def _by_hand(pooling, hidden):
    """hidden [S, D] of one text"""
    S = len(hidden)
    weights = torch.arange(1, S + 1)[:, None].float()
    return {
        "cls_token": hidden[0], "lasttoken": hidden[-1], "max_tokens": hidden.max(0).values, "mean_tokens": hidden.mean(0),
        "mean_sqrt_len_tokens": hidden.sum(0) / S**0.5, "weightedmean_tokens": (hidden * weights).sum(0) / weights.sum(),
    }[pooling]  # fmt: skip


@pytest.mark.parametrize("pooling", POOLINGS)
def test_embeddings(tmp_path, pooling):
    model = save(tmp_path, "BertModel")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in TEXTS]
    expected = torch.stack([_by_hand(pooling, state) for state in states])
    embed = foveate.Embedder(tmp_path, pooling=pooling)
    for tokens_per_batch in (1, 40, 4096):
        torch.testing.assert_close(
            embed.encode(TEXTS, tokens_per_batch=tokens_per_batch), expected, atol=1e-4, rtol=1e-4
        )
    unit = foveate.Embedder(tmp_path, pooling=pooling, normalize=True)
    torch.testing.assert_close(unit.encode(TEXTS[0]), expected[0] / expected[0].norm(), atol=1e-4, rtol=1e-4)
    cosines = torch.nn.functional.cosine_similarity(expected[:, None], expected[None], dim=-1)
    torch.testing.assert_close(embed.similarity(expected, expected), cosines)


def test_a_sentence_transformers_folder(tmp_path):
    save(tmp_path, "BertModel")
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize"))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    (tmp_path / "config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "in "}, "similarity_fn_name": "dot"})
    )
    embed = foveate.Embedder(tmp_path)
    assert (embed.pooling, embed.normalize, embed.max_seq_length) == ("cls_token", True, 8)
    plain = foveate.Embedder(tmp_path, pooling="cls_token", normalize=False)
    assert torch.equal(embed.encode("ada", prompt_name="query"), embed.encode("in ada"))
    torch.testing.assert_close(embed.encode("ada"), torch.nn.functional.normalize(plain.encode("ada"), dim=-1))
    assert torch.equal(embed.similarity(torch.ones(1, 2), torch.full((1, 2), 3.0)), torch.tensor([[6.0]]))
    with pytest.raises(
        ValueError, match="the text 1 has 12 tokens, and max_seq_length is 8; split it, or pass truncate=True"
    ):
        embed.encode(["a", "ada " * 10])
    assert torch.equal(embed.encode("ada " * 10, truncate=True), embed.encode("ada " * 6))
    assert embed.encode("ada").shape == (32,) and embed.encode([]).shape == (0, 32)
    with pytest.raises(ValueError, match="prompt_name='document' is not one of query"):
        embed.encode("a", prompt_name="document")
    (tmp_path / "modules.json").write_text(json.dumps([*modules, {"type": "sentence_transformers.models.LSTM"}]))
    with pytest.raises(ValueError, match="has a module 'sentence_transformers.models.LSTM'; known are"):
        foveate.Embedder(tmp_path)


def test_dense_modules(tmp_path):
    """Two layers between pooling and normalisation, the second without bias and activation, as EmbeddingGemma has them."""
    from safetensors.torch import save_file

    save(tmp_path, "BertModel")
    parts = ["Transformer", "Pooling", "Dense", "Dense", "Normalize"]
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": f"{i}_{kind}"} for i, kind in enumerate(parts)]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    first, second, bias = torch.randn(40, 32), torch.randn(12, 40), torch.randn(40)
    for i, weights, name in (
        (2, {"weight": first, "bias": bias}, "activation.Tanh"),
        (3, {"weight": second}, "linear.Identity"),
    ):
        folder = tmp_path / f"{i}_Dense"
        folder.mkdir()
        save_file({f"linear.{key}": value for key, value in weights.items()}, folder / "model.safetensors")
        rows, columns = weights["weight"].shape
        settings = {"in_features": columns, "out_features": rows, "activation_function": f"torch.nn.modules.{name}"}
        (folder / "config.json").write_text(json.dumps(settings))
    embed = foveate.Embedder(tmp_path)
    assert embed.dimension == 12 and embed.encode([]).shape == (0, 12)
    pooled = foveate.Embedder(embed.model, embed.tokenizer, pooling="mean_tokens").encode(["ada", "in rome"])
    expected = torch.nn.functional.normalize(torch.tanh(pooled @ first.t() + bias) @ second.t(), dim=-1)
    torch.testing.assert_close(embed.encode(["ada", "in rome"]), expected)
    (tmp_path / "modules.json").write_text(json.dumps([*modules, modules[2]]))
    with pytest.raises(ValueError, match="has a Dense module behind Normalize"):
        foveate.Embedder(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "3_Dense" / "config.json").write_text(json.dumps({"in_features": 41, "out_features": 12}))
    with pytest.raises(ValueError, match=r"has \[12, 40\], and its config.json asks for a weight of \[12, 41\]"):
        foveate.Embedder(tmp_path)


@pytest.mark.parametrize("kind, tied", [("Llama", True), ("Mistral", False), ("Qwen3", True)])
def test_decoders_without_a_head_embed(tmp_path, kind, tied):
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        max_position_embeddings=64, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).eval()
    model.save_pretrained(tmp_path)
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "ada": 1, "rome": 2}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    expected = torch.stack([model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ([1, 2], [2, 2, 1, 0])])
    found = foveate.Embedder(tmp_path).encode(["ada rome", "rome rome ada paris"])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    if not tied:
        with pytest.raises(ValueError, match="has no language-model head; it is one for foveate.Embedder"):
            foveate.LLM(tmp_path)


def test_commands_of_encoders(tmp_path, capsys, monkeypatch):
    from foveate.cli import main

    save(tmp_path, "BertForMaskedLM")
    model = ["--model", str(tmp_path)]
    assert main(["fill", *model, "--text", "ada [MASK] in [MASK]", "--top-k", "2"]) == 0
    fill = foveate.FillMask(tmp_path)("ada [MASK] in [MASK]", top_k=2)
    lines = ["\t".join(f"{token['token_str']} {token['score']:.4f}" for token in tokens) for tokens in fill]
    assert capsys.readouterr().out.splitlines() == lines and len(lines) == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("ada [MASK]\n\na [MASK]\n"))
    assert main(["fill", *model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["texts"]
    assert [row["text"] for row in found] == ["ada [MASK]", "a [MASK]"] and len(found[0]["masks"][0]) == 5
    assert main(["fill", *model, "--text", "ada"]) == 1 and "has no [MASK]" in capsys.readouterr().err
    assert main(["fill", *model, "--text", "a", "--top-k", "0"]) == 2 and "--top-k 0" in capsys.readouterr().err

    assert main(["embed", *model, "--text", "ada", "--text", "rome"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    torch.testing.assert_close(torch.tensor(rows), foveate.Embedder(tmp_path).encode(["ada", "rome"]))
    assert main(["embed", *model, "--json", "--prompt", "in ", "--text", "ada"]) == 0
    row = json.loads(capsys.readouterr().out)["texts"][0]
    assert row["text"] == "ada" and len(row["embedding"]) == 32
    (tmp_path / "lines.txt").write_text("ada\n\nrome\n")
    assert main(["embed", *model, "--file", str(tmp_path / "lines.txt")]) == 2
    assert "line 2 is empty" in capsys.readouterr().err

    save(tmp_path, "BertForSequenceClassification", num_labels=1)
    documents = ["paris", "rome in ada", "x"]
    wanted = foveate.Reranker(tmp_path)("ada", documents)
    rerank = ["rerank", *model, "--query", "ada", *(part for text in documents for part in ("--text", text))]
    assert main(rerank) == 0
    assert capsys.readouterr().out.splitlines() == [f"{entry['score']:.4f}\t{entry['text']}" for entry in wanted]
    assert main([*rerank, "--json", "--top-k", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"query": "ada", "documents": [pytest.approx(wanted[0])]}
