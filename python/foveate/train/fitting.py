"""foveate.train.fit: a training run from its configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveate.files.data_files import read_rows, strings
from foveate.models import open_checkpoint
from foveate.models.checkpoint.huggingface import describe
from foveate.tokenizer import Tokenizer
from foveate.tokenizer.characters import char_tokenizer
from foveate.train.batch_size import ROWS, choose, sentence
from foveate.train.checkpoints import model as model_files
from foveate.train.checkpoints.adapter import adapted, adapter_settings, merge_adapter
from foveate.train.checkpoints.folder import Checkpoints
from foveate.train.checkpoints.model import TrainedModel
from foveate.train.config import TrainConfig
from foveate.train.data.examples import Examples
from foveate.train.data.hold_out import hold_out
from foveate.train.data.plan import BatchPlan
from foveate.train.data.token_store import TokenStore
from foveate.train.data.tokenized import tokenized
from foveate.train.loop import Dataset, Loop
from foveate.train.modules.gradient_checkpointing import checkpoint_layers
from foveate.train.modules.linear import speed_up_linear
from foveate.train.modules.lora import LoraConfig
from foveate.train.objectives.base import Beginning, Objective
from foveate.train.objectives.choose import check_architecture, make_objective
from foveate.train.objectives.rewards import Reward
from foveate.train.report import Report
from foveate.train.strategy import Strategy


@dataclass(frozen=True)
class TrainResult:
    """metrics: of the last evaluation, {} without one. best: the checkpoint of the best evaluation by config.best_by, best_metrics what
    it measured, best_loss its loss; without evaluation last, {} and None."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]
    best_loss: float | None
    best_metrics: dict[str, float]
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
    rewards: Sequence[Reward] = (),
    **options: Any,
) -> TrainResult:
    """Trains a model and writes checkpoints, metrics and the curve of the loss to config.output_dir.

        fit(model="path", train_data=["text.txt"], output_dir="out", learning_rate=3e-4)

    config: a TrainConfig, or its fields as options; both: the config with these fields changed. strategy: how several processes
    share the work; None: one process. after_evaluation(step, metrics) is called after each evaluation and may raise to stop.
    rewards: functions that score completions for grpo, beside those that config.reward names.

    The loss of a step is the sum over its target tokens (answers, examples) divided by their number over all accumulated batches
    and processes, so that neither accumulation nor the number of processes changes it. Weights and the optimizer's state are fp32.
    ValueError, OSError and NonFiniteLoss explain themselves; what was saved before stays.
    """
    config = TrainConfig(**options) if config is None else config.replace(**options)
    if strategy is None and config.strategy is not None:
        from foveate.train.distributed.torchrun import started

        with started(config.strategy, config.device, config.context_parallel) as strategy:
            return fit(config, strategy=strategy, after_evaluation=after_evaluation, rewards=rewards)
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
    with checkpoints.claimed(resume=config.resume):
        return _run(config, checkpoints, strategy, after_evaluation, rewards)


def _run(
    config: TrainConfig,
    checkpoints: Checkpoints,
    strategy: Strategy,
    after_evaluation: Callable[[int, dict[str, float]], None] | None,
    rewards: Sequence[Reward],
) -> TrainResult:
    folder = checkpoints.folder
    with strategy.main_first():
        opened = _open(config, rewards)
    trained, objective, train = opened.trained, opened.objective, opened.train
    room = longest = row_tokens(objective, train.examples)
    packing = config.packing and objective.packs_examples
    chosen = config.batch_size is None
    if chosen:
        batch_size, room = choose(
            train.examples.lengths, room, packing=packing, spread=config.accumulation * strategy.world_size
        )
        config = config.replace(batch_size=batch_size)
        if packing and room < longest:
            plan = BatchPlan(train.examples.lengths, room, packing=True, seed=config.seed)
            train = dataclasses.replace(train, plan=plan)
    checkpoints.check_space(_disk_bytes(config, trained.model))
    report = Report(
        folder,
        log_every=config.log_every,
        progress=config.progress,
        tensorboard=config.tensorboard,
        active=strategy.is_main,
    )
    for note in (*checkpoints.notes, *opened.notes):
        report.note(note)
    if config.gradient_checkpointing:
        checkpoint_layers(trained.model)
    _begin(objective, opened, folder, report, strategy)
    torch.manual_seed(config.seed + strategy.process)  # of dropout
    loop = Loop(
        config, trained.model, objective, train, opened.evaluation, checkpoints=checkpoints, report=report,
        strategy=strategy, export=trained.export, after_evaluation=after_evaluation,
    )  # fmt: skip
    if chosen and packing and (batch_size, room) != (ROWS, longest):
        rows = config.step_rows * strategy.world_size
        report.note(sentence(train.examples.lengths, rows, room, loop.epoch_steps, loop.steps))
    if not (config.resume and loop.resume()):
        report.begin()
    try:
        progress = loop.run()
    finally:
        report.close()
    last = checkpoints.named("last")
    if last is None:
        raise RuntimeError(f"the run has left no checkpoint in {folder}, though each ends with one")
    if config.merge and strategy.is_main:
        merge_adapter(
            checkpoints.named("best") or last,
            folder / "merged",
            base=trained.name,
            head=objective.head,
            hf_config=trained.config,
        )
    evaluations = [row for row in report.history if "eval_loss" in row]
    return TrainResult(
        steps=progress.step, tokens=progress.tokens, seconds=progress.seconds,
        metrics={name.removeprefix("eval_"): value for name, value in (evaluations or [{}])[-1].items() if name != "step"},
        best_loss=None if progress.best is None else progress.best["loss"], best_metrics=progress.best or {},
        last=last, best=checkpoints.named("best") or last,
        model=trained.model.eval(), tokenizer=trained.tokenizer, history=report.history,
    )  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    trained: TrainedModel
    objective: Objective
    train: Dataset
    evaluation: Dataset | None
    notes: list[str]  # for the user: what of the data is not read, ...


def _begin(objective: Objective, opened: _Opened, folder: Path, report: Report, strategy: Strategy) -> None:
    data = [opened.train] if opened.evaluation is None else [opened.train, opened.evaluation]
    found = [(each.store, each.examples) for each in data]
    room = row_tokens(objective, opened.train.examples)
    speed_up_linear(opened.trained.model)
    with strategy.main_first():
        objective.begin(Beginning(opened.trained.model, found, folder, room, report.shows_bars, strategy.is_main))


def row_tokens(objective: Objective, examples: Examples) -> int:
    """What a row has room for: max_length, or the longest example, as one of two sequences may be longer."""
    return max(objective.max_length, int(examples.lengths.max(initial=0)))


def _open(config: TrainConfig, rewards: Sequence[Reward] = ()) -> _Opened:
    """The model, and the tokenised data of training and evaluation. All that is cheap to check comes first."""
    adapter, config = _adapter(config)
    checkpoint = None if config.model is None else open_checkpoint(config.model)
    hf_config = (config.new_model or {}) if checkpoint is None else checkpoint.config
    check_architecture(config.objective, hf_config)
    tokenizer = _tokenizer(config) if checkpoint is None else checkpoint.tokenizer()
    if tokenizer is None:
        raise ValueError(f"{config.model or config.tokenizer} has no tokenizer, so no text can be read for it")
    objective = make_objective(config, tokenizer, hf_config, rewards)
    cache = None if config.cache_dir is None else Path(config.cache_dir).expanduser()
    store = tokenized(config.train_data, objective, tokenizer, cache=cache, progress=config.progress)
    examples = objective.examples(store)
    notes = objective.notes(store)
    evaluation = None
    if config.eval_data:
        held_store = tokenized(config.eval_data, objective, tokenizer, cache=cache, progress=config.progress)
        try:
            evaluation = dataset(config, objective, held_store, objective.examples(held_store), shuffle=False)
        except ValueError as error:
            raise ValueError(f"eval_data: {error}") from error
        notes += [f"eval_data: {note}" for note in objective.notes(held_store)]
    elif config.eval_fraction:
        out = hold_out(examples, objective.parts(store), config.eval_fraction, config.seed)
        held = Examples(*(values[out] for values in examples))
        examples, whole = Examples(*(values[~out] for values in examples)), examples
        evaluation = dataset(config, objective, store, held, shuffle=False)
        share = held.lengths.sum() / whole.lengths.sum()
        notes.append(
            f"held out to evaluate on: {len(held.lengths)} of {len(whole.lengths)} sequences, {share:.1%} of the tokens"
            + (", the same share of each label" if config.objective == "sequence-classification" else "")
        )
    train = dataset(config, objective, store, examples, shuffle=True)
    end = objective.end_of_turn(store)
    if end is not None and end not in tokenizer.eos_ids:
        tokenizer.eos_ids.add(end)  # for those who generate with what is exported
        notes.append(
            f"the chats end replies with {tokenizer.backend.id_to_token(end)!r}, which the model then stops at"
        )
    if checkpoint is None:
        trained = model_files.create(config, tokenizer, objective)
    else:
        trained = model_files.load(config, checkpoint, tokenizer, objective)
        if config.lora_rank:
            trained = adapted(trained, lora_config(config), quantization=config.quantization, adapter=adapter)
    return _Opened(trained, objective, train, evaluation, notes)


def _adapter(config: TrainConfig) -> tuple[Path | None, TrainConfig]:
    """The folder of the adapter that config.model is, and the config with the model that it adapts; (None, config) for a model.

    ValueError where the adapter could not go on as it is: of another rank, scale or quantization.
    """
    if config.model is None:
        return None, config
    folder = Path(config.model).expanduser()
    if not (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
        return None, config
    known = adapter_settings(folder)
    if not config.lora_rank:
        raise ValueError(
            f"{folder} is an adapter, of rank {known.get('r')}; train it on with lora_rank={known.get('r')}, or all weights of the model "
            "that merge makes of it"
        )
    base = known.get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(
            f"{folder} is an adapter that does not say what it adapts; write it into its adapter_config.json"
        )
    wanted = {
        "lora_rank": (config.lora_rank, known.get("r")),
        "lora_alpha": (config.lora_alpha or known.get("lora_alpha"), known.get("lora_alpha")),
        "rslora": (config.rslora, bool(known.get("use_rslora"))),
        "quantization": (config.quantization, known["quantization"]),
        "lora_targets": (sorted(config.lora_targets or known["target_modules"]), sorted(known["target_modules"])),
    }
    other = [f"{name}={theirs!r}, not {ours!r}" for name, (ours, theirs) in wanted.items() if ours != theirs]
    if other:
        raise ValueError(f"the adapter {folder} has {', '.join(other)}; give the same to train it on")
    return folder, config.replace(model=base, lora_alpha=known.get("lora_alpha"))


def lora_config(config: TrainConfig) -> LoraConfig:
    targets = tuple(config.lora_targets) or None
    return LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout, targets, config.rslora)


def _tokenizer(config: TrainConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    if config.tokenizer != "char":
        folder = Path(config.tokenizer).expanduser()
        if (folder / "tokenizer.json").is_file() and not (
            folder / "config.json"
        ).exists():  # of `foveate data tokenizer`, without a model
            return describe(folder, {}).tokenizer()
        return open_checkpoint(config.tokenizer).tokenizer()
    return char_tokenizer(text for row in read_rows(config.train_data) for text in strings(row))


def dataset(
    config: TrainConfig, objective: Objective, store: TokenStore, examples: Examples, *, shuffle: bool
) -> Dataset:
    """The examples of `store` in the order in which a run reads them."""
    packing = config.packing and objective.packs_examples
    plan = BatchPlan(
        examples.lengths, row_tokens(objective, examples), packing=packing, seed=config.seed, shuffle=shuffle
    )
    return Dataset(store, examples, plan)


def _disk_bytes(config: TrainConfig, model: nn.Module) -> int:
    """The most that a run has on the disk: two checkpoints, each of the weights and a state of the trained ones with AdamW's two
    moments in fp32; the weights of the best one; and the merged model."""
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(4 * p.numel() for p in model.parameters())
    exported = trained if config.lora_rank else whole
    best = exported if config.eval_data or config.eval_fraction else 0
    return 2 * (exported + 3 * trained) + best + (whole if config.merge else 0)
