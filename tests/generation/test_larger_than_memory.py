"""Models larger than the free memory: a mixture of experts stays in its mapped file, all others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import foveate
from foveate.generation import memory
from foveate.models.loading import load_model

GREEDY = foveate.SamplingParams(temperature=0.0, max_tokens=6)
CONFIG = {
    "model_type": "mixtral", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_local_experts": 4, "num_experts_per_tok": 2,
    "eos_token_id": 0, "dtype": "float32",
}  # fmt: skip


def checkpoint(folder: Path, config: dict[str, object]) -> Path:
    from foveate.models.checkpoint.reading import read_config
    from foveate.models.registry import architecture_of

    kind = architecture_of(config).model
    torch.manual_seed(0)
    weights = {}
    for name, value in kind(read_config(kind, config)).state_dict().items():
        stored = name.replace(".mlp.", ".block_sparse_moe.") if config["model_type"] == "mixtral" else name
        for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            if ".experts." in name:
                stored = stored.replace(ours, theirs)
        weights[stored] = torch.randn_like(value) * 0.2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_experts_stay_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path, CONFIG)
    expected = foveate.LLM(tmp_path, num_pages=8).generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    llm = foveate.LLM(tmp_path, num_pages=8)
    assert "larger than the free memory" in llm.runs_on
    experts = llm.model.model.layers[1].mlp.experts
    mapped = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith("model.safetensors")
    ]
    assert all(any(first <= e.down_proj.weight.data_ptr() < end for first, end in mapped) for e in experts)
    assert llm.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == expected


@pytest.mark.parametrize("options", [{"quantization": "q8_0"}, {"dtype": torch.bfloat16}])
def test_what_must_be_converted_is_refused(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, CONFIG)
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ValueError, match="of memory for its weights"):
        foveate.LLM(tmp_path, num_pages=8, **options)  # type: ignore[arg-type]


def test_a_dense_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(
        tmp_path, {key: value for key, value in CONFIG.items() if "experts" not in key} | {"model_type": "mistral"}
    )
    assert load_model(tmp_path) is not None
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    with pytest.raises(ValueError, match="of memory for its weights"):
        foveate.LLM(tmp_path, num_pages=8)
