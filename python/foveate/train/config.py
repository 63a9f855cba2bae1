"""TrainConfig: every choice of a training run, checked before anything is read. Its help texts are those of `foveate train --help`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.quantization.names import QUANTISABLE
from foveate.train.schedule import SCHEDULES

OBJECTIVES = (
    "causal-lm", "masked-lm", "span-corruption", "seq2seq", "question-answering", "sequence-classification", "dpo", "simpo", "orpo", "kto",
    "reward", "grpo", "distill",
)  # fmt: skip
# What of an objective there are several kinds of; the first is the default.
LOSS_TYPES: dict[str, tuple[str, ...]] = {
    "dpo": ("sigmoid", "hinge", "ipo"), "grpo": ("grpo", "dapo", "dr_grpo"), "distill": ("forward-kl", "reverse-kl", "jsd"),
}  # fmt: skip
# beta where none is given.
_BETAS = {"dpo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1, "grpo": 0.04, "distill": 0.5}
REFERENCES = ("precomputed", "live")
SAMPLERS = ("tpe", "random", "grid")  # of a search

_BY_TOKENS = ("causal-lm", "masked-lm", "span-corruption", "seq2seq")
# Options that only these objectives read.
_ONLY_FOR = {
    "mask_share": ("masked-lm", "span-corruption"), "whole_word": ("masked-lm",), "span_length": ("span-corruption",),
    "doc_stride": ("question-answering",), "label_field": ("sequence-classification",),
    "class_weights": ("sequence-classification",), "loss_type": tuple(LOSS_TYPES), "beta": tuple(_BETAS), "gamma": ("simpo",),
    "desirable_weight": ("kto",), "undesirable_weight": ("kto",), "reference": ("dpo", "kto"), "center_rewards": ("reward",),
    "teacher": ("distill",), "temperature": ("distill", "grpo"), "teacher_top_k": ("distill",), "hidden_weight": ("distill",),
    "label_weight": ("distill",), "reward": ("grpo",), "num_generations": ("grpo",), "max_completion_length": ("grpo",),
    "num_iterations": ("grpo",), "epsilon": ("grpo",), "epsilon_high": ("grpo",), "scale_rewards": ("grpo",),
    "label_smoothing": (*_BY_TOKENS, "question-answering", "sequence-classification", "dpo", "simpo"),
    "z_loss": (*_BY_TOKENS, "question-answering", "sequence-classification"),
}  # fmt: skip
_REWARDS = (
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)
# What evaluation measures beside the loss, by which `best_by` may choose; of all but perplexity more is better.
METRICS: dict[str, tuple[str, ...]] = {
    "causal-lm": ("perplexity",), "masked-lm": ("perplexity", "accuracy"), "span-corruption": ("perplexity",),
    "seq2seq": ("perplexity",), "question-answering": ("exact_match", "f1"), "sequence-classification": ("accuracy", "f1"),
    "dpo": _REWARDS, "simpo": _REWARDS, "orpo": _REWARDS, "kto": (*_REWARDS[1:], "kl"), "reward": ("accuracy", "margin"),
    "grpo": ("reward",), "distill": ("perplexity",),
}  # fmt: skip
# What a run that goes on cannot change, beside its data: what the tokens, the adapters and the order of the data are made by.
_FIXED = (
    "objective", "quantization", "text_field", "label_field", "max_length", "too_long", "packing", "mask_share", "whole_word",
    "span_length", "doc_stride", "num_iterations", "lora_rank", "lora_alpha", "lora_targets", "rslora", "seed", "eval_fraction",
)  # fmt: skip
# What it may change without a word: where things are, and what is printed and kept.
_SILENT = (
    "output_dir", "cache_dir", "train_data", "eval_data", "model", "new_model", "tokenizer", "batch_size", "accumulation", "strategy",
    "context_parallel", "threads", "device", "resume", "progress", "tensorboard", "log_every", "save_every", "merge",
)  # fmt: skip


def _option(default: Any, text: str, group: str, **more: Any) -> Any:
    """A field with its help text, its group of the command line, and what argparse should know."""
    metadata = {"help": text, "group": group, **more}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _data(default: Any, text: str, **more: Any) -> Any:
    return _option(default, text, "data", **more)


def _step(default: Any, text: str, **more: Any) -> Any:
    return _option(default, text, "optimisation", **more)


def _run(default: Any, text: str, **more: Any) -> Any:
    return _option(default, text, "run", **more)


def _learn(default: Any, text: str, **more: Any) -> Any:
    return _option(default, text, "preferences and teachers", **more)


def _lora(default: Any, text: str, **more: Any) -> Any:
    return _option(default, text, "LoRA", **more)


@dataclass(frozen=True)
class TrainConfig:
    """See the help text of each field. ValueError for values that cannot work, each with the cure."""

    output_dir: str = _option("", "folder for checkpoints, metrics and the curve", "model", required=True)
    objective: str = _option("causal-lm", "what is learnt", "model", choices=OBJECTIVES)
    model: str | None = _option(
        None, "what to fine-tune: a Hugging Face folder, a .gguf file, or an installed package that holds one", "model"
    )
    new_model: dict[str, Any] | None = _option(
        None, "train from scratch: a config.json (file or JSON text) of a supported architecture", "model", kind="json"
    )
    tokenizer: str | None = _option(
        None,
        "for --new-model: 'char' (one token a character of the training data), or a folder with a tokenizer",
        "model",
    )
    quantization: str | None = _option(
        None, "pack the frozen weights under LoRA in 8 or 4 bits (QLoRA)", "model", choices=QUANTISABLE
    )
    device: str | None = _option(None, "cpu (the default), cuda, ...", "model")

    train_data: list[str] = _data(
        [],
        "files (.txt, .jsonl, .parquet, SQuAD's .json), folders of them, or folders of the datasets library",
        required=True,
    )
    eval_data: list[str] = _data([], "the same, to evaluate on")
    eval_fraction: float = _data(
        0.0, "without --eval-data: share of the tokens held out for it, drawn by the seed, the same of each class"
    )
    text_field: str | None = _data(
        None, "field of the rows that holds the text; by default 'text', unless a row has messages or a completion"
    )
    label_field: str = _data("label", "field that holds the class, or a list of classes, for sequence-classification")
    class_weights: list[str] = _data(
        [], "weights of the classes in the loss, CLASS=X ..., or 'balanced', for sequence-classification"
    )
    max_length: int | None = _data(
        None, "tokens of a training sequence; the model's context by default, at most 1024 of it"
    )
    too_long: str = _data(
        "error",
        "what becomes of a row longer than max_length that cannot be cut into pieces",
        choices=("error", "drop", "truncate"),
    )
    packing: bool = _data(True, "fill rows with several sequences that do not see each other; otherwise pad them")
    mask_share: float = _data(0.15, "share of the tokens that masked-lm and span-corruption hide")
    whole_word: bool = _data(False, "masked-lm hides whole words")
    span_length: float = _data(3.0, "mean length of a hidden span, for span-corruption")
    doc_stride: int = _data(128, "tokens that two windows of a long context share, for question-answering")
    cache_dir: str | None = _data(None, "folder for tokenised data; foveate/train in the user's cache by default")

    epochs: float = _step(1.0, "passes over the data, if max_steps is not given")
    max_steps: int | None = _step(None, "optimizer steps")
    batch_size: int | None = _step(
        None,
        "rows in a forward pass; with packing a row is filled up to max_length tokens; by default 8, and fewer for few data",
    )
    accumulation: int = _step(1, "forward passes in a step; their losses are normalised together, by tokens")
    learning_rate: float = _step(5e-5, "at the top of the schedule")
    schedule: str = _step("cosine", "after the warm-up; wsd is constant with a linear end", choices=SCHEDULES)
    warmup: float = _step(0.05, "steps of the warm-up, or their share of all if below 1")
    min_rate: float = _step(0.0, "share of the learning rate at the end of the schedule")
    decay_share: float = _step(0.2, "share of the steps in wsd's end")
    weight_decay: float = _step(0.01, "of matrices; biases, norms and embeddings have none")
    beta1: float = _step(0.9, "of AdamW")
    beta2: float = _step(0.999, "of AdamW; 0.95 is usual for pre-training")
    adam_eps: float = _step(1e-8, "of AdamW")
    max_grad_norm: float = _step(1.0, "gradients are scaled down to this norm; 0 for no limit")
    label_smoothing: float = _step(
        0.0,
        "share of the target's probability spread over all classes; of dpo and simpo, of the pairs that are the wrong way round",
    )
    z_loss: float = _step(0.0, "weight of logsumexp(logits)**2 in the loss")
    dropout: float | None = _step(None, "instead of the checkpoint's, everywhere")
    precision: str = _step(
        "fp32", "of the matrix products; bf16 is autocast over fp32 weights", choices=("fp32", "bf16")
    )
    gradient_checkpointing: bool = _step(False, "keep only each layer's input and compute the layer again: less memory")

    loss_type: str | None = _learn(
        None,
        "dpo: sigmoid (the default), hinge, ipo; grpo: the mean over completions (grpo, the default), over their tokens (dapo), or over "
        "max_completion_length tokens of each (dr_grpo); distill: forward-kl (the default), reverse-kl, jsd",
        choices=tuple(kind for kinds in LOSS_TYPES.values() for kind in kinds),
    )
    beta: float | None = _learn(
        None,
        "how much the reference holds the model back (dpo and kto 0.1 by default, grpo 0.04, where 0 is no reference); the scale of "
        "simpo's rewards (2); the weight of orpo's odds ratio (0.1); the teacher's share in the mixture of distill's jsd (0.5)",
    )
    gamma: float = _learn(0.5, "simpo: by how much the chosen answer's reward should be higher, as TRL's simpo_gamma")
    desirable_weight: float = _learn(1.0, "kto: weight of good answers in the loss")
    undesirable_weight: float = _learn(1.0, "kto: weight of bad ones; weight x number should be alike for both")
    reference: str = _learn(
        "precomputed",
        "dpo, kto: log-probabilities of the model as it was at the start are computed before the run and kept in the output folder "
        "(precomputed), or in each step, by the base without its adapter or a frozen copy (live)",
        choices=REFERENCES,
    )
    center_rewards: float = _learn(
        0.0, "reward: weight of (chosen + rejected)**2, which keeps rewards around 0; 0.01 is usual"
    )
    teacher: str | None = _learn(None, "distill: the model to learn from, with the same tokenizer")
    teacher_top_k: int = _learn(0, "distill by forward-kl: only the teacher's so many most probable tokens; 0 for all")
    hidden_weight: float = _learn(0.0, "distill: weight of the mean squared error of the last hidden states")
    label_weight: float = _learn(0.0, "distill: weight of the cross-entropy with the data's own tokens")
    temperature: float = _learn(
        1.0, "distill: logits of both are divided by it; grpo: of the completions that are drawn"
    )
    reward: list[str] = _learn(
        [],
        "grpo: what scores completions, each MODULE:FUNCTION or FILE.py:FUNCTION or the folder of a reward model; several add up",
    )
    num_generations: int = _learn(8, "grpo: completions of a prompt, which are compared with each other")
    max_completion_length: int = _learn(256, "grpo: tokens of a completion at most")
    num_iterations: int = _learn(1, "grpo: optimizer steps on the same completions")
    epsilon: float = _learn(0.2, "grpo: the probability ratio is clipped to 1 - epsilon ... 1 + epsilon_high")
    epsilon_high: float | None = _learn(None, "grpo: epsilon by default")
    scale_rewards: bool = _learn(True, "grpo: divide advantages by the standard deviation of their group")

    lora_rank: int = _lora(0, "rank of the adapters; 0 trains all weights")
    lora_alpha: float | None = _lora(None, "the update is scaled by alpha / rank; twice the rank by default")
    lora_dropout: float = _lora(0.0, "of the adapters' input")
    lora_targets: list[str] = _lora(
        [], "names of the layers, such as q_proj v_proj embed_tokens lm_head; all of attention and MLP by default"
    )
    rslora: bool = _lora(False, "scale by alpha / sqrt(rank)")
    merge: bool = _lora(False, "at the end write the best adapter and the model as one to the output folder's merged/")

    eval_every: int | None = _run(None, "steps between evaluations; the end of each epoch by default")
    save_every: int | None = _run(None, "steps between checkpoints; with each evaluation by default")
    log_every: int = _run(10, "steps between lines of metrics.jsonl")
    best_by: str = _run(
        "loss",
        "what makes the best checkpoint, for patience too: loss, accuracy, f1, exact_match, perplexity, rewards/accuracies, reward",
    )
    patience: int | None = _run(None, "stop after so many evaluations without a better one")
    seed: int = _run(0, "of new weights, the order of the data, masks and dropout")
    threads: int | None = _run(None, "as torch.set_num_threads")
    strategy: str | None = _run(
        None, "in several processes, started by torchrun: ddp copies the model, fsdp splits it", choices=("ddp", "fsdp")
    )
    context_parallel: int = _run(1, "processes that share each sequence, with a strategy: ring attention")
    resume: bool = _run(
        False, "go on from the last checkpoint in the output folder, bit for bit; begin if there is none"
    )
    progress: bool | None = _run(
        None, "show a bar; by default in a terminal, elsewhere a line for each of metrics.jsonl"
    )
    tensorboard: bool = _run(False, "write event files to the output folder's tensorboard/")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices is not None and value is not None and value not in choices:
                raise ValueError(f"{field.name}={value!r} is not one of {', '.join(choices)}")
        for name in ("train_data", "eval_data", "lora_targets", "class_weights", "reward"):
            value = getattr(self, name)
            values = [value] if isinstance(value, (str, Path)) else value
            object.__setattr__(self, name, [str(value) for value in values])
        object.__setattr__(self, "output_dir", str(self.output_dir))
        _check_model(self)
        _check_numbers(self)
        _check_used(self)

    def replace(self, **changes: Any) -> TrainConfig:
        return dataclasses.replace(self, **changes)

    def changes(self, before: dict[str, Any]) -> tuple[list[str], list[str]]:
        """What differs from `before`, another config's as_dict, in words: what a run that goes on cannot change, and what it may."""
        found = {
            name: f"{name}={value} (was {before.get(name)})"
            for name, value in self.as_dict().items()
            if value != before.get(name)
        }
        fixed = [text for name, text in found.items() if name in _FIXED]
        return fixed, [text for name, text in found.items() if name not in (*_FIXED, *_SILENT)]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def strength(self) -> float:
        """beta, or the objective's default; 0 for one without."""
        return _BETAS.get(self.objective, 0.0) if self.beta is None else self.beta

    @property
    def kind_of_loss(self) -> str:
        """loss_type, or the objective's default."""
        return self.loss_type or LOSS_TYPES[self.objective][0]

    @property
    def best_is_least(self) -> bool:
        """Whether the lowest value of `best_by` is the best."""
        return self.best_by in ("loss", "perplexity", "kl")

    @property
    def step_rows(self) -> int:
        """Rows of one optimizer step of one process."""
        return self.pass_rows * self.accumulation

    @property
    def pass_rows(self) -> int:
        """batch_size, which `fit` has chosen where it was None."""
        if self.batch_size is None:
            raise ValueError("batch_size is None, which leaves the choice to foveate.train.fit; name a number")
        return self.batch_size


def _check_model(c: TrainConfig) -> None:
    if not c.output_dir:
        raise ValueError("there is no output_dir; name a folder for the checkpoints")
    if not c.train_data:
        raise ValueError("train_data is empty; pass files or folders to train on")
    if (c.model is None) == (c.new_model is None):
        raise ValueError("give either model, to fine-tune it, or new_model, to train from scratch")
    if c.new_model is not None and c.tokenizer is None:
        raise ValueError("a new_model needs a tokenizer: 'char', or a folder that has one")
    if c.model is not None and c.tokenizer is not None:
        raise ValueError("a model comes with its own tokenizer; omit tokenizer, or give new_model")
    if c.quantization is not None and not c.lora_rank:
        raise ValueError(
            f"quantization={c.quantization!r} freezes the weights; give a lora_rank to train adapters on them"
        )
    if c.merge and not c.lora_rank:
        raise ValueError("merge folds adapters into the model; give a lora_rank, or omit it")
    if c.new_model is not None and c.lora_rank:
        raise ValueError("LoRA adapts a trained model; omit lora_rank to train a new one")
    if c.eval_data and c.eval_fraction:
        raise ValueError("eval_data and eval_fraction both say what to evaluate on; give one of them")


def _check_numbers(c: TrainConfig) -> None:
    if c.context_parallel > 1 and (c.strategy is None or c.objective != "causal-lm"):
        raise ValueError(
            f"context_parallel={c.context_parallel} spreads the rows of a causal-lm over processes; it needs objective='causal-lm' and a "
            "strategy"
        )
    at_least = {
        "batch_size": 1, "accumulation": 1, "log_every": 1, "max_steps": 1, "eval_every": 1, "save_every": 1, "patience": 1,
        "max_length": 2, "lora_rank": 0, "max_grad_norm": 0, "weight_decay": 0, "warmup": 0, "doc_stride": 0, "threads": 1,
        "span_length": 1, "z_loss": 0, "context_parallel": 1, "beta": 0, "gamma": 0, "desirable_weight": 0, "undesirable_weight": 0,
        "center_rewards": 0, "teacher_top_k": 0, "hidden_weight": 0, "label_weight": 0, "num_generations": 2, "max_completion_length": 1,
        "num_iterations": 1, "epsilon_high": 0,
    }  # fmt: skip
    for name, low in at_least.items():
        value = getattr(c, name)
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"{name}={value} must be {low} or more")
    if not 0 <= c.seed < 2**63:
        raise ValueError(f"seed={c.seed} must be from 0 to 2**63 - 1")
    for name in ("eval_fraction", "dropout", "lora_dropout", "label_smoothing", "beta1", "beta2", "epsilon"):
        value = getattr(c, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}={value} must be from 0 to below 1")
    for name in ("learning_rate", "epochs", "adam_eps", "temperature"):
        if not 0 < getattr(c, name) < math.inf:
            raise ValueError(f"{name}={getattr(c, name)} must be more than 0, and finite")
    if not 0 < c.mask_share < 1:
        raise ValueError(f"mask_share={c.mask_share} must be between 0 and 1")
    if not (0 <= c.min_rate <= 1 and 0 <= c.decay_share <= 1):
        raise ValueError(f"min_rate={c.min_rate} and decay_share={c.decay_share} must be from 0 to 1")


def _check_used(c: TrainConfig) -> None:
    """ValueError for an option that would be ignored."""
    defaults = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(c)
    }
    given = {name for name, default in defaults.items() if getattr(c, name) != default}
    for name, objectives in _ONLY_FOR.items():
        if name in given and c.objective not in objectives:
            raise ValueError(f"{name} is for {' and '.join(objectives)}; omit it for {c.objective}")
    for name in ("lora_alpha", "lora_dropout", "lora_targets", "rslora"):
        if name in given and not c.lora_rank:
            raise ValueError(f"{name} is for adapters; give a lora_rank too, or omit it")
    if not (c.eval_data or c.eval_fraction):
        for name in ("patience", "eval_every", "best_by"):
            if name in given:
                raise ValueError(f"{name} needs something to evaluate on; give eval_data or eval_fraction too")
    known = ("loss", *METRICS[c.objective])
    if c.best_by not in known:
        raise ValueError(f"best_by={c.best_by!r} is not measured by {c.objective}; choose one of {', '.join(known)}")
    if c.objective == "question-answering" and c.too_long == "truncate":
        raise ValueError(
            "question-answering reads long contexts in windows, and does not truncate questions; take too_long='drop'"
        )
    _check_learning(c)
    if {"epochs", "max_steps"} <= given:
        raise ValueError("epochs and max_steps both say how long to train; give one of them")
    if c.objective == "question-answering" and c.eval_fraction:
        raise ValueError(
            "question-answering is evaluated by whole answers; give eval_data, as eval_fraction would part the windows of one text"
        )


def _check_learning(c: TrainConfig) -> None:
    """ValueError for choices of preferences and teachers that do not go together."""
    kinds = LOSS_TYPES.get(c.objective, ())
    if c.loss_type is not None and c.loss_type not in kinds:
        raise ValueError(f"loss_type={c.loss_type!r} is none of {c.objective}; choose one of {', '.join(kinds)}")
    if c.objective in ("dpo", "simpo", "kto") and c.strength == 0:
        raise ValueError(
            f"beta=0 leaves {c.objective} without a gradient; give a number above 0, such as {_BETAS[c.objective]}"
        )
    if c.label_smoothing and c.objective in ("dpo", "simpo"):
        if c.objective == "dpo" and c.kind_of_loss != "sigmoid":
            raise ValueError(f"label_smoothing is for dpo's sigmoid; omit it for {c.kind_of_loss}")
        if c.label_smoothing >= 0.5:
            raise ValueError(
                f"label_smoothing={c.label_smoothing} would have the rejected answers learnt; it must be below 0.5"
            )
    if c.objective == "distill":
        if c.teacher is None:
            raise ValueError("distill needs a teacher, the model to learn from")
        if c.teacher_top_k and c.kind_of_loss != "forward-kl":
            raise ValueError(f"teacher_top_k is for forward-kl, not {c.kind_of_loss}; omit it")
        if c.beta is not None and (c.kind_of_loss != "jsd" or not 0 < c.beta < 1):
            raise ValueError(
                f"beta={c.beta} of distill is the teacher's share in the mixture of loss_type='jsd', between 0 and 1"
            )
    if c.objective == "grpo" and c.too_long == "truncate":
        raise ValueError("grpo does not cut prompts; take too_long='drop' to leave long ones out")
    if c.objective in ("grpo", "kto") and c.strategy == "fsdp":
        raise ValueError(
            f"{c.objective} runs the model between its steps, where fsdp has split the weights; take strategy='ddp'"
        )
