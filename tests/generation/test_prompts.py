"""What LLM takes: prompts in whatever holds ids, conversations and template switches against transformers, names of dtypes, paths."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import torch

from foveate import LLM, SamplingParams
from foveate.cli import main
from foveate.models import load_model, open_checkpoint

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
PARAMS = SamplingParams(max_tokens=3, temperature=0)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if tools is not none %}[{{ tools | length }}]{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<no>{% endif %}{% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate([*specials, *alphabet])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(specials)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    backend.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def llm(folder):
    return LLM(folder, num_pages=64)


@pytest.mark.parametrize("prompts", [
    np.array([5, 6, 7]), [np.int64(5), np.int64(6), np.int64(7)], [np.array([5, 6, 7])], torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]]),
    (5, 6, 7), [(5, 6, 7)], [range(5, 8)], {"prompt_token_ids": [5, 6, 7]}, [{"prompt_token_ids": np.array([5, 6, 7])}],
    ([5, 6, 7] for _ in range(1)),
], ids=lambda value: type(value).__name__)  # fmt: skip
def test_ids_in_whatever_holds_them(llm, prompts):
    [expected] = llm.generate([[5, 6, 7]], PARAMS)
    [found] = llm.generate(prompts, PARAMS)
    assert found.prompt_token_ids == [5, 6, 7] and found.outputs[0].token_ids == expected.outputs[0].token_ids


def test_texts_in_objects_and_encodings(llm):
    [expected] = llm.generate("abc", PARAMS)
    for prompts in (
        {"prompt": "abc"},
        [{"prompt": "abc"}],
        llm.tokenizer.backend.encode("abc"),
        [llm.tokenizer.backend.encode("abc")],
    ):
        [found] = llm.generate(prompts, PARAMS)
        assert found.prompt_token_ids == expected.prompt_token_ids


@pytest.mark.parametrize("prompts", [
    None, b"abc", {5, 6}, 5, [[5.0]], [[True, 5]], [[[5]]], {"text": "a"}, [None], torch.tensor([0.5]),
], ids=str)  # fmt: skip
def test_what_is_no_prompt_is_refused(llm, prompts):
    with pytest.raises(TypeError, match="^a prompt must be a str, token ids"):
        llm.generate(prompts, PARAMS)


@pytest.mark.parametrize("switches", [
    {}, {"enable_thinking": False}, {"tools": [{"type": "function"}]}, {"add_generation_prompt": False},
    {"chat_template": "{{ messages[0].content }}"},
], ids=str)  # fmt: skip
def test_templates_get_what_transformers_gives_them(folder, llm, switches):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True} | switches
    expected = theirs.encode(theirs.apply_chat_template(USER, tokenize=False, **options), add_special_tokens=False)
    assert llm.encode_chat(USER, **switches) == expected
    assert llm.chat(USER, PARAMS, **switches).prompt_token_ids == expected
    assert llm.chat(USER, PARAMS, chat_template_kwargs=switches).prompt_token_ids == expected


@pytest.mark.parametrize("content", ["Sure", "Sure, ", "a\n"])
@pytest.mark.parametrize("trim", [False, True])
def test_a_last_message_is_continued(folder, llm, content, trim):
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [*USER, {"role": "assistant", "content": content}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    if trim:
        options["chat_template"] = TEMPLATE.replace("m['content']", "m['content'] | trim")
    expected = theirs.apply_chat_template(messages, tokenize=False, **options)
    assert llm.tokenizer.apply_chat_template(messages, **options) == expected and "Sure" in expected + "Sure" * (
        content == "a\n"
    )
    with pytest.raises(ValueError, match="pass add_generation_prompt=False"):
        llm.chat(messages, PARAMS, continue_final_message=True)


def test_several_conversations_and_what_is_none(llm):
    other = [{"role": "user", "content": "Bye"}]
    alone = [llm.chat(messages, PARAMS) for messages in (USER, other)]
    together = llm.chat([USER, other], PARAMS)
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]
    for messages, kind, sentence in (
        ("Hi", TypeError, "messages must be a list"),
        (USER[0], TypeError, "messages must be a list"),
        (["Hi"], TypeError, "message 0 is a str"),
        ([{"content": "Hi"}], ValueError, "message 0 names no role"),
        ([*USER, {"role": "user"}], ValueError, "message 1 of 'user' holds no content"),
        ([], ValueError, "messages is empty"), ([USER, []], ValueError, "messages is empty"),
    ):  # fmt: skip
        with pytest.raises(kind, match=sentence):
            llm.chat(messages, PARAMS)
    with pytest.raises(ValueError, match="only one can be streamed"):
        llm.chat([USER, other], stream=True)


@pytest.mark.parametrize("name, dtype", [
    ("bfloat16", torch.bfloat16), ("auto", torch.float32), ("float16", torch.float16), ("torch.float32", torch.float32),
    ("half", torch.float16),
])  # fmt: skip
def test_dtypes_by_name(folder, name, dtype):
    assert next(load_model(folder, dtype=name).parameters()).dtype is dtype
    assert LLM(folder, dtype=name, num_pages=8).generate("a", PARAMS)


def test_arguments_of_other_kinds_are_said(folder, tmp_path):
    for options, kind, sentence in (
        ({"dtype": "int4"}, ValueError, "dtype='int4' is not one of float32"),
        ({"dtype": torch.int8}, ValueError, "dtype=torch.int8 cannot hold weights"),
        ({"dtype": 16}, TypeError, "dtype=16 is a int"),
        ({"max_model_len": "64"}, TypeError, "max_model_len='64' is a str; it must be an integer"),
        ({"max_batch": 0}, ValueError, "max_batch=0 must be 1 or more"),
    ):  # fmt: skip
        with pytest.raises(kind, match=sentence):
            LLM(folder, **options)
    for path, kind, sentence in (
        (None, TypeError, "the path of a model is None"), ("", TypeError, "the path of a model is ''"),
        ("owner/name", FileNotFoundError, "hf download owner/name"),
    ):  # fmt: skip
        with pytest.raises(kind, match=sentence):
            open_checkpoint(path)


def test_paths_within_a_folder_and_the_hubs_cache(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        assert open_checkpoint(folder / name).path == folder
    cache = tmp_path / "models--me--tiny"
    (cache / "blobs").mkdir(parents=True)
    for commit in ("abc", "def"):
        (cache / "snapshots" / commit).mkdir(parents=True)
    for i, file in enumerate(folder.iterdir()):
        shutil.copy(file, cache / "blobs" / str(i))
        os.symlink(cache / "blobs" / str(i), cache / "snapshots" / "abc" / file.name)
    with pytest.raises(ValueError, match="snapshots holds abc, def; give the path of one"):
        open_checkpoint(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert open_checkpoint(cache).path == cache / "snapshots" / "abc"


@pytest.mark.parametrize("key, value, name", [
    ("quantization", {"bits": 4}, "mlx"), ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    (None, "quantize_config.json", "gptq"), (None, "quant_config.json", "awq"),
])  # fmt: skip
def test_weights_quantised_by_others_are_named(folder, tmp_path, key, value, name):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if key is None:
        (tmp_path / value).write_text("{}")
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=f"is quantised by '{name}' by its config, and none of its weights are"):
        load_model(tmp_path)


def test_settings_that_cannot_be_followed_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.0}))
    with pytest.raises(ValueError, match="generation_config.json cannot be followed: top_p=0.0"):
        LLM(tmp_path)


def test_the_command_line_keeps_the_checkpoints_settings(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "top_k": 50.0}))
    assert LLM(tmp_path, num_pages=8).default_params.top_k == 50
    for more, count in (([], 3), (["--max-tokens", "5"], 5)):
        assert (
            main(
                [
                    "generate",
                    "--model",
                    str(tmp_path),
                    "--prompt",
                    "Hi",
                    "--json",
                    "--num-pages",
                    "32",
                    "--ignore-eos",
                    *more,
                ]
            )
            == 0
        )
        found = json.loads(capsys.readouterr().out)["outputs"][0]["completions"][0]
        assert len(found["token_ids"]) == count
