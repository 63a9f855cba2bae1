"""Architectures stand in one list: a family that is added to it is loaded, exported, trained and named in errors by everything else."""

from __future__ import annotations

import pytest
from torch import nn

from foveate.files.checked import CheckpointError
from foveate.models import registry
from foveate.models.loading import model_class
from foveate.train.objectives.choose import check_architecture


def test_every_model_type_has_one_architecture():
    kinds = registry.model_types()
    assert len(kinds) == len(set(kinds)) and registry.find("llama").model is registry.find("qwen3").model
    for kind in kinds:
        assert issubclass(model_class({"model_type": kind}), nn.Module)
    for unknown in ("mamba", None, 3, []):
        assert registry.find(unknown) is None
        with pytest.raises(CheckpointError, match=r"is not supported; known are albert, arcee, bart, bert, blenderbot"):
            registry.architecture_of({"model_type": unknown})


def test_every_objective_has_an_architecture_and_refuses_the_others():
    for architecture in registry.ARCHITECTURES:
        for objective in architecture.objectives:
            for kind in registry.model_types():
                if kind in architecture.exported_as:
                    check_architecture(objective, {"model_type": kind})
                elif objective not in registry.find(kind).objectives:
                    learns = registry.find(kind).objectives
                    sentence = (
                        f"{kind} models learn {learns[0]}" if learns else f"{kind} models are not trained here yet"
                    )
                    with pytest.raises(ValueError, match=sentence):
                        check_architecture(objective, {"model_type": kind})


def test_a_new_family_needs_no_other_list(monkeypatch):
    class Other(nn.Module):
        pass

    family = registry.Architecture({"other": "OtherForCausalLM"}, Other, nn.Linear, ("causal-lm",), "foveate.LLM")
    monkeypatch.setattr(registry, "ARCHITECTURES", (*registry.ARCHITECTURES, family))
    assert model_class({"model_type": "other"}) is Other
    check_architecture("causal-lm", {"model_type": "other"})
    assert "other" in registry.model_types(objectives="causal-lm", continues_text=True)
    assert "other" not in registry.model_types(heads=True)
