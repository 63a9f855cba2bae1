"""A folder with a LoRA adapter where a model is meant: the logits and texts are peft's."""

from __future__ import annotations

import json

import pytest
import torch

import foveate
import generation_toys as toys
from foveate.cli import main
from foveate.models import load_model, open_checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of peft with its own parts
IDS = torch.tensor([[5, 9, 2, 33, 17, 4, 8]])


def llama(folder, tied=True):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, tie_word_embeddings=tied,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def gpt2(folder):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder)


def adapter(model, folder, **options):
    """An adapter with updates that matter, and the model with it."""
    found = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, **options))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.normal_(0, 0.2)
    found.save_pretrained(folder)
    return found.eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["embed_tokens", "down_proj"]},
        {"target_modules": ["lm_head", "o_proj"]},
    ],
    ids=["attention", "all", "embedding", "head"],
)
def test_logits_are_pefts(tmp_path, options, tied):
    expected = adapter(llama(tmp_path / "base", tied), tmp_path / "adapter", **options)(IDS).logits
    found = load_model(tmp_path / "adapter")
    torch.testing.assert_close(found(IDS), expected, atol=1e-4, rtol=1e-4)
    assert (load_model(tmp_path / "base")(IDS) - expected).abs().max() > 0.01


def test_weights_that_are_stored_the_other_way_round(tmp_path):
    model = adapter(
        gpt2(tmp_path / "base"), tmp_path / "adapter", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    torch.testing.assert_close(load_model(tmp_path / "adapter")(IDS), model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_a_classifier_of_the_adapter(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = adapter(base, tmp_path / "adapter", target_modules=["query", "value"], task_type="SEQ_CLS")
    checkpoint = open_checkpoint(tmp_path / "adapter")
    assert checkpoint.config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    found = load_model(checkpoint, head="sequence-classification")
    assert found.config.num_labels == 3
    expected = model(IDS).logits
    torch.testing.assert_close(found(IDS, torch.zeros_like(IDS)), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A base with its tokenizer, and an adapter of it."""
    place = tmp_path_factory.mktemp("toy")
    (place / "base").mkdir()
    toys.folder(place / "base")
    model = load_model(place / "base")
    from foveate.train import LoraConfig, add_lora, merge_lora, save_adapter

    (place / "adapter").mkdir()
    config = LoraConfig(rank=4)
    add_lora(model, config)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.normal_(0, 0.3)
    save_adapter(model, config, place / "adapter", base=str(place / "base"))
    merge_lora(model)
    return place, model


def test_text_on_the_command_line(toy, capsys, tmp_path):
    place, merged = toy
    options = ["--prompt", "the quick", "--temperature", "0", "--max-tokens", "8", "--num-pages", "8"]
    assert main(["generate", "--model", str(place / "adapter"), *options]) == 0
    adapted = capsys.readouterr().out
    llm = foveate.LLM(place / "adapter", num_pages=8)
    [output] = llm.generate("the quick", foveate.SamplingParams(temperature=0.0, max_tokens=8))
    assert adapted == output.outputs[0].text + "\n"
    ids = llm.encode("the quick")
    torch.testing.assert_close(
        load_model(place / "adapter")(torch.tensor([ids])), merged(torch.tensor([ids])), atol=1e-4, rtol=1e-4
    )
    # the base can be elsewhere than the adapter says
    settings = json.loads((place / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "org/gone"})
    )
    (tmp_path / "moved" / "adapter_model.safetensors").write_bytes(
        (place / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    moved = ["generate", "--model", str(tmp_path / "moved"), *options]
    assert main(moved) == 1 and "an adapter of org/gone, which is neither a file" in capsys.readouterr().err
    assert main([*moved, "--base", str(place / "base")]) == 0 and capsys.readouterr().out == adapted
    beside = ["generate", "--model", str(place / "base"), "--adapter", str(tmp_path / "moved"), *options]
    assert main(beside) == 0 and capsys.readouterr().out == adapted
    assert (
        main([*beside, "--base", str(place / "base")]) == 1
        and "goes with the path of its base" in capsys.readouterr().err
    )
    assert main(["generate", "--model", str(place / "base"), "--base", "x", *options]) == 1
    assert "is for an adapter, and" in capsys.readouterr().err


def test_packing_comes_after_the_update(tmp_path):
    expected = adapter(llama(tmp_path / "base"), tmp_path / "adapter", target_modules=["q_proj", "down_proj"])(
        IDS
    ).logits
    packed = load_model(tmp_path / "adapter", quantization="q8_0")(IDS)
    plain = load_model(tmp_path / "base")(IDS)
    assert (packed - expected).abs().max() < 0.1 * (plain - expected).abs().max()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"peft_type": "IA3"}, "of type 'IA3'; only LORA"),
        ({"r": 7}, "that fits it, of rank 7"),
        ({"r": "x"}, "r"),
    ],
)
def test_adapters_that_mean_something_else(toy, tmp_path, change, sentence):
    place, _ = toy
    settings = json.loads((place / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | change))
    (tmp_path / "adapter_model.safetensors").write_bytes((place / "adapter" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=sentence):
        load_model(tmp_path)


def phi3(folder):
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.Phi3ForCausalLM(config).save_pretrained(folder)
    return transformers.Phi3ForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "make, some",
    [
        (llama, ["q_proj", "v_proj", "down_proj"]), (gpt2, ["c_attn", "c_proj"]), (phi3, ["qkv_proj", "down_proj"]),
    ],
    ids=["llama", "gpt2", "phi3"],
)  # fmt: skip
def test_beside_the_base_in_one_batch(tmp_path, make, some):
    """The log-probabilities of peft's models, several of them and none in each step; phi3's are of matrices that are several here."""
    base = make(tmp_path / "base").eval()
    models = {None: base}
    for name, targets in {"all": "all-linear", "some": some}.items():
        model = type(base).from_pretrained(tmp_path / "base")
        models[name] = adapter(model, tmp_path / name, target_modules=targets, task_type="CAUSAL_LM")
    llm = foveate.LLM(tmp_path / "base", num_pages=64, progress=False)
    for name in ("all", "some"):
        llm.load_adapter(name, tmp_path / name)
        assert llm.engine.adapters[name].native is not None  # they run in the native decoder
    params = foveate.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    asked = [(prompt, name) for prompt in ([5, 6, 7], [9, 200, 44, 3, 8]) for name in models]
    for i, (prompt, name) in enumerate(asked):
        llm.engine.add(str(i), prompt, params, adapter=name)
    found = toys.drain(llm.engine)
    for i, (prompt, name) in enumerate(asked):
        [sample] = found[str(i)].outputs
        with torch.no_grad():
            logits = models[name](input_ids=torch.tensor([prompt + sample.token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.token_ids)[:, None])[:, 0]
        mine = torch.tensor([entry[t].logprob for t, entry in zip(sample.token_ids, sample.logprobs)])
        torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)
        assert logits.argmax(-1).tolist() == sample.token_ids
