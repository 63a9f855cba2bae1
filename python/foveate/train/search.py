"""Hyper-parameter search with Optuna: grid, random, or TPE; bad trials stop early; the study lies in a SQLite file and goes on."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.train.config import TrainConfig
from foveate.train.curve import new_figure
from foveate.train.fit import fit
from foveate.train.loop import NonFiniteLoss

SAMPLERS = ("tpe", "random", "grid")
STUDY = "search.db"


@dataclass(frozen=True)
class Range:
    """What one field of TrainConfig is tried with: values low to high (a float or an int), or one of `choices`."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()

    def suggest(self, trial: Any) -> Any:
        if self.choices:
            return trial.suggest_categorical(self.name, list(self.choices))
        if isinstance(self.low, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


def parse_range(text: str) -> Range:
    """`learning_rate=1e-5:1e-3:log`, `lora_rank=4:64`, or `batch_size=4,8,16`. ValueError for what is none of these."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    known = {field.name: field for field in dataclasses.fields(TrainConfig)}
    if name not in known or not values:
        raise ValueError(
            f"{text!r} is no range; write FIELD=LOW:HIGH, FIELD=LOW:HIGH:log or FIELD=A,B,C, a field of TrainConfig"
        )
    if ":" not in values:
        return Range(name, choices=tuple(_value(part) for part in values.split(",")))
    low, high, *rest = values.split(":")
    bounds = _value(low), _value(high)
    if not all(isinstance(x, (int, float)) for x in bounds) or rest not in ([], ["log"]) or not bounds[0] < bounds[1]:
        raise ValueError(
            f"{text!r} is no range; the form is {name}=LOW:HIGH or {name}=LOW:HIGH:log with LOW below HIGH"
        )
    if "log" in rest and bounds[0] <= 0:
        raise ValueError(f"{text!r} is logarithmic, so it must begin above 0")
    if not all(isinstance(x, int) for x in bounds):
        bounds = float(bounds[0]), float(bounds[1])
    return Range(name, bounds[0], bounds[1], log=bool(rest))


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


@dataclass(frozen=True)
class SearchResult:
    """best: the values of the best trial; trials: one dictionary each, with number, state, loss and values."""

    best: dict[str, Any]
    best_loss: float
    trials: list[dict[str, Any]]
    folder: Path


def search(
    config: TrainConfig,
    ranges: Sequence[Range],
    *,
    trials: int = 20,
    sampler: str = "tpe",
    pruning: bool = True,
    workers: int = 1,
    timeout: float | None = None,
) -> SearchResult:
    """Trains with values from `ranges` and keeps what gives the lowest evaluation loss.

    config.output_dir gets the study (search.db), a folder for each trial, and search.png. A search with the same folder goes on:
    `trials` is the number of all. grid tries every combination of choices, and 5 points of a range. pruning stops a trial whose
    loss at an evaluation is worse than the median of the others there. workers: processes side by side, that share the study.
    timeout: seconds after which no new trial begins. ValueError without data to evaluate on, or when no trial comes to an end.
    """
    optuna = _optuna()
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}")
    if not ranges:
        raise ValueError("there is nothing to search over; give a range, such as learning_rate=1e-5:1e-3:log")
    if not (config.eval_data or config.eval_fraction):
        raise ValueError("a search compares evaluation losses; give eval_data or eval_fraction")
    if trials < 1 or workers < 1:
        raise ValueError(f"trials={trials} and workers={workers} must be 1 or more")
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    _study(optuna, folder, ranges, sampler, config.seed, pruning)  # made before the workers share it
    arguments = (config, list(ranges), trials, sampler, pruning, timeout)
    if workers == 1:
        _work(*arguments, 0)
    else:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        processes = [context.Process(target=_work, args=(*arguments, i)) for i in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            raise RuntimeError(f"{len(failed)} of {workers} workers failed, see above; what they found is kept")
    study = _study(optuna, folder, ranges, sampler, config.seed, pruning)
    found = [
        {"number": t.number, "state": t.state.name.lower(), "loss": t.value, **t.params}
        for t in study.get_trials(deepcopy=False)
    ]
    if not any(row["state"] == "complete" for row in found):
        raise ValueError(f"none of {len(found)} trials came to an end with a finite loss; try lower learning rates")
    _draw(study, [r.name for r in ranges], folder / "search.png")
    return SearchResult(study.best_params, study.best_value, found, folder)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('optuna is not installed: pip install "foveate[search]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, folder: Path, ranges: Sequence[Range], sampler: str, seed: int, pruning: bool) -> Any:
    if sampler == "grid":
        grid = {r.name: _points(r) for r in ranges}
        chosen = optuna.samplers.GridSampler(grid, seed=seed)
    else:
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[sampler]
        chosen = kind(seed=seed)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3) if pruning else optuna.pruners.NopPruner()
    return optuna.create_study(
        study_name="foveate", storage=f"sqlite:///{folder / STUDY}", sampler=chosen, pruner=pruner, direction="minimize",
        load_if_exists=True,
    )  # fmt: skip


def _points(r: Range, count: int = 5) -> list[Any]:
    if r.choices:
        return list(r.choices)
    assert r.low is not None and r.high is not None
    shares = [i / (count - 1) for i in range(count)]
    if r.log:
        points = [r.low * (r.high / r.low) ** share for share in shares]
    else:
        points = [r.low + (r.high - r.low) * share for share in shares]
    return sorted({round(x) for x in points}) if isinstance(r.low, int) else points


def _work(
    config: TrainConfig,
    ranges: list[Range],
    trials: int,
    sampler: str,
    pruning: bool,
    timeout: float | None,
    worker: int,
) -> None:
    """Takes trials until the study has `trials` of them."""
    optuna = _optuna()
    folder = Path(config.output_dir).expanduser()
    # each worker draws other values
    study = _study(optuna, folder, ranges, sampler, config.seed + worker, pruning)

    def objective(trial: Any) -> float:
        values = {r.name: r.suggest(trial) for r in ranges}
        output = folder / f"trial-{trial.number:04d}"
        shutil.rmtree(output, ignore_errors=True)

        def report(step: int, metrics: dict[str, float]) -> None:
            trial.report(metrics["loss"], step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            result = fit(config.replace(output_dir=str(output), **values), after_evaluation=report)
        except NonFiniteLoss as error:
            raise optuna.TrialPruned(str(error)) from error
        finally:
            _forget_weights(output)
        assert result.best_loss is not None
        return result.best_loss

    states = optuna.trial.TrialState
    limit = optuna.study.MaxTrialsCallback(trials, states=(states.COMPLETE, states.PRUNED))
    done = len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))
    if done < trials:
        study.optimize(objective, callbacks=[limit], timeout=timeout)


def _forget_weights(folder: Path) -> None:
    """Of a trial its metrics and its curve are kept; the best values are trained again where the model is wanted."""
    for checkpoint in folder.glob("step-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    for link in ("last", "best"):
        (folder / link).unlink(missing_ok=True)


def _draw(study: Any, names: Sequence[str], file: Path) -> None:
    """The loss over the trials, and over each field."""
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    figure = new_figure(3.2 * (len(names) + 1), 3.2)
    axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
    for ax, name in zip(axes, ("trial", *names)):
        x = [t.number if name == "trial" else t.params[name] for t in trials]
        if any(isinstance(value, (str, list)) for value in x):
            x = [str(value) for value in x]
        elif name == "learning_rate":
            ax.set_xscale("log")
        ax.plot(x, [t.value for t in trials], "o", markersize=4)
        ax.set_xlabel(name)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("evaluation loss")
    figure.savefig(file, dpi=110)
