"""Loading: shards, dtypes, prefixes, ties, quantisation, packages, the progress bar, and a sentence for all that can be wrong."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

import foveate
from foveate.models import load_model, loading, open_checkpoint
from foveate.nn import PackedLinear
from model_cases import assert_logits_close, randomize

pytestmark = pytest.mark.usefixtures("one_thread")

LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved Llama, untied."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    randomize(model)
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def rewrite(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


TOKENS = torch.arange(12)[None]


def test_shards_are_one_model(folder: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path / "sharded")(TOKENS), load_model(folder)(TOKENS))


def test_dtype_is_the_checkpoints_or_the_one_asked_for(folder: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder).to(torch.bfloat16)
    model.save_pretrained(folder)
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_model(folder, dtype=torch.float32).parameters()} == {torch.float32}
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config))
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.bfloat16}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    assert {p.dtype for p in load_model(folder).parameters()} == {torch.float16}


def test_the_model_is_in_eval_mode_and_can_be_trained(folder: Path) -> None:
    model = load_model(folder)
    assert not model.training and all(p.requires_grad and not p.is_meta for p in model.parameters())
    before = (folder / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_names_without_the_prefix_and_stored_masks_load(tmp_path: Path) -> None:
    """The GPT-2 checkpoint on the hub: no `transformer.`, and the causal masks among the weights."""
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    weights = {name.removeprefix("transformer."): w for name, w in load_file(tmp_path / "model.safetensors").items()}
    weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32) for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_logits_close(load_model(tmp_path)(TOKENS), model(TOKENS).logits)


@pytest.mark.parametrize("tied", [False, True])
def test_quantization_packs_every_linear_and_a_tied_head(tied: bool, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))
    randomize(model)
    model.save_pretrained(tmp_path)
    ours, exact = load_model(tmp_path, quantization="q8_0"), load_model(tmp_path, quantization="none")
    assert not any(isinstance(m, torch.nn.Linear) for m in ours.modules())
    assert sum(isinstance(m, PackedLinear) for m in ours.modules()) == 2 * 7 + 1
    assert torch.equal(ours.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    with torch.no_grad():
        difference = (ours(TOKENS) - exact(TOKENS)).abs().max()
        assert 0 < difference < 0.05 * exact(TOKENS).abs().max()


def test_four_bits_leave_the_head_at_eight(folder: Path) -> None:
    formats = {
        name: m.format
        for name, m in load_model(folder, quantization="q4_0").named_modules()
        if isinstance(m, PackedLinear)
    }
    assert formats.pop("lm_head") == "q8_0"
    assert set(formats.values()) == {"q4_0"}


def test_widths_that_blocks_do_not_divide_are_refused(folder: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(LLAMA | {"intermediate_size": 40})))
    model.save_pretrained(tmp_path / "odd")
    with pytest.raises(
        ValueError, match=r"model.layers.0.mlp.down_proj has 40 input features, but q4_0 packs blocks of 32"
    ):
        load_model(tmp_path / "odd", quantization="q4_0")
    with pytest.raises(ValueError, match="quantization='int3' is not one of None, 'none', 'q8_0', 'q4_0', 'q4_1'"):
        load_model(folder, quantization="int3")


def test_config_in_the_older_form_gives_the_same_model(folder: Path) -> None:
    """rope_theta and rope_scaling at the top, as written before transformers 5."""
    new = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    edit_config(folder, rope_parameters=new)
    expected = load_model(folder)(TOKENS)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    old = {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (folder / "config.json").write_text(json.dumps(config | old))
    assert torch.equal(load_model(folder)(TOKENS), expected)
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500.0}))
    assert not torch.equal(load_model(folder)(TOKENS), expected)


def test_missing_unexpected_and_misshapen_weights_are_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    rewrite(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"tiny lacks model.layers.1.mlp.up_proj.weight, which Llama needs"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.q_proj.lora": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"tiny has model.layers.0.self_attn.q_proj.lora, which Llama does not know"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(whole)
    rewrite(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(folder)  # derived from the config, stored by old versions
    rewrite(folder, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(48, 32)}))
    with pytest.raises(
        ValueError, match=r"1.mlp.up_proj.weight in .*tiny has shape \[48, 32\], the config asks for \[64, 32\]"
    ):
        load_model(folder)


def test_wrong_configs_are_named(folder: Path) -> None:
    edit_config(folder, model_type="mamba")
    with pytest.raises(
        ValueError,
        match=r"the architecture 'mamba' .* is not supported; known are .*gpt2, .*llama, .*ministral, .*qwen2",
    ):
        load_model(folder)
    edit_config(folder, model_type="llama", hidden_size=None)
    with pytest.raises(ValueError, match="the config of this llama has no 'hidden_size'"):
        load_model(folder)
    edit_config(folder, hidden_size=32, rope_parameters={"rope_type": "spiral", "factor": 2.0})
    with pytest.raises(
        ValueError,
        match="rope_scaling of type 'spiral' is not supported; known are default, linear, dynamic, llama3, yarn",
    ):
        load_model(folder)
    edit_config(folder, rope_parameters={"rope_type": "default"}, hidden_act="mish")
    with pytest.raises(ValueError, match="the activation 'mish' is not one of silu"):
        load_model(folder)
    edit_config(folder, hidden_act="silu", model_type="llama")
    with pytest.raises(
        ValueError, match="head='question-answering' is for encoders such as BERT, .* this llama is a LlamaForCausalLM"
    ):
        load_model(folder, head="question-answering")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="tiny is quantised by 'gptq' by its config, and none of its weights are"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        open_checkpoint(folder)


def test_truncated_safetensors_are_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(
            ValueError, match=r"model.safetensors is truncated or not a safetensors file .* download it again"
        ):
            load_model(folder)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    second = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(ValueError, match=rf"index.json names {second.name}, which is not there"):
        load_model(tmp_path / "sharded")


def test_pickles_are_never_opened(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="tiny has no weights: neither model.safetensors nor model.safetensors.index.json"
    ):
        load_model(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle, .* is never opened here; convert it once"):
        load_model(folder)
    with pytest.raises(ValueError, match="is a pickle"):
        open_checkpoint(folder / "pytorch_model.bin")


def test_an_adapter_needs_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some-base"}')
    with pytest.raises(
        FileNotFoundError, match="an adapter of some-base, which is neither a file or folder .* as base"
    ):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="which is an adapter too; name a model as base"):
        open_checkpoint(tmp_path, base=tmp_path)


def test_what_is_no_model_is_said_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="no/such/thing is neither a file or folder here nor the name of an installed"
    ):
        open_checkpoint("no/such/thing")
    with pytest.raises(ValueError, match="is not a model folder: it has no config.json and no .gguf file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="holds weights only; give its folder .*, with the config.json"):
        open_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="notes.txt is not a model: it does not start with 'GGUF'"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="the package safetensors in .* holds neither a config.json nor a .gguf file"):
        open_checkpoint("safetensors")
    for name in ("a", "b"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="holds several models, a.gguf, b.gguf; give the path of one"):
        open_checkpoint(tmp_path)


def test_a_package_is_searched_one_folder_deep_and_never_imported(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    folder.rename(package / "model")
    monkeypatch.syspath_prepend(tmp_path)
    checkpoint = open_checkpoint("some_weights")
    assert checkpoint.path == package / "model" and checkpoint.config["model_type"] == "llama"
    assert checkpoint.tokenizer() is None and checkpoint.chat_template is None
    assert checkpoint.generation_config["eos_token_id"] == 2
    assert "some_weights" not in sys.modules


def test_progress_only_when_asked_for_or_in_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model(folder)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    load_model(folder, progress=True)
    captured = capsys.readouterr()
    assert "loading tiny" in captured.err and captured.out == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load_model(folder)
    assert capsys.readouterr().err == ""  # a second's work needs no bar
    monkeypatch.setattr("foveate.models.loading._LARGE", 1000)
    load_model(folder)
    assert "loading tiny" in capsys.readouterr().err
    load_model(folder, progress=False)
    assert capsys.readouterr().err == ""


def test_the_package_stays_light() -> None:
    import subprocess

    code = "import sys, foveate; print([m for m in ('safetensors', 'tokenizers', 'gguf', 'jinja2', 'rich') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert foveate.__version__


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"the device cuda cannot be used here: .*; choose device='cpu'"):
        loading.checked_device("cuda")
