"""What an export keeps of its base: dtype, settings of generation and of the tokenizer, packed weights; adapters that go on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_lora import TOKENS, tune
from test_train_lora import base as base

from foveate.models import load_model
from train_toys import losses, run, sentences, texts, write_jsonl

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = {"lora_rank": 0, "max_steps": 1}


@pytest.mark.parametrize("quantization", ["q4_0", "q8_0"])
def test_a_merged_model_is_the_one_that_was_trained_on_packed_weights(tmp_path, quantization):
    """Also where the head is tied: the packed head is not the embedding any more."""
    first = str(run(tmp_path / "base", max_steps=20, new_model=TIED).last)
    result = tune(tmp_path, first, quantization=quantization, merge=True)
    merged = load_model(tmp_path / "out" / "merged")
    with torch.no_grad():
        trained, plain = result.model(TOKENS), load_model(first)(TOKENS)
    assert torch.allclose(merged(TOKENS), trained, atol=1e-5 * float(trained.abs().max()))
    assert not torch.allclose(plain, trained, atol=1e-2)


TIED = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def in_dtype(base: str, folder, dtype: torch.dtype) -> str:
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("state"))
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value.to(dtype) for name, value in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return str(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exports_have_the_dtype_of_their_base(tmp_path, base, dtype):
    model = in_dtype(base, tmp_path / "half", dtype)
    result = tune(tmp_path / "full", model, **FULL)
    merged = tune(tmp_path / "lora", model, merge=True).last.parent / "merged"
    for folder in (result.last, merged):
        assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {dtype}
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    again = tune(tmp_path / "full", model, **FULL | {"max_steps": 2}, resume=True)  # goes on in float32
    whole = tune(tmp_path / "whole", model, **FULL | {"max_steps": 2})
    assert again.steps == whole.steps == 2 and next(again.model.parameters()).dtype == torch.float32


def test_exports_keep_settings_of_generation_and_tokenizer(tmp_path, base):
    folder = tmp_path / "model"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("state"))
    generation = {
        "eos_token_id": [2, 5],
        "temperature": 0.2,
        "top_p": 0.9,
        "repetition_penalty": 1.1,
        "do_sample": True,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {
        "model_max_length": 48,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    out = tune(tmp_path / "full", str(folder), **FULL).last
    found = json.loads((out / "generation_config.json").read_text())
    assert {name: found[name] for name in generation} == generation
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert {name: found[name] for name in settings} == settings


def test_an_adapter_goes_on_with_other_data(tmp_path, base):
    """From where it was, not from nothing."""
    first = tune(tmp_path / "a", base, train_data=[texts(tmp_path, 16)], max_steps=20)
    other = write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in sentences(16)])
    more = tune(tmp_path / "b", str(first.last), train_data=[other], max_steps=1, learning_rate=1e-9)
    fresh = tune(tmp_path / "c", base, train_data=[other], max_steps=1, learning_rate=1e-9)
    assert losses(more)[0] < losses(fresh)[0] - 0.1
    with torch.no_grad():
        assert torch.allclose(more.model(TOKENS), first.model(TOKENS), atol=1e-3)
    settings = json.loads((more.last / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base and settings["r"] == 4
    others = {
        "lora_rank": (2, "lora_rank=4, not 2"), "lora_alpha": (3.0, "lora_alpha=8.0, not 3.0"),
        "quantization": ("q8_0", "quantization=None, not 'q8_0'"),
    }  # fmt: skip
    for name, (value, sentence) in others.items():
        with pytest.raises(ValueError, match=sentence):
            tune(tmp_path / "d", str(first.last), **{name: value})
    with pytest.raises(ValueError, match="is an adapter, of rank 4; train it on with lora_rank=4"):
        tune(tmp_path / "e", str(first.last), lora_rank=0)
