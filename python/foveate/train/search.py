"""Hyper-parameter search with Optuna: grid, random, or TPE; bad trials stop early; the study lies in a SQLite file and goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import shutil
import sqlite3
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foveate.train.checkpoints.fingerprint import sources
from foveate.train.checkpoints.output_folder import RECORD, Record
from foveate.train.config import SAMPLERS, TrainConfig
from foveate.train.curve import new_figure
from foveate.train.fitting import fit
from foveate.train.loop import NonFiniteLoss

STUDY = "search.db"
_NOT_SEARCHED = ("output_dir", "resume", "strategy", "context_parallel")
# What a search that goes on may have otherwise: the data and the models are compared by their contents.
_PLACES = (
    "output_dir", "cache_dir", "train_data", "eval_data", "model", "tokenizer", "threads", "resume", "progress", "tensorboard", "log_every",
    "save_every",
)  # fmt: skip


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
    if name not in typing.get_type_hints(TrainConfig) or name in _NOT_SEARCHED or not values:
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


def _check_values(config: TrainConfig, ranges: Sequence[Range]) -> None:
    """ValueError before the first trial for values that no trial could take."""
    hints = typing.get_type_hints(TrainConfig)
    for r in ranges:
        for value in r.choices or (r.low, r.high):
            kinds = typing.get_args(hints[r.name]) or (hints[r.name],)
            fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
            if not fits or (isinstance(value, bool) and bool not in kinds):
                raise ValueError(f"{r.name}={value!r} is of type {type(value).__name__}, which {r.name} does not take")
            config.replace(**{r.name: value})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


@dataclass(frozen=True)
class SearchResult:
    """best: the values of the best trial, best_loss what config.best_by was there; trials: one dictionary each, with number, state, the
    same as "loss", and values."""

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
    """Trains with values from `ranges` and keeps what gives the best evaluation by config.best_by.

    config.output_dir gets the study (search.db), a folder for each trial, and search.png. A search with the same folder, config and
    ranges goes on: `trials` is the number of all. grid tries every combination of choices, and 5 points of a range. pruning stops a
    trial whose loss at an evaluation is worse than the median of the others there. workers: processes side by side, that share the
    study. timeout: seconds after which no new trial begins. A trial that ends in an error is counted as failed, and the others go on.
    ValueError without data to evaluate on, for a study of other data, models or options, or when no trial comes to an end.
    """
    optuna = _optuna()
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler={sampler!r} is not one of {', '.join(SAMPLERS)}")
    if not ranges:
        raise ValueError("there is nothing to search over; give a range, such as learning_rate=1e-5:1e-3:log")
    if not (config.eval_data or config.eval_fraction):
        raise ValueError("a search compares evaluation losses; give eval_data or eval_fraction")
    if config.merge:
        raise ValueError(
            "a search keeps no weights, so there is nothing to merge; merge when you train with the best values"
        )
    if trials < 1 or workers < 1:
        raise ValueError(f"trials={trials} and workers={workers} must be 1 or more")
    _check_values(config, ranges)
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(optuna, folder, ranges, sampler, pruning, config)  # made before the workers share it
    _check_same(study, config, ranges)
    arguments = (config, list(ranges), trials, sampler, pruning, timeout)
    if workers == 1:
        _work(*arguments, 0)
    else:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        processes = [context.Process(target=_work_beside, args=(*arguments, i)) for i in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed:
            raise RuntimeError(f"{len(failed)} of {workers} workers failed, see above; what they found is kept")
    study = _study(optuna, folder, ranges, sampler, pruning, config)
    found = [
        {"number": t.number, "state": _STATES.get(t.state.name, t.state.name.lower()), "loss": t.value, **t.params}
        for t in study.get_trials(deepcopy=False)
    ]
    if not any(row["state"] == "complete" for row in found):
        errors = [t.user_attrs["error"] for t in study.get_trials(deepcopy=False) if "error" in t.user_attrs]
        reason = f"; the last one: {errors[-1]}" if errors else "; try lower learning rates"
        raise ValueError(f"none of {len(found)} trials came to an end with a finite loss{reason}")
    _draw(study, [r.name for r in ranges], folder / "search.png")
    return SearchResult(study.best_params, study.best_value, found, folder)


_STATES = {"RUNNING": "killed", "FAIL": "failed"}  # of trials when no worker is at work any more


def _check_same(study: Any, config: TrainConfig, ranges: Sequence[Range]) -> None:
    """ValueError where a study has trials of another search, whose losses mean something else."""
    options = {name: value for name, value in config.as_dict().items() if name not in _PLACES}
    now = {"ranges": [dataclasses.asdict(r) for r in ranges], "config": options, "sources": sources(config)}
    now = json.loads(json.dumps(now))  # tuples are lists in the study
    before = study.user_attrs.get("search")
    if before is None:
        study.set_user_attr("search", now)
        return
    changed = [
        f"{name}={value} (was {before['config'].get(name)})"
        for name, value in now["config"].items()
        if value != before["config"].get(name)
    ]
    known = before.get("sources", {})
    changed += [f"the content of {name}" for name in sorted(now["sources"].keys() | known.keys())
                if now["sources"].get(name) != known.get(name)]  # fmt: skip
    if now["ranges"] != before["ranges"]:
        changed.append("the ranges")
    if changed:
        raise ValueError(
            f"{config.output_dir} has the study of another search, with other values for {', '.join(changed)}; choose another output_dir"
        )


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise ImportError('optuna is not installed: pip install "foveate[search]"') from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what goes wrong in a trial is raised
    return optuna


def _study(
    optuna: Any,
    folder: Path,
    ranges: Sequence[Range],
    sampler: str,
    pruning: bool,
    config: TrainConfig,
    worker: int = 0,
) -> Any:
    """What its sampler draws depends on the seed, on the worker, and on how many trials there are: at each start it draws others."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3) if pruning else optuna.pruners.NopPruner()
    file = (folder / STUDY).resolve()
    # Opened by path: in a URL some characters of a folder's name would mean something else.
    opened = {"creator": lambda: sqlite3.connect(file, timeout=60, check_same_thread=False)}
    storage = optuna.storages.RDBStorage(f"sqlite:///{STUDY}", engine_kwargs=opened)
    study = optuna.create_study(
        study_name="foveate", storage=storage, pruner=pruner, load_if_exists=True,
        direction="minimize" if config.best_is_least else "maximize",
    )  # fmt: skip
    made = len(study.get_trials(deepcopy=False))
    seed = int(np.random.SeedSequence([config.seed, worker, made]).generate_state(1)[0])
    if sampler == "grid":
        # Its trials are numbers of points in an order that the seed shuffles, so one that goes on needs the order of the first start.
        study.sampler = optuna.samplers.GridSampler({r.name: _points(r) for r in ranges}, seed=config.seed)
    else:
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[sampler]
        study.sampler = kind(seed=seed)
    return study


def _points(r: Range, count: int = 5) -> list[Any]:
    if r.low is None or r.high is None:
        return list(r.choices)
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
    study = _study(optuna, folder, ranges, sampler, pruning, config, worker)

    def objective(trial: Any) -> float:
        values = {r.name: r.suggest(trial) for r in ranges}
        output = folder / f"trial-{trial.number:04d}"
        if output.exists():
            if not (output / RECORD).exists():
                raise ValueError(
                    f"{output} was there before and is of no trial; move it away, or choose another output_dir"
                )
            shutil.rmtree(output)  # of a trial that was killed before the study knew of it

        def report(step: int, metrics: dict[str, float]) -> None:
            trial.report(metrics[config.best_by], step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            quiet = {"progress": bool(config.progress), **values}
            result = fit(config.replace(output_dir=str(output), **quiet), after_evaluation=report)
        except NonFiniteLoss as error:
            raise optuna.TrialPruned(str(error)) from error
        except optuna.TrialPruned:
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{error}" if isinstance(error, (ValueError, OSError)) else repr(error))
            raise _Failed from error
        finally:
            _forget_weights(output)
        if not result.best_metrics:
            raise optuna.TrialPruned("no evaluation gave a finite number")
        return result.best_metrics[config.best_by]

    def tell(study: Any, trial: Any) -> None:
        if "error" in trial.user_attrs:
            print(f"trial {trial.number} failed: {trial.user_attrs['error']}", file=sys.stderr)
        elif config.progress is not False:
            loss = "" if trial.value is None else f" loss {trial.value:.5g}"
            values = "".join(f" {name}={value}" for name, value in trial.params.items())
            print(f"trial {trial.number} {trial.state.name.lower()}{loss}{values}", file=sys.stderr)

    states = optuna.trial.TrialState
    counted = (states.COMPLETE, states.PRUNED, states.FAIL)
    limit = optuna.study.MaxTrialsCallback(trials, states=counted)
    done = len(study.get_trials(deepcopy=False, states=counted))
    if done < trials and not (sampler == "grid" and study.sampler.is_exhausted(study)):
        study.optimize(objective, callbacks=[tell, limit], timeout=timeout, catch=(_Failed,))


class _Failed(Exception):
    """The failure of one trial; the others go on."""


def _work_beside(*arguments: Any) -> None:
    """In a process of its own, which Ctrl-C reaches too: the one that started it says so."""
    with contextlib.suppress(KeyboardInterrupt):
        _work(*arguments)


def _forget_weights(folder: Path) -> None:
    """Keeps the metrics and the curve of a trial alone; the best values are trained again where the model is wanted."""
    record = Record.read(folder) if folder.exists() else None
    if record is None:
        return
    for name in (*record.checkpoints, *record.copies):
        shutil.rmtree(folder / name, ignore_errors=True)
    for link in ("last", "best"):
        if (folder / link).is_symlink():
            (folder / link).unlink()
    Record().write(folder)


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
