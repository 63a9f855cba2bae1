"""foveate.train.fit: a training run from its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.models import Checkpoint, open_checkpoint
from foveate.tokenizer import Tokenizer
from foveate.train import model_files
from foveate.train.adapter_files import adapted, merge_adapter
from foveate.train.char_tokenizer import char_tokenizer
from foveate.train.checkpoints import Checkpoints
from foveate.train.config import TrainConfig
from foveate.train.data_files import read_rows, strings
from foveate.train.gradient_checkpointing import checkpoint_layers
from foveate.train.loop import Data, Loop
from foveate.train.lora import LoraConfig
from foveate.train.model_files import TrainedModel
from foveate.train.objective import Objective
from foveate.train.objectives import check_architecture, make_objective
from foveate.train.plan import DataPlan
from foveate.train.report import Report
from foveate.train.store import TokenStore
from foveate.train.strategy import Strategy
from foveate.train.tokenized import tokenized


@dataclass(frozen=True)
class TrainResult:
    """metrics: of the last evaluation, {} without one. best: the checkpoint of the lowest evaluation loss; without evaluation, last."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    best_loss: float | None
    last: Path
    best: Path
    model: nn.Module
    tokenizer: Tokenizer
    history: list[dict[str, float]]


def fit(
    config: TrainConfig | None = None,
    *,
    strategy: Strategy | None = None,
    after_evaluation: Callable[[int, dict[str, float]], None] | None = None,
    **options: Any,
) -> TrainResult:
    """Trains a model and writes checkpoints, metrics and the curve of the loss to config.output_dir.

        fit(model="path", train_data=["text.txt"], output_dir="out", learning_rate=3e-4)

    config: a TrainConfig, or its fields as options; both: the config with these fields changed. strategy: how several processes
    share the work; None: one process. after_evaluation(step, metrics) is called after each evaluation and may raise to stop.

    The loss of a step is the sum over its target tokens (answers, examples) divided by their number over all accumulated batches
    and processes, so that neither accumulation nor the number of processes changes it. Weights and the optimizer's state are fp32.
    ValueError, OSError and NonFiniteLoss explain themselves; what was saved before stays.
    """
    config = TrainConfig(**options) if config is None else config.replace(**options)
    if strategy is None and config.strategy is not None:
        from foveate.train.distributed import started

        with started(config.strategy, config.device, config.context_parallel) as strategy:
            return fit(config, strategy=strategy, after_evaluation=after_evaluation)
    if strategy is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, and each would train alone; give a strategy, ddp or fsdp"
        )
    strategy = strategy or Strategy()
    if not strategy.is_main:
        config = config.replace(progress=False)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = Path(config.output_dir).expanduser()
    checkpoints = Checkpoints(folder, strategy)
    checkpoints.prepare()
    if not config.resume and checkpoints.named("last") is not None:
        raise ValueError(
            f"{folder} already has a run, whose last checkpoint is {checkpoints.named('last')}; go on with resume, or choose another "
            "output_dir"
        )
    with strategy.main_first():
        trained, objective, store, evaluation = _open(config)
    train = _data(config, objective, store, shuffle=True)
    held_out = None if evaluation is None else _data(config, objective, evaluation, shuffle=False)
    checkpoints.check_space(_disk_bytes(config, trained.model))
    report = Report(
        folder,
        log_every=config.log_every,
        progress=config.progress,
        tensorboard=config.tensorboard,
        active=strategy.is_main,
    )
    if config.gradient_checkpointing:
        checkpoint_layers(trained.model)
    torch.manual_seed(config.seed + strategy.process)  # of dropout
    loop = Loop(
        config, trained.model, objective, train, held_out, checkpoints=checkpoints, report=report, strategy=strategy,
        export=trained.export, after_evaluation=after_evaluation,
    )  # fmt: skip
    if not (config.resume and loop.resume()):
        report.begin()
    try:
        progress = loop.run()
    finally:
        report.close()
    last = checkpoints.named("last")
    assert last is not None
    if config.merge and strategy.is_main:
        merge_adapter(
            checkpoints.named("best") or last,
            folder / "merged",
            base=config.model,
            head=objective.head,
            settings=trained.config,
        )
    evaluations = [row for row in report.history if "eval_loss" in row]
    return TrainResult(
        steps=progress.step, tokens=progress.tokens, seconds=progress.seconds,
        metrics={name.removeprefix("eval_"): value for name, value in (evaluations or [{}])[-1].items() if name != "step"},
        best_loss=progress.best_loss if evaluations else None, last=last, best=checkpoints.named("best") or last,
        model=trained.model.eval(), tokenizer=trained.tokenizer, history=report.history,
    )  # fmt: skip


def _open(config: TrainConfig) -> tuple[TrainedModel, Objective, TokenStore, TokenStore | None]:
    """The model, and the tokenised data of training and evaluation. All that is cheap to check comes first."""
    checkpoint = None if config.model is None else _checkpoint(config.model)
    settings = config.new_model if checkpoint is None else checkpoint.config
    assert settings is not None
    check_architecture(config.objective, settings)
    tokenizer = _tokenizer(config) if checkpoint is None else checkpoint.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{config.model or config.tokenizer} has no tokenizer, so no text can be read for it")
    objective = make_objective(config, tokenizer, settings)
    cache = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
    store = tokenized(config.train_data, objective, tokenizer, cache=cache, progress=config.progress)
    evaluation = None
    if config.eval_data:
        evaluation = tokenized(config.eval_data, objective, tokenizer, cache=cache, progress=config.progress)
    elif config.eval_fraction:
        store, evaluation = store.split(config.eval_fraction)
    labels: list[str] | None = getattr(objective, "labels", None)
    if checkpoint is None:
        trained = model_files.create(config, tokenizer, objective.head, labels)
    else:
        trained = model_files.load(config, checkpoint, tokenizer, objective.head, labels)
        if config.lora_rank:
            trained = adapted(trained, lora_config(config))
    return trained, objective, store, evaluation


def _checkpoint(model: str) -> Checkpoint:
    folder = Path(model).expanduser()
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{model} is an adapter, not a model; go on training it with resume in its output_dir, or start from the model that merge "
            "makes of it"
        )
    return open_checkpoint(model)


def lora_config(config: TrainConfig) -> LoraConfig:
    targets = tuple(config.lora_targets) or None
    return LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, targets, config.rslora)


def _tokenizer(config: TrainConfig) -> Tokenizer | None:
    assert config.tokenizer is not None
    if config.tokenizer != "char":
        return open_checkpoint(config.tokenizer).tokenizer()
    return char_tokenizer(text for row in read_rows(config.train_data) for text in strings(row))


def _data(config: TrainConfig, objective: Objective, store: TokenStore, *, shuffle: bool) -> Data:
    pieces = objective.pieces(store)
    plan = DataPlan(pieces.lengths, objective.max_length, packing=config.packing, seed=config.seed, shuffle=shuffle)
    return Data(store, pieces, plan)


def _disk_bytes(config: TrainConfig, model: nn.Module) -> int:
    """The most that a run has on the disk: two checkpoints, each of the weights and a state of the trained ones with AdamW's two
    moments in fp32; the weights of the best one; and the merged model."""
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(4 * p.numel() for p in model.parameters())
    exported = trained if config.lora_rank else whole
    best = exported if config.eval_data or config.eval_fraction else 0
    return 2 * (exported + 3 * trained) + best + (whole if config.merge else 0)
