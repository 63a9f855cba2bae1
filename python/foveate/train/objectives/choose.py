"""The objectives by name, and which architectures they are for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from foveate.files.data_files import declared_labels, read_rows
from foveate.models.registry import architecture_of, find, model_types
from foveate.tokenizer import Tokenizer
from foveate.train.config import TrainConfig
from foveate.train.objectives.base import Objective
from foveate.train.objectives.causal_lm import CausalLM
from foveate.train.objectives.classification import Classification
from foveate.train.objectives.distillation import Distillation
from foveate.train.objectives.grpo import GRPO
from foveate.train.objectives.kto import KTO
from foveate.train.objectives.labels import find_classes
from foveate.train.objectives.masked_lm import MaskedLM
from foveate.train.objectives.preferences import DPO, ORPO, SimPO
from foveate.train.objectives.question_answering import QuestionAnswering
from foveate.train.objectives.reward_model import RewardModel
from foveate.train.objectives.rewards import Reward, resolve
from foveate.train.objectives.seq2seq import Seq2Seq, SpanCorruption

DEFAULT_LENGTH = 1024
_SIMPLE: dict[str, Callable[[TrainConfig, Tokenizer, int], Objective]] = {
    "causal-lm": CausalLM, "masked-lm": MaskedLM, "question-answering": QuestionAnswering, "dpo": DPO, "simpo": SimPO, "orpo": ORPO,
    "kto": KTO, "reward": RewardModel,
}  # fmt: skip


def check_architecture(objective: str, hf_config: dict[str, Any]) -> None:
    """ValueError for a checkpoint of another architecture than the objective's."""
    kind, kinds = hf_config.get("model_type"), model_types(objectives=objective)
    if kind not in kinds:
        architecture = find(kind)
        suited = () if architecture is None else architecture.objectives
        cure = f"; {kind} models learn {' or '.join(suited)}" if suited else f"; {kind} models are not trained here yet"
        raise ValueError(
            f"the objective {objective} is for {', '.join(kinds)}, and this model is of architecture {kind!r}{cure}"
        )


def sequence_length(config: TrainConfig, hf_config: dict[str, Any]) -> int:
    """max_length, held against the model's context, of which T5 has none."""
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    positions = next((hf_config[name] for name in names if hf_config.get(name)), None)
    if not architecture_of(hf_config).limited_positions:
        positions = None
    longest = config.max_length or min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH // 2)
    if positions is not None and longest > positions:
        raise ValueError(
            f"max_length={longest} is more than the model's context of {positions} tokens; choose a lower one"
        )
    return longest


def make_objective(
    config: TrainConfig, tokenizer: Tokenizer, hf_config: dict[str, Any], rewards: Sequence[Reward] = ()
) -> Objective:
    """hf_config: the keys of config.json. rewards: of grpo, beside those that the config names."""
    length = sequence_length(config, hf_config)
    if config.objective == "sequence-classification":
        declared = declared_labels(config.train_data, config.label_field)
        found = find_classes(read_rows(config.train_data), config.label_field, known_classes(hf_config), declared or ())
        return Classification(config, tokenizer, length, found)
    if config.objective in ("seq2seq", "span-corruption"):
        kind = Seq2Seq if config.objective == "seq2seq" else SpanCorruption
        return kind(config, tokenizer, length, hf_config)
    if config.objective == "distill":
        return Distillation(config, tokenizer, length, hf_config.get("hidden_size") or hf_config.get("n_embd"))
    if config.objective == "grpo":
        return GRPO(config, tokenizer, length, [*rewards, *resolve(config.reward, config.device)])
    return _SIMPLE[config.objective](config, tokenizer, length)


def known_classes(hf_config: dict[str, Any]) -> list[str]:
    """The classes of a checkpoint that is a classifier, in the order of their numbers; [] for others, whose config may number them."""
    names = hf_config.get("id2label")
    classifier = any(str(name).endswith("ForSequenceClassification") for name in hf_config.get("architectures") or ())
    if not classifier or not isinstance(names, dict):
        return []
    return [names[i] for i in sorted(names, key=int)]
