"""The training loop: steps, evaluations, checkpoints, early stopping."""

from __future__ import annotations

import contextlib
import math
import signal
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.train.checkpoints.fingerprint import frozen_checksum
from foveate.train.checkpoints.folder import Checkpoints
from foveate.train.checkpoints.output_folder import STATE
from foveate.train.checkpoints.state import load_tensors, save_tensors
from foveate.train.config import TrainConfig
from foveate.train.data.batch import Batch
from foveate.train.data.examples import Example, Examples
from foveate.train.data.plan import BatchPlan, ExampleIndex
from foveate.train.data.token_store import TokenStore
from foveate.train.interrupt import Interrupted, StopRequest
from foveate.train.modules.linear import speed_up_linear
from foveate.train.objectives.base import Objective
from foveate.train.optimizer import adamw
from foveate.train.report import Report, finite
from foveate.train.schedule import rate_factor
from foveate.train.strategy import Strategy

# What a state remembers of its run's plan that one that goes on need not have in common with it.
_EVALUATION, _WARMUP = "checksum of the evaluation data", "steps of the warm-up"
_MAY_CHANGE = (_EVALUATION, _WARMUP)


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient is not finite; the weights are those before the step, the batch lies in the output folder."""


class LossModule(nn.Module):
    """The model with its loss, as one module to be wrapped for several processes."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, evaluate: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the losses; with `evaluate` also sums of metrics."""
        if not evaluate:
            return self.objective.learn(self.model, batch)
        sums = self.objective.measure(self.model, batch)
        return sums.pop("loss"), sums


@dataclass(frozen=True)
class Dataset:
    """Tokenised data, the examples in it, and the order in which they are read."""

    store: TokenStore
    examples: Examples
    plan: BatchPlan

    def examples_of(self, packed_row: list[ExampleIndex]) -> list[Example]:
        documents, starts, lengths = self.examples
        return [Example(int(documents[i]), int(starts[i]), int(lengths[i]), (epoch, i)) for i, epoch in packed_row]


@dataclass
class Progress:
    """What a checkpoint remembers beside tensors."""

    step: int = 0  # finished optimizer steps
    tokens: int = 0
    best: dict[str, float] | None = None  # what the best evaluation measured
    stale: int = 0  # evaluations since it
    seconds: float = 0.0  # of training, over all starts


class Loop:
    """export(folder, weights) writes the model for others to load. after_evaluation(step, metrics) may raise to stop the run."""

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        objective: Objective,
        train: Dataset,
        evaluation: Dataset | None,
        *,
        checkpoints: Checkpoints,
        report: Report,
        strategy: Strategy,
        export: Callable[[Path, dict[str, Tensor]], None],
        after_evaluation: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.config, self.model, self.objective = config, model, objective
        self.train_data, self.evaluation = train, evaluation
        self.checkpoints, self.report, self.strategy = checkpoints, report, strategy
        self.export, self.after_evaluation = export, after_evaluation
        self.device = next(model.parameters()).device
        self._frozen = frozen_checksum(model)  # while no strategy has split them
        speed_up_linear(model)
        self.module = strategy.wrap(LossModule(model, objective))
        self.optimizer = adamw(
            model, learning_rate=config.learning_rate, weight_decay=config.weight_decay, betas=(config.beta1, config.beta2),
            eps=config.adam_eps,
        )  # fmt: skip
        self.progress, self._stop = Progress(), StopRequest()
        rows = config.step_rows * strategy.world_size
        self.epoch_steps = math.ceil(len(train.plan) / rows) * objective.steps_per_row
        if rows > len(train.plan):
            report.note(
                f"a step reads {rows} rows (batch_size x accumulation x processes), and the data are {len(train.plan)}"
                f"{' packed' if config.packing else ''}: each is read {rows / len(train.plan):.3g} times in a step; "
                "with a smaller batch_size it would be read once"
            )
        self.steps = (
            config.max_steps or max(1, math.ceil(config.epochs * len(train.plan) / rows)) * objective.steps_per_row
        )
        self.warmup_steps = round(config.warmup * self.steps) if config.warmup < 1 else round(config.warmup)
        self.eval_every = config.eval_every or self.epoch_steps
        self.save_every = config.save_every or self.eval_every

    def run(self) -> Progress:
        """Steps until the schedule's end or early stopping; leaves a checkpoint of the last step."""
        if self.progress.step >= self.steps:
            self.report.note(f"the run is at its end, step {self.progress.step}; a larger max_steps would prolong it")
        elif self._is_stale():
            self.report.note(
                f"the run stopped at step {self.progress.step}, after {self.progress.stale} evaluations without a better "
                f"{self.config.best_by}; a larger patience than {self.config.patience} would let it go on"
            )
        self.report.start(self.progress.step, self.steps)
        with self._stop.listening():
            for step in range(self.progress.step, self.steps if not self._is_stale() else 0):
                asked = self._step(step)
                done = step + 1
                better = False
                if self.evaluation is not None and (done % self.eval_every == 0 or done == self.steps):
                    better = self._evaluate(self.evaluation, done)
                stop = self._is_stale()
                if better or stop or asked or done % self.save_every == 0 or done == self.steps:
                    self._save(better)
                if stop:
                    self.report.note(
                        f"stopped: {self.progress.stale} evaluations without a better {self.config.best_by}"
                    )
                    break
                if asked:
                    last = self.checkpoints.named("last")
                    sentence = (
                        f"stopped after step {done} of {self.steps} with the checkpoint {last}; go on with resume"
                    )
                    raise Interrupted(sentence, self._stop.signal or signal.SIGTERM)
        return self.progress

    def _is_stale(self) -> bool:
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def resume(self) -> bool:
        """Goes on from the last checkpoint, if there is one."""
        last = self.checkpoints.named("last")
        if last is None:
            self.report.note(f"{self.checkpoints.folder} has no checkpoint to go on from, so the run begins at step 0")
            return False
        scalars = self.strategy.load_state(last / STATE, self.model, self.optimizer)
        self.objective.load_state(load_tensors(last / STATE / f"objective-{self.strategy.process}.safetensors"))
        fixed, free = self.config.changes(scalars["config"])
        plan, before = self._plan(), scalars["plan"]
        fixed += [f"{name}={value} (was {before.get(name)})" for name, value in plan.items()
                  if value != before.get(name) and name not in _MAY_CHANGE]  # fmt: skip
        if fixed:
            raise ValueError(
                f"{last} is of a run with other data or other options: {', '.join(fixed)}; go on with the same, or start in a new "
                "output folder"
            )
        if free:
            self.report.note(f"from here on other than before: {', '.join(free)}")
        self.progress = Progress(**scalars["progress"])
        self.report.note(f"going on from {last}")
        if plan[_EVALUATION] != before.get(_EVALUATION) or self.config.best_by != scalars["config"].get("best_by"):
            if self.progress.best is not None:
                self.report.note("the evaluation is another than before, so the best checkpoint is looked for anew")
            self.progress.best, self.progress.stale = None, 0
        if self.config.warmup == scalars["config"]["warmup"]:
            self.warmup_steps = before[
                _WARMUP
            ]  # a share is of the run as it began: a longer one does not warm up again
        self.report.forget_after(self.progress.step)
        return True

    def _step(self, step: int) -> bool:
        """One optimizer step. Whether a signal asks for an end after it, in any of the processes."""
        start = time.perf_counter()
        config, strategy = self.config, self.strategy
        lr = config.learning_rate * rate_factor(
            step, self.steps, schedule=config.schedule, warmup_steps=self.warmup_steps, min_factor=config.min_rate,
            decay_share=config.decay_share,
        )  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        place = step // self.objective.steps_per_row
        rows = self.train_data.plan.step(place, config.step_rows, strategy.rank, strategy.world_size)
        groups = [rows[i : i + config.pass_rows] for i in range(0, len(rows), config.pass_rows)]
        with self._autocast():
            batches = self._batches(self.train_data, groups, step)
        norms = [b.target_count if b.norm is None else b.norm for b in batches]
        counts = torch.tensor([sum(norms), sum(b.tokens for b in batches)], dtype=torch.float64, device=self.device)
        target_count, tokens = strategy.sum(counts).tolist()
        target_count = target_count or 1.0
        self.module.train()
        total = torch.zeros((), device=self.device)
        sums: dict[str, Tensor] = {}
        for i, batch in enumerate(batches):
            with strategy.accumulating(self.module, last=i == len(batches) - 1):
                with self._autocast():
                    loss, found = self.module(batch.to(self.device))
                (loss * (strategy.gradient_factor / target_count)).backward()
            total += loss.detach()
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double()
        norm = strategy.clip(self._parameters(), config.max_grad_norm or math.inf)
        summed, asked = strategy.sum(torch.stack([total, total.new_tensor(self._stop.signal)])).tolist()
        mean = summed / target_count
        if not (math.isfinite(mean) and math.isfinite(float(norm))):
            self._stop_at(step, batches, mean, float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress = self.progress
        seconds = time.perf_counter() - start
        progress.step, progress.tokens, progress.seconds = (
            step + 1,
            progress.tokens + int(tokens),
            progress.seconds + seconds,
        )
        self.report.step(
            step + 1, loss=mean, learning_rate=lr, grad_norm=float(norm), tokens=tokens, seconds=seconds,
            epoch=(step + 1) / self.epoch_steps, **self._measured(sums, batches),
        )  # fmt: skip
        return asked > 0

    def _measured(self, sums: dict[str, Tensor], batches: list[Batch]) -> dict[str, float]:
        """What the objective reports of a step beside its loss, from sums over the targets; {} where it reports nothing."""
        if not sums:
            return {}
        count = torch.tensor(float(sum(b.target_count for b in batches)), dtype=torch.float64, device=self.device)
        names = sorted(sums)
        whole = [self.strategy.sum(sums[name]) for name in names]
        total = max(float(self.strategy.sum(count)), 1.0)
        return self.objective.metrics({name: (value / total).cpu() for name, value in zip(names, whole)})

    def _evaluate(self, evaluation: Dataset, step: int) -> bool:
        """Whether the loss is the best so far."""
        metrics = self.evaluate(evaluation)
        self.report.evaluation(step, metrics)
        value, progress = metrics[self.config.best_by], self.progress
        better = math.isfinite(value)  # NaN or inf is never the best, and does not make another so
        if not better:
            self.report.note(f"step {step}: the evaluation's {self.config.best_by} is {value}")
        elif progress.best is not None:
            least, best = self.config.best_is_least, progress.best[self.config.best_by]
            better = value < best if least else value > best
        if better:
            progress.best, progress.stale = metrics, 0
        else:
            progress.stale += 1
        if self.after_evaluation is not None:
            self.after_evaluation(step, metrics)
        return better

    @torch.no_grad()
    def evaluate(self, data: Dataset) -> dict[str, float]:
        """Means over all targets of the data, and what the task measures as a whole."""
        self.module.eval()
        size, world = self.config.pass_rows, self.strategy.world_size
        sums: dict[str, Tensor] = {}
        # Each process makes the same number of calls; the rows that are missing at the end are read again, with weight 0.
        for first in range(0, len(data.plan), size * world):
            mine = [first + self.strategy.rank + i * world for i in range(size)]
            present = [row for row in mine if row < len(data.plan)]
            rows = [data.plan.packed_row(row) for row in present or [0]]
            with self._autocast():
                [batch] = self._batches(data, [rows], None)
                loss, found = self.module(batch.to(self.device), evaluate=True)
            found |= {"loss": loss, "target_count": torch.tensor(batch.target_count, device=self.device)}
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + value.double() * bool(present)
        whole = {name: self.strategy.sum(value) for name, value in sorted(sums.items())}
        target_count = max(float(whole.pop("target_count")), 1.0)
        means = self.objective.metrics({name: (value / target_count).cpu() for name, value in whole.items()})
        if self.objective.perplexity:
            # of an untrained model it may be more than a float holds
            means["perplexity"] = math.exp(min(means["loss"], 700.0))
        return means | self.objective.task_metrics(self.model)

    def _save(self, best: bool) -> None:
        def write(folder: Path) -> None:
            weights = self.strategy.weights(self.model)
            if self.strategy.is_main:
                self.export(folder, weights)
            scalars = {"progress": finite(vars(self.progress)), "plan": self._plan(), "config": self.config.as_dict()}
            self.strategy.save_state(folder / STATE, self.model, self.optimizer, scalars)
            save_tensors(folder / STATE / f"objective-{self.strategy.process}.safetensors", self.objective.state())

        self.checkpoints.save(self.progress.step, write, best=best)

    def _batches(self, data: Dataset, groups: list[list[list[ExampleIndex]]], step: int | None) -> list[Batch]:
        """A batch for each group of packed rows."""
        examples = [[example for row in group for example in data.examples_of(row)] for group in groups]
        made = self.objective.batches(self.model, data.store, examples, step)
        batches = [self.strategy.share(batch) for batch in made]
        self.objective.prepare(self.model, batches, self.strategy.sum)
        return batches

    def _parameters(self) -> list[Tensor]:
        return [p for p in self.model.parameters() if p.grad is not None]

    def _plan(self) -> dict[str, Any]:
        """What a run that goes on must have in common with its start, beside options, for its place in the data to mean the same."""
        plan = self.train_data.plan
        return {
            "rows a step": self.config.step_rows * self.strategy.world_size,
            "rows of the data": len(plan),
            "checksum of their lengths": zlib.crc32(np.ascontiguousarray(plan.lengths, np.int64).tobytes()),
            "checksum of their tokens": self.train_data.store.checksum,
            "checksum of the frozen weights": self._frozen,
            _EVALUATION: "" if self.evaluation is None else self.evaluation.store.checksum,
            _WARMUP: self.warmup_steps,
        }

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _stop_at(self, step: int, batches: list[Batch], loss: float, norm: float) -> None:
        from safetensors.torch import save_file

        file = self.checkpoints.folder / f"not_finite_step_{step + 1}_rank_{self.strategy.process}.safetensors"
        tensors = {f"{i}.{name}": t for i, batch in enumerate(batches) for name, t in batch.tensors.items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        last = self.checkpoints.named("last")
        raise NonFiniteLoss(
            f"the loss is {loss} and the gradient's norm {norm} at step {step + 1}, so training stopped before the weights were "
            f"changed; the batch is in {file}. "
            + (f"The last checkpoint is {last}. " if last else "There is no checkpoint yet. ")
            + "A lower learning_rate, a longer warmup, or max_grad_norm=1 usually cures it"
        )
