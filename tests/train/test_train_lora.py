"""LoRA: adapters in peft's format both ways, merged = unmerged, on packed weights too, and what is trained and what is not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import foveate
from foveate.models import load_model
from foveate.models.layers import PackedEmbedding
from foveate.nn import PackedLinear
from foveate.train import LoraConfig, add_lora, fit, load_adapter, merge_lora, save_adapter
from foveate.train.modules.lora import FrozenLinear, adapters
from objective_toys import BERT, T5_CONFIG, squad, unigram, wordpiece
from train_toys import GPT2, LLAMA, largest_difference, losses, options, run, sentences, texts, weights, write_jsonl

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # in peft
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama of characters, hardly trained."""
    model = LLAMA | {"intermediate_size": 64, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return str(run(tmp_path_factory.mktemp("base"), new_model=model, max_steps=5).last)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    return str(run(folder, new_model=GPT2, max_steps=1, dropout=0.0).last)


BASE = {"new_model": None, "tokenizer": None, "lora_rank": 4, "learning_rate": 2e-2, "max_steps": 8}


def tune(folder, model, **changes):
    return run(folder, **BASE | {"model": model} | changes)


TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_reads_what_we_write(tmp_path, base, gpt2, kind, rslora):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    path = {"llama": base, "gpt2": gpt2}[kind]
    result = tune(tmp_path, path, rslora=rslora, lora_alpha=6.0)
    assert sorted(p.name for p in result.last.iterdir() if p.is_file())[:2] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    before = theirs(TOKENS).logits
    theirs = peft.PeftModel.from_pretrained(theirs, result.last).eval()
    with torch.no_grad():
        expected, ours = theirs(TOKENS).logits, result.model(TOKENS)
    assert (before - ours).abs().max() > 0.1
    assert torch.allclose(expected, ours, atol=1e-3 * float(ours.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_we_read_what_peft_writes(tmp_path, base, gpt2, kind):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    path = {"llama": base, "gpt2": gpt2}[kind]
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}[kind]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(path), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_model(path)
    found = load_adapter(ours, tmp_path)
    assert (found.rank, found.alpha) == (3, 5) and len(list(adapters(ours))) == 2 * len(targets)
    with torch.no_grad():
        expected, out = theirs(TOKENS).logits, ours(TOKENS)
        assert torch.allclose(expected, out, atol=1e-3 * float(out.abs().max()))
        assert torch.allclose(merge_lora(ours)(TOKENS), out, atol=1e-5 * float(out.abs().max()))
    assert not list(adapters(ours)) and {n for n, _ in ours.named_parameters()} == {
        n for n, _ in load_model(path).named_parameters()
    }


def test_the_merged_model_is_the_adapted_one(tmp_path, base):
    result = tune(tmp_path, base, merge=True)
    merged = load_model(tmp_path / "out" / "merged")
    with torch.no_grad():
        out = result.model(TOKENS)
        assert torch.allclose(merged(TOKENS), out, atol=1e-5 * float(out.abs().max()))
    llm = foveate.LLM(str(tmp_path / "out" / "merged"), num_pages=40)
    assert llm.generate("the quick", foveate.SamplingParams(max_tokens=3, temperature=0.0))[0].outputs[0].token_ids


def test_an_adapter_can_be_merged_after_its_run(tmp_path, base):
    result = tune(tmp_path, base)
    tune(tmp_path, base, resume=True, merge=True)
    with torch.no_grad():
        out = result.model(TOKENS)
        assert torch.allclose(load_model(tmp_path / "out" / "merged")(TOKENS), out, atol=1e-5 * float(out.abs().max()))


def test_only_adapters_change(tmp_path, base):
    model = load_model(base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = tune(tmp_path, base, lora_targets=["v_proj", "layers.1.mlp.up_proj"])
    after = weights(result)
    trained = {name for name, p in result.model.named_parameters() if p.requires_grad}
    assert trained == {
        f"model.layers.{layer}.{part}.lora_{x}"
        for layer, part in ((0, "self_attn.v_proj"), (1, "self_attn.v_proj"), (1, "mlp.up_proj"))
        for x in "AB"
    }
    for name, p in before.items():
        path, _, leaf = name.rpartition(".")
        assert torch.equal(after.get(name, after.get(f"{path}.base.{leaf}")), p), name
    # a name that stands for other layers too is written whole
    stored = json.loads((result.last / "adapter_config.json").read_text())["target_modules"]
    assert stored == [
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    with pytest.raises(ValueError, match="no layer w_proj to adapt; it has down_proj, embed_tokens, gate_proj"):
        tune(tmp_path / "b", base, lora_targets=["w_proj"])


@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_qlora_is_lora_on_the_rounded_weights(tmp_path, base, form):
    """The packed base is used as its expanded values are, forward and backward; and no gradient reaches it."""
    packed = load_model(base, quantization=form)
    plain = copy.deepcopy(packed)
    for name, module in list(plain.named_modules()):
        if isinstance(module, PackedLinear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data = module.dequantize()
            plain.set_submodule(name, linear)
    for model in (packed, plain):
        torch.manual_seed(0)
        add_lora(model, LoraConfig(4))
        for _, adapter in adapters(model):
            torch.nn.init.normal_(adapter.lora_B, std=0.1)
    assert any(isinstance(m, FrozenLinear) for m in packed.modules()) and not any(
        isinstance(m, FrozenLinear) for m in plain.modules()
    )
    outs = [model(TOKENS) for model in (packed, plain)]
    torch.testing.assert_close(*outs)
    for out in outs:
        F.cross_entropy(out[0, :-1], TOKENS[0, 1:]).backward()
    grads = [{name: p.grad for name, p in model.named_parameters() if p.requires_grad} for model in (packed, plain)]
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])
    merged = merge_lora(packed)
    torch.testing.assert_close(merged(TOKENS), outs[1], rtol=1e-4, atol=1e-4)


def test_a_packed_head_that_is_the_embedding(base):
    """As a GGUF file with tied embeddings is loaded."""
    model = load_model(base)
    packed = PackedLinear.from_linear(model.lm_head, "q8_0")
    model.set_submodule("lm_head", packed)
    model.set_submodule("model.embed_tokens", PackedEmbedding(packed, torch.float32))
    add_lora(model, LoraConfig(4))
    assert isinstance(model.lm_head, torch.nn.Linear) and torch.equal(model.lm_head.weight, packed.dequantize())
    assert torch.equal(model.model.embed_tokens(TOKENS), packed.dequantize()[TOKENS])
    model(TOKENS).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_qlora_learns_and_goes_on(tmp_path, base):
    def stop(step, metrics):
        raise KeyboardInterrupt

    settings = {"quantization": "q4_0", "lora_dropout": 0.1, "precision": "bf16", "save_every": 8, "max_steps": 24}
    whole = tune(tmp_path / "a", base, **settings)
    assert sum(losses(whole)[-6:]) < sum(losses(whole)[:6])
    with pytest.raises(KeyboardInterrupt):
        fit(
            **options(tmp_path / "b", **BASE | settings, model=base, eval_data=[texts(tmp_path)], eval_every=10),
            after_evaluation=stop,
        )
    continued = tune(tmp_path / "b", base, **settings, resume=True)
    assert largest_difference(whole, continued) == 0


def test_the_head_is_trained_and_saved_too(tmp_path):
    tokenizer = wordpiece(tmp_path)
    settings = {"objective": "question-answering", "max_length": 40, "doc_stride": 8}
    start = run(
        tmp_path / "base",
        **settings,
        new_model=BERT,
        tokenizer=tokenizer,
        train_data=[squad(tmp_path, 20)],
        max_steps=1,
    )
    result = tune(tmp_path, str(start.last), **settings, train_data=[squad(tmp_path, 20)], merge=True)
    stored = json.loads((result.last / "adapter_config.json").read_text())
    assert stored["modules_to_save"] == ["qa_outputs"] and stored["task_type"] == "QUESTION_ANS"
    merged = load_model(tmp_path / "out" / "merged")
    for ours, expected in zip(merged(TOKENS), result.model(TOKENS)):
        assert torch.allclose(ours, expected, atol=1e-5)
    again = load_model(start.last)
    load_adapter(again, result.last)
    for ours, expected in zip(again(TOKENS), result.model(TOKENS)):
        assert torch.equal(ours, expected)
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.BertForQuestionAnswering.from_pretrained(start.last)
    theirs = peft.PeftModel.from_pretrained(theirs, result.last).eval()
    assert torch.allclose(theirs(TOKENS).start_logits, result.model(TOKENS)[0], atol=1e-4)


@pytest.mark.parametrize("objective", ["seq2seq", "sequence-classification", "masked-lm"])
def test_encoders_and_encoder_decoders_with_peft(tmp_path, objective):
    """What we write peft reads; reloaded and merged are what was trained; the base is what it was."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    kinds = {"seq2seq": "T5ForConditionalGeneration", "masked-lm": "BertForMaskedLM"}
    kind = getattr(transformers, kinds.get(objective, "BertForSequenceClassification"))
    model, tokenizer = (T5_CONFIG, unigram(tmp_path)) if objective == "seq2seq" else (BERT, wordpiece(tmp_path))
    rows = [{"text": t, "source": t, "target": t[:9], "label": "abc"[len(t) % 3]} for t in sentences(30)]
    settings = {"objective": objective, "train_data": [write_jsonl(tmp_path / "a.jsonl", rows)]}
    start = run(tmp_path / "base", **settings, new_model=model, tokenizer=tokenizer, max_steps=1).last
    result = tune(tmp_path, str(start), **settings, merge=True)
    args = (TOKENS, TOKENS) if objective == "seq2seq" else (TOKENS,)
    out = result.model(*args).detach()
    stored = json.loads((result.last / "adapter_config.json").read_text())
    assert stored["modules_to_save"] == {
        "sequence-classification": ["classifier", "pooler"],
        "masked-lm": ["transform"],
    }.get(objective)
    options = {"num_labels": 3} if objective == "sequence-classification" else {}
    theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(start, **options), result.last).eval()
    ids = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if objective == "seq2seq" else {})
    assert torch.allclose(theirs(**ids).logits, out, atol=1e-4)
    again = load_model(start)
    assert (again(*args) - out).abs().max() > 1e-3
    load_adapter(again, result.last)
    assert torch.equal(again(*args), out)
    merged = load_model(tmp_path / "out" / "merged")
    assert torch.allclose(merged(*args), out, atol=1e-5)
    assert torch.allclose(kind.from_pretrained(tmp_path / "out" / "merged").eval()(**ids).logits, out, atol=1e-4)
    if objective == "sequence-classification":
        assert json.loads((tmp_path / "out" / "merged" / "config.json").read_text())["id2label"] == {
            "0": "a",
            "1": "b",
            "2": "c",
        }


def test_a_tied_head_stays_the_embedding(tmp_path):
    """Neither adapters nor merging may part them, or change them."""
    base = str(run(tmp_path / "base", max_steps=5).last)
    result = tune(tmp_path, base, merge=True)
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    first, merged = (load_file(f"{folder}/model.safetensors") for folder in (base, tmp_path / "out" / "merged"))
    assert "lm_head.weight" not in merged and first.keys() == merged.keys()
    assert torch.equal(first["model.embed_tokens.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], merged["model.layers.0.mlp.up_proj.weight"])
    with torch.no_grad():
        assert torch.allclose(load_model(tmp_path / "out" / "merged")(TOKENS), result.model(TOKENS), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")  # in peft, of merging
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]])
def test_heads_and_embeddings_have_adapters(tmp_path, tied, targets):
    """What peft makes of the files, what they load as, and what they are merged into, is what was trained."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = str(run(tmp_path / "base", new_model=LLAMA | {"tie_word_embeddings": tied}, max_steps=5).last)
    result = tune(tmp_path, base, lora_targets=targets, merge=True, max_steps=16, learning_rate=5e-3)
    assert sum(losses(result)[-4:]) < sum(losses(result)[:4])
    stored = json.loads((result.last / "adapter_config.json").read_text())
    assert stored["target_modules"] == sorted(targets)
    out = result.model(TOKENS).detach()
    atol = 1e-4 * float(out.abs().max())
    assert (load_model(base)(TOKENS) - out).abs().max() > 100 * atol
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base)
    assert torch.allclose(peft.PeftModel.from_pretrained(theirs, result.last).eval()(TOKENS).logits, out, atol=atol)
    again = load_model(base)
    load_adapter(again, result.last)
    assert torch.equal(again(TOKENS), out)
    assert torch.allclose(load_model(result.last)(TOKENS), out, atol=atol)
    merged = tmp_path / "out" / "merged"
    assert torch.allclose(load_model(merged)(TOKENS), out, atol=atol)
    assert torch.allclose(transformers.AutoModelForCausalLM.from_pretrained(merged)(TOKENS).logits, out, atol=atol)


@pytest.mark.parametrize("kind", ["gpt2", "seq2seq", "masked-lm"])
def test_heads_and_embeddings_of_other_models(tmp_path, gpt2, kind):
    transformers = pytest.importorskip("transformers")
    settings = {"objective": "causal-lm" if kind == "gpt2" else kind}
    model, tokenizer, targets, theirs = {
        "gpt2": (GPT2, "char", ["lm_head", "wte"], "GPT2LMHeadModel"),
        "seq2seq": (T5_CONFIG, unigram(tmp_path), ["shared", "lm_head"], "T5ForConditionalGeneration"),
        "masked-lm": (BERT, wordpiece(tmp_path), ["word_embeddings", "decoder"], "BertForMaskedLM"),
    }[kind]
    if kind != "gpt2":
        rows = [{"text": t, "source": t, "target": t[:9]} for t in sentences(30)]
        settings["train_data"] = [write_jsonl(tmp_path / "a.jsonl", rows)]
    start = gpt2
    if kind != "gpt2":
        start = str(run(tmp_path / "base", **settings, new_model=model, tokenizer=tokenizer, max_steps=1).last)
    args = (TOKENS, TOKENS) if kind == "seq2seq" else (TOKENS,)
    ids = {"input_ids": TOKENS} | ({"decoder_input_ids": TOKENS} if kind == "seq2seq" else {})
    for names in (targets, targets[:1], targets[1:]):
        folder = tmp_path / "-".join(names)
        result = tune(folder, start, **settings, lora_targets=names, merge=True)
        out = result.model(*args).detach()
        atol = 1e-4 * float(out.abs().max())
        assert (load_model(start)(*args) - out).abs().max() > 10 * atol
        again = load_model(start)
        load_adapter(again, result.last)
        assert torch.equal(again(*args), out)
        assert torch.allclose(load_model(result.last)(*args), out, atol=atol)
        merged = folder / "out" / "merged"
        assert torch.allclose(load_model(merged)(*args), out, atol=atol)
        found = getattr(transformers, theirs).from_pretrained(merged).eval()
        assert torch.allclose(found(**ids).logits, out, atol=atol)


def test_a_packed_head_has_an_adapter(base):
    model = load_model(base, quantization="q4_0")
    packed = PackedLinear.from_linear(load_model(base).lm_head, "q8_0")
    model.set_submodule("lm_head", packed)
    model.set_submodule("model.embed_tokens", PackedEmbedding(packed, torch.float32))
    before = model(TOKENS)
    names = add_lora(model, LoraConfig(4, targets=("lm_head", "embed_tokens")))
    assert names == ["model.embed_tokens", "lm_head"]
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    out = model(TOKENS)
    assert (out - before).abs().max() > 0.01
    out.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    torch.testing.assert_close(merge_lora(model)(TOKENS), out, rtol=1e-4, atol=1e-4)


def test_checkpointing_reaches_adapters_over_a_frozen_embedding(tmp_path, base):
    plain = tune(tmp_path / "a", base, lora_dropout=0.3)
    again = tune(tmp_path / "b", base, lora_dropout=0.3, gradient_checkpointing=True)
    assert largest_difference(plain, again) == 0
    assert all(torch.count_nonzero(p) for name, p in weights(again).items() if name.endswith("lora_B"))


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA is supported"),
        ({"use_dora": True}, "an adapter with use_dora=True, which is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, "an adapter with rank_pattern="),
        ({"r": 2}, "has .*lora_A.weight of shape .*another model's adapter"),
    ],
)
def test_adapters_of_another_kind(tmp_path, base, change, sentence):
    model, config = load_model(base), LoraConfig(4)
    add_lora(model, config)
    save_adapter(model, config, tmp_path, base=base)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        load_adapter(load_model(base), tmp_path)


def test_an_adapter_of_another_model(tmp_path, base, gpt2):
    model, config = load_model(base), LoraConfig(4)
    add_lora(model, config)
    save_adapter(model, config, tmp_path, base=base)
    with pytest.raises(ValueError, match="which GPT2 does not have: another model's adapter"):
        load_adapter(load_model(gpt2), tmp_path)
    with pytest.raises(ValueError, match="has no adapter: it needs adapter_config.json"):
        load_adapter(load_model(gpt2), base)
    assert texts(tmp_path)
