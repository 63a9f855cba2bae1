"""A run's state, its token cache and adapters come from outside too: nothing is unpickled, nothing of another user's is trained on."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate import CheckpointError
from foveate.generation import memory
from foveate.models import load_model
from foveate.train.checkpoints.adapter import load_adapter, save_adapter
from foveate.train.data.token_store import TokenStore
from foveate.train.modules.lora import LoraConfig, add_lora
from foveate.train.strategy import Strategy
from hostile import llama_folder, put


class Hostile:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


def small():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_pickle_in_a_state_is_not_opened(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "EXECUTED")))
    with pytest.raises(CheckpointError, match="which are never opened"):
        Strategy().load_state(tmp_path, *small())
    assert not (tmp_path / "EXECUTED").exists()


def sharded_state(folder):
    from foveate.train.checkpoints import sharded

    model, optimizer = small()
    sharded.save(folder, model, optimizer, {"step": 3})
    return model, optimizer


def test_a_sharded_state_is_read_in_one_process(tmp_path):
    model, optimizer = sharded_state(tmp_path)
    other, other_optimizer = small()
    with torch.no_grad():
        other[0].weight.zero_()
    assert Strategy().load_state(tmp_path, other, other_optimizer) == {"step": 3}
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, other_optimizer.state[q][key])


def edit(places):
    places["parameter.0.weight"]["offset"] = [2, 0]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (edit, "does not fit"),
        (lambda places: places.pop("parameter.0.weight"), "does not say where its tensors belong"),
        (lambda places: places["parameter.0.weight"].update(shape="x"), r"parameter.0.weight.shape='x'; it must be a list"),
        (lambda places: places["parameter.0.weight"].update(shape=[6, 4]), "state of another model"),
        (lambda places: places["exp_avg.0.weight"].update(shape=[2**40, 4]), "which no trained parameter of this model has"),
    ],
)  # fmt: skip
def test_damaged_sharded_states(tmp_path, change, sentence):
    from safetensors import safe_open

    sharded_state(tmp_path)
    file = tmp_path / "rank-00000.safetensors"
    with safe_open(file, framework="pt") as stored:
        places = json.loads(stored.metadata()["places"])
    change(places)
    save_file(load_file(file), file, metadata={"places": json.dumps(places)})
    with pytest.raises(CheckpointError, match=sentence):
        Strategy().load_state(tmp_path, *small())


def test_a_state_without_a_ranks_file_is_not_half_read(tmp_path):
    sharded_state(tmp_path)
    file = tmp_path / "rank-00000.safetensors"
    tensors = load_file(file)
    places = {name: {"shape": list(t.shape), "offset": [0] * t.dim()} for name, t in tensors.items()}
    tensors["parameter.0.weight"] = tensors["parameter.0.weight"][:2].clone()
    save_file(tensors, file, metadata={"places": json.dumps(places)})
    with pytest.raises(CheckpointError, match="has 8 of the 12 elements of parameter.0.weight"):
        Strategy().load_state(tmp_path, *small())


@pytest.mark.parametrize("name, data", [("state.safetensors", b"x" * 50), ("state.json", b"[" * 10**5)])
def test_damaged_states(tmp_path, name, data):
    model, optimizer = small()
    Strategy().save_state(tmp_path, model, optimizer, {"step": 1})
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name):
        Strategy().load_state(tmp_path, model, optimizer)


def store(folder):
    return TokenStore.write(folder, [{"tokens": [np.arange(5, dtype=np.uint16), np.arange(3, dtype=np.uint16)]}])


@pytest.mark.parametrize("change, sentence", [
    (lambda f: (f / "tokens.bin").write_bytes(b"\7" * 16), "the bytes of tokens.bin are not those"),
    (lambda f: (f / "tokens.ends.bin").write_bytes(np.array([10**12], np.int64).tobytes()), "the bytes of tokens.ends.bin"),
    (lambda f: put(f / "columns.json", {"../../x": "uint16"}), "the bytes of columns.json"),
    (lambda f: (f / "sha256.json").unlink(), "sha256.json cannot be read"),
    (lambda f: os.chmod(f / "tokens.bin", 0o666), "with the rights 666"),
    (lambda f: os.chmod(f, 0o777), "with the rights 777"),
    (lambda f: ((f / "tokens.bin").rename(f / "x"), (f / "tokens.bin").symlink_to("x")), "tokens.bin is a link"),
    (lambda f: (f.rename(f.parent / "y"), f.symlink_to("y")), "is a link"),
])  # fmt: skip
def test_a_token_cache_is_read_as_it_was_written_or_not_at_all(tmp_path, change, sentence):
    folder = tmp_path / "entry"
    made = store(folder)
    assert TokenStore.open(folder).get("tokens", 1).tolist() == made.get("tokens", 1).tolist() == [0, 1, 2]
    change(folder)
    with pytest.raises(CheckpointError, match=sentence):
        TokenStore.open(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_token_cache_of_another_user_is_refused(tmp_path):
    store(tmp_path / "entry")
    os.chown(tmp_path / "entry", 12345, 12345)
    with pytest.raises(CheckpointError, match="belongs to user 12345"):
        TokenStore.open(tmp_path / "entry")


def test_the_rights_of_a_token_cache_do_not_follow_the_umask(tmp_path):
    before = os.umask(0)
    try:
        store(tmp_path / "entry")
    finally:
        os.umask(before)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "entry").iterdir()} == {"0o600"}


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("r", 10**9, "r=1000000000; it must be an integer from 1 to 65536"),
        ("r", 60_000, "and r=60000 in adapter_config.json"),
        ("r", None, "lacks r"),
        ("r", "2", "r='2'; it must be an integer"),
        ("lora_alpha", float("inf"), "lora_alpha=inf; it must be a number"),
        ("lora_dropout", 2, "lora_dropout=2; it must be a number from 0 to 1"),
        ("target_modules", 5, "target_modules=5"),
    ],
)
def test_adapters_of_absurd_settings(tmp_path, key, value, sentence):
    model = load_model(llama_folder(tmp_path / "m"), progress=False)
    config = LoraConfig(2)
    add_lora(model, config)
    save_adapter(model, config, tmp_path, base=None)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    put(tmp_path / "adapter_config.json", settings | {key: value})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=sentence):
        load_adapter(load_model(tmp_path / "m", progress=False), tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_memory_looks_at_the_limits_of_the_process():
    code = """
import resource, torch
from foveate.generation import memory
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), -1))
print(memory.available(torch.device("cpu")) >> 20)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 200 < int(found.stdout) <= 300


def test_memory_looks_at_the_control_groups(tmp_path):
    for folder, limit, used in (
        (tmp_path / "a/b", "max", 5),
        (tmp_path / "a", 1000, 400),
        (tmp_path / "memory/c", 900, 100),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        names = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes")
            if "memory" in folder.parts
            else ("memory.max", "memory.current")
        )
        for name, value in zip(names, (limit, used)):
            put(folder / name, str(value))
    own = put(tmp_path / "cgroup", "0::/a/b\n3:cpu:/x\n2:memory:/c\n")
    assert sorted(memory._cgroups(tmp_path, own)) == [600, 800]
