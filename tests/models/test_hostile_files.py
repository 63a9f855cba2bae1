"""Damaged and hostile model files: a CheckpointError that names file, key, value and what is allowed; little time and memory."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from pathlib import Path

import pytest
import torch

from foveate import LLM, CheckpointError, SamplingParams
from foveate.files.checked import library_errors
from foveate.models import load_model, open_checkpoint
from hostile import CONFIG, VOCAB, gguf_file, llama_folder, put, vocabulary


def generate(path: Path) -> list[int]:
    llm = LLM(path, kv_cache_bytes=1 << 20, progress=False)
    return llm.generate([[5]], SamplingParams(max_tokens=2, temperature=0))[0].outputs[0].token_ids


def test_the_whole_files_generate(tmp_path):
    assert len(generate(llama_folder(tmp_path / "m"))) == 2
    assert len(generate(gguf_file(tmp_path / "m.gguf"))) == 2


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("num_hidden_layers", 10**6, "num_hidden_layers=1000000; it must be an integer from 1 to 4096"),
        ("num_hidden_layers", 4000, "lacks layers: the config says 4000, and there are weights of 2"),
        ("num_attention_heads", 0, "num_attention_heads=0; it must be an integer"),
        ("num_attention_heads", True, "num_attention_heads=True; it must be an integer"),
        ("num_key_value_heads", 3, "has 2 query heads, which are not a multiple of its 3 KV heads"),
        ("head_dim", 15, "head_dim=15 is odd"),
        ("hidden_size", "x", "hidden_size='x'; it must be an integer"),
        ("rms_norm_eps", [1], r"rms_norm_eps=\[1\]; it must be a number from 0 to 1"),
        ("rope_theta", float("nan"), "rope_theta=nan; it must be a number"),
        ("rope_scaling", {"rope_type": "linear"}, "rope_scaling of type 'linear' lacks factor"),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}, r"rope_scaling.factor='2'; it must be a number"),
        ("torch_dtype", "load", "torch_dtype='load'; it must be one of float32"),
        ("model_type", ["llama"], r"model_type=\['llama'\]; it must be a text"),
        ("quantization_config", [1], r"quantization_config=\[1\]; it must be an object"),
        ("eos_token_id", [1, "a"], r"eos_token_id=\[1, 'a'\]; it must be an integer"),
        ("hidden_act", "x", "the activation 'x' is not one of"),
        ("vocab_size", 10**4000, "vocab_size=<|vocab_size=1000"),
    ],
)  # fmt: skip
def test_values_of_config_json(tmp_path, key, value, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        generate(llama_folder(tmp_path, **{key: value}))


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("llama.block_count", 10**6, "llama.block_count=1000000; it must be an integer from 1 to 4096"),
        ("llama.attention.head_count", 0, "head_count=0"),
        ("llama.attention.head_count", -1, "head_count=-1"),
        ("llama.embedding_length", "x", "embedding_length='x'"),
        ("split.count", ["a"], "split.count="),
        ("tokenizer.ggml.tokens", ["a"], "64 values of tokenizer.ggml.token_type for 1 tokens"),
        ("tokenizer.ggml.tokens", [b"\xff"] * VOCAB, r"tokenizer.ggml.tokens\[0\]=.*it must be a text"),
        ("tokenizer.ggml.merges", ["ab"], "the merge 'ab'; it must be two tokens with a space between"),
        ("tokenizer.ggml.merges", ["no such"], "tokenizer of .* cannot be built"),
        ("tokenizer.ggml.eos_token_id", 2**40, "eos_token_id=1099511627776"),
        ("tokenizer.ggml.pre", ["a"], "tokenizer.ggml.pre="),
        ("general.alignment", 3, "alignment"),
        ("x", struct.pack("<IIQ", 9, 12, 2**64 - 1), "an array of 18446744073709551615 values"),
        ("x", struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 0, 0), "arrays in arrays"),
    ],
)  # fmt: skip
def test_values_of_gguf_headers(tmp_path, key, value, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        generate(gguf_file(tmp_path / "a.gguf", lambda fields, tensors: fields.update({key: value})))


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"])
@pytest.mark.parametrize(
    "tensor", [([], 0, 0), ([0], 0, 0), ([32, 0], 8, 0), ([32], 8, 0), ([32, VOCAB], 0, 1), ([32, VOCAB, 1], 0, 0)]
)
def test_tensors_of_gguf_headers(tmp_path, name, tensor):
    with pytest.raises(CheckpointError):
        generate(gguf_file(tmp_path / "a.gguf", lambda fields, tensors: tensors.update({name: tensor})))


def test_small_headers_take_little_time_and_memory(tmp_path):
    """Before: hours for 100,000 dimensions and for a long token, and gigabytes for a context of 50 million."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    generate(llama_folder(tmp_path / "m", max_position_embeddings=5 * 10**7, rope_scaling=None))
    shape = [2**64 - 1] * 100_000
    with pytest.raises(CheckpointError, match="has 100000 dimensions; 1 to 4 are possible"):
        open_checkpoint(gguf_file(tmp_path / "a.gguf", lambda fields, tensors: tensors.update(junk=(shape, 0, 0))))

    def long_token(fields, tensors):
        fields |= {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0] * VOCAB}
        fields["tokenizer.ggml.tokens"] = [*vocabulary()[:-1], "a" * 300_000]

    with pytest.raises(CheckpointError, match="a token has 300000 characters"):
        open_checkpoint(gguf_file(tmp_path / "b.gguf", long_token)).tokenizer()
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024


def test_rotary_tables_grow_without_another_bit(tmp_path):
    """The tables of a long context are those of a model that has it from the start."""
    load = lambda: load_model(llama_folder(tmp_path, max_position_embeddings=20_000), progress=False)  # noqa: E731
    grown, whole = load().rotary, load().rotary
    cpu = torch.device("cpu")
    first = grown.tables(cpu, length=10)
    assert len(first[0]) == 4096
    for table, full in zip(grown.tables(cpu, length=20_000), whole.tables(cpu)):
        assert len(full) == 20_000 and torch.equal(table, full)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "dangling"])
def test_files_that_are_no_files(tmp_path, name, kind):
    file = llama_folder(tmp_path) / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "/no/such/file")
    with pytest.raises(
        CheckpointError, match="is a FIFO|is a device|is a folder|is a link to nothing|is not a model folder"
    ):
        generate(tmp_path)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    """As the cache of the Hugging Face hub lays its folders out."""
    folder = llama_folder(tmp_path / "snapshot")
    (folder / "config.json").rename(tmp_path / "blob")
    (folder / "config.json").symlink_to("../blob")
    assert len(generate(folder)) == 2


@pytest.mark.parametrize("shard", ["../own.safetensors", "/etc/passwd", "a/../../b", 5, None, "", "a\0b"])
def test_shards_stay_in_their_folder(tmp_path, shard):
    folder = llama_folder(tmp_path / "m")
    (folder / "model.safetensors").rename(tmp_path / "own.safetensors")
    put(folder / "model.safetensors.index.json", {"weight_map": {"lm_head.weight": shard}})
    with pytest.raises(
        CheckpointError, match=r"weight_map\['lm_head.weight'\]=.*it must be the name of a file in this folder"
    ):
        generate(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "text, sentence", [("[" * 100_000, "nested too deeply"), ("[]", "must hold a JSON object"), ("{", "not valid JSON")]
)
def test_json_that_is_none(tmp_path, name, text, sentence):
    put(llama_folder(tmp_path) / name, text)
    with pytest.raises(CheckpointError, match=f"{name}.*{sentence}"):
        generate(tmp_path)


def test_a_panic_of_a_library_is_a_sentence():
    class PanicException(BaseException):
        pass

    with (
        pytest.raises(CheckpointError, match=r"^x\.json is broken \(index out of range\)$"),
        library_errors("x.json is broken"),
    ):
        raise PanicException("index out of range\nbacktrace")
    with pytest.raises(KeyboardInterrupt), library_errors("x"):
        raise KeyboardInterrupt


def test_ids_beyond_the_vocabulary_end_nothing(tmp_path):
    put(llama_folder(tmp_path) / "generation_config.json", {"eos_token_id": [1, 10**6]})
    llm = LLM(tmp_path, kv_cache_bytes=1 << 20, progress=False)
    [output] = llm.generate([[5]], SamplingParams(max_tokens=3, min_tokens=2))
    assert 2 <= len(output.outputs[0].token_ids) <= 3


def test_lone_surrogates_are_named(tmp_path):
    tokenizer = open_checkpoint(llama_folder(tmp_path)).tokenizer()
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 1"):
        tokenizer.encode("A\ud800B")


def test_the_schema_takes_what_the_models_of_the_tests_have():
    from foveate.files.checked import check
    from foveate.models.checkpoint.schemas import CONFIG as SCHEMA

    check(CONFIG, SCHEMA, "x")
    assert json.dumps(CONFIG)
