"""What scores completions: functions by their names, and reward models by their folders."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.models import load_model, open_checkpoint
from foveate.tokenizer import Tokenizer
from foveate.train.data import preferences
from foveate.train.data.batch import Batch, join, layout
from foveate.train.objectives.pairs import encoded
from foveate.train.objectives.reward_model import rewards as rewards_of

# reward(prompts=[...], completions=[...], completion_ids=[...], and a list for each other field of the rows) -> a number for each
# completion, None where it has no opinion: TRL's signature. Functions get what they have parameters for.
Reward = Callable[..., Sequence[float | None]]


class RewardScorer:
    """A reward model of `foveate train --objective reward`, as a reward function: the same text gets the number that it got there.

    max_length: tokens of prompt and completion that are read, the model's context by default."""

    def __init__(
        self, path: str | Path, *, device: torch.device | str | None = None, max_length: int | None = None
    ) -> None:
        checkpoint = open_checkpoint(path)
        names = checkpoint.config.get("architectures") or [""]
        if not str(names[0]).endswith("ForSequenceClassification"):
            raise ValueError(
                f"{path} is a {names[0] or 'checkpoint without a class'}, no reward model; train one by objective='reward'"
            )
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise ValueError(f"{path} has no tokenizer")
        self.tokenizer: Tokenizer = tokenizer
        model: Any = load_model(checkpoint, device=device, dtype=torch.float32, quantization="none", progress=False)
        labels = getattr(model.config, "num_labels", 0)
        if labels != 1 or not hasattr(model, "score"):
            raise ValueError(f"{path} has {labels} labels; a reward model is a decoder with one")
        self.model: Any = model
        self.max_length: int = max_length or model.config.max_positions
        self.__name__ = Path(path).name

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Texts, or lists of messages, as rows of preferences have them."""
        rows = [
            {"prompt": prompt, "completion": completion, "label": True}
            for prompt, completion in zip(prompts, completions)
        ]
        samples = [preferences.judged(row, self.tokenizer)[0][0] for row in rows]
        tokens = [ids[: self.max_length] for ids, _ in encoded(samples, self.tokenizer)]
        device = next(self.model.parameters()).device
        found: list[float] = []
        for first in range(0, len(tokens), 16):
            part = tokens[first : first + 16]
            packed, _ = layout([len(ids) for ids in part], True)
            batch = Batch({"tokens": join(part, True)}, packed, len(part), 0).to(device)
            found += rewards_of(self.model, batch).tolist()
        return found


def resolve(names: Sequence[str], device: torch.device | str | None = None) -> list[Reward]:
    """MODULE:FUNCTION, FILE.py:FUNCTION, or the folder of a reward model. ValueError, in a sentence, for what is none of them."""
    return [_resolve(name, device) for name in names]


def _resolve(name: str, device: torch.device | str | None) -> Reward:
    if Path(name).expanduser().is_dir():
        return RewardScorer(Path(name).expanduser(), device=device)
    where, _, attribute = name.rpartition(":")
    if not where or not attribute:
        raise ValueError(
            f"reward={name!r} is neither MODULE:FUNCTION nor FILE.py:FUNCTION nor the folder of a reward model"
        )
    try:
        if where.endswith(".py"):
            file = Path(where).expanduser()
            spec = importlib.util.spec_from_file_location(f"foveate_reward_{file.stem}", file)
            if spec is None or spec.loader is None or not file.exists():
                raise ValueError(f"reward={name!r}: {file} is not there")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except ImportError as error:
        raise ValueError(f"reward={name!r}: {where} cannot be imported ({error})") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"reward={name!r}: {where} has no function {attribute}")
    return found


def scored(functions: Sequence[Reward], fields: dict[str, list[Any]]) -> np.ndarray:
    """float64 [completions]: the sum of what the functions say. ValueError for results that are no numbers."""
    count = len(fields["completions"])
    total = np.zeros(count)
    for function in functions:
        name = getattr(function, "__name__", type(function).__name__)
        result = list(function(**_accepted(function, fields)))
        if len(result) != count:
            raise ValueError(f"the reward {name} gave {len(result)} numbers for {count} completions")
        for i, value in enumerate(result):
            try:
                number = 0.0 if value is None else float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise ValueError(
                    f"the reward {name} gave {value!r:.60} for {fields['completions'][i]!r:.60}; it must be a number"
                )
            total[i] += number
    return total


def _accepted(function: Reward, fields: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return fields
    return {p.name: fields[p.name] for p in parameters if p.name in fields}
