"""GGUF files in parts, as llama-gguf-split cuts them: the same model as the whole file, and parts that do not belong together."""

from __future__ import annotations

import shutil

import gguf
import pytest
import torch

import foveate
from foveate.files.checked import CheckpointError
from foveate.models import convert, load_model, open_checkpoint
from gguf_files import split, write_llama

TENSORS = 11
HALVES = (6, 5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("whole") / "toy.gguf", rest=gguf.GGMLQuantizationType.Q8_0)


def tokens(path):
    llm = foveate.LLM(path, num_pages=8, progress=False)
    params = foveate.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    return [output.outputs[0].token_ids for output in llm.generate([[5, 6, 7], [9]], params)]


def same_weights(one, other):
    one, other = load_model(one).state_dict(), load_model(other).state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("sizes", [HALVES, (4, 4, 3), (0, 11)], ids=str)
def test_any_part_and_their_folder_are_the_whole_model(sizes, whole, tmp_path):
    paths = split(whole, sizes, tmp_path / "parts")
    expected = tokens(whole)
    assert tokens(paths[0]) == tokens(tmp_path / "parts") == expected
    for path in paths:
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == paths[0] and checkpoint.weights().nbytes == open_checkpoint(whole).weights().nbytes
        assert same_weights(path, whole)


def test_links_of_the_hubs_cache_are_followed(whole, tmp_path):
    snapshot = tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(split(whole, HALVES, tmp_path / "blobs")):
        (snapshot / path.name).symlink_to(path.rename(tmp_path / "blobs" / str(i)))
    assert same_weights(tmp_path, whole)


def test_parts_that_the_gguf_library_writes(whole, tmp_path):
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama", split_max_tensors=4)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), field.types[0], kind)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert len(list(tmp_path.iterdir())) == 3
    assert same_weights(tmp_path, whole)


def test_missing_parts_are_named(whole, tmp_path):
    paths = split(whole, (4, 4, 3), tmp_path)
    paths[1].unlink()
    for path in (paths[0], paths[2], tmp_path):
        with pytest.raises(CheckpointError, match=r"lacks toy-00002-of-00003.gguf; download what is missing into that"):
            open_checkpoint(path)


def test_many_missing_parts_are_counted(whole, tmp_path):
    [_, *others] = split(whole, (1,) * TENSORS, tmp_path)
    for path in others:
        path.unlink()
    with pytest.raises(CheckpointError, match=r"lacks toy-00002.*toy-00005-of-00011.gguf and 6 more; download"):
        open_checkpoint(tmp_path)


def test_a_damaged_part_is_named(whole, tmp_path):
    paths = split(whole, HALVES, tmp_path)
    data = paths[1].read_bytes()
    paths[1].write_bytes(data[:-64])
    with pytest.raises(CheckpointError, match="toy-00002-of-00002.gguf is truncated or damaged"):
        open_checkpoint(paths[0])
    paths[1].write_bytes(b"GGML" + data[4:])
    with pytest.raises(CheckpointError, match="toy-00002-of-00002.gguf is not a GGUF file"):
        open_checkpoint(paths[0])


@pytest.mark.parametrize("changes, sentence", [
    ({(1, "split.no"): 0}, "00002-of-00002.gguf has split.no=0, and a part of .* in its place has 1"),
    ({(1, "split.no"): None}, "00002-of-00002.gguf has split.no=None"),
    ({(1, "split.count"): 3}, "00002-of-00002.gguf has split.count=3, and .* has 2"),
    ({(1, "split.count"): "x"}, "00002-of-00002.gguf has split.count='x'; it must be an integer"),
    ({(1, "split.tensors.count"): 12}, "00002-of-00002.gguf has split.tensors.count=12, and .* has 11: it is of another model"),
    ({(1, "general.architecture"): "qwen2"}, "general.architecture='qwen2', and .* has 'llama': it is of another model"),
    ({(0, "split.tensors.count"): 12, (1, "split.tensors.count"): 12}, "have 11 tensors, and split.tensors.count=12"),
    ({(0, "split.tensors.count"): None}, "00001-of-00002.gguf lacks split.tensors.count"),
    ({(0, "split.no"): None}, "00001-of-00002.gguf is one of 2 parts of a model and lacks split.no"),
    ({(0, "split.no"): 1}, "is part 2 of 2 of a model by its metadata, and not by its name"),
    ({(0, "split.count"): 3}, "is part 1 of 3 of a model by its metadata, and not by its name"),
], ids=str)  # fmt: skip
def test_parts_that_contradict_each_other_are_refused(changes, sentence, whole, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(split(whole, HALVES, tmp_path, changes)[0])


def test_a_tensor_in_two_parts_is_refused(whole, tmp_path):
    paths = split(whole, HALVES, tmp_path)
    other = split(whole, (0, TENSORS), tmp_path / "other")
    shutil.copy(other[1], paths[1])
    with pytest.raises(CheckpointError, match="00002-of-00002.gguf has the tensor .* which a part before it has too"):
        open_checkpoint(paths[0])


def test_a_renamed_part_is_refused(whole, tmp_path):
    path = split(whole, HALVES, tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="name the parts as they were published, NAME-00001-of-00002.gguf"):
        open_checkpoint(path)


def test_a_folder_with_two_split_models_asks_for_one(whole, tmp_path):
    split(whole, HALVES, tmp_path)
    split(whole, (4, 4, 3), tmp_path)
    with pytest.raises(CheckpointError, match="holds several models"):
        open_checkpoint(tmp_path)
    assert same_weights(tmp_path / "toy-00002-of-00003.gguf", whole)


def test_convert_joins_parts_and_leaves_them_alone(whole, tmp_path):
    paths = split(whole, (0, 6, 5), tmp_path / "parts")
    joined = convert(paths[1], tmp_path / "joined.gguf", progress=False)
    assert same_weights(joined, whole)
    assert not any(key.startswith("split.") for key in gguf.GGUFReader(joined).fields)
    with pytest.raises(ValueError, match="is the model itself"):
        convert(paths[0], paths[2], force=True, progress=False)
    assert same_weights(paths[0], whole)
