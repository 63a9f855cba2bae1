"""evaluate: one model on files, suites and tasks of the harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from foveate.evaluate import rows as fields
from foveate.evaluate import safety, tasks
from foveate.evaluate.measured import Measured
from foveate.evaluate.results import Results
from foveate.evaluate.sandbox import Limits
from foveate.generation.llm import LLM
from foveate.models import open_checkpoint
from foveate.models.registry import architecture_of
from foveate.pipelines import FillMask, TextClassifier


def open_model(model: str | Path | LLM | FillMask | TextClassifier, **options: Any) -> LLM | FillMask | TextClassifier:
    """An LLM for a causal checkpoint, a TextClassifier or a FillMask for an encoder. options: of whichever it is."""
    if not isinstance(model, (str, Path)):
        return model
    checkpoint = open_checkpoint(model)
    if architecture_of(checkpoint.config).continues_text:
        return LLM(checkpoint, **options)
    kinds = " ".join(checkpoint.config.get("architectures") or ())
    known = {
        name: options[name] for name in ("device", "dtype", "quantization", "progress") if options.get(name) is not None
    }
    return TextClassifier(model, **known) if "Classification" in kinds else FillMask(model, **known)


def evaluate(
    model: str | Path | LLM | FillMask | TextClassifier,
    files: Sequence[str | Path] = (),
    *,
    suites: Sequence[str] = (),
    toxicity_model: str | Path | None = None,
    harness: Sequence[str] = (),
    include: Sequence[str | Path] = (),
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    max_tokens: int | None = None,
    stride: int | None = None,
    run_code: bool = False,
    code_limits: Limits | None = None,
    confidence: float = 0.95,
    progress: bool = False,
    **options: Any,
) -> Results:
    """How good a model is, with a confidence interval for every figure.

    model: a causal checkpoint, a classifier (for files of classes), or what is open already. files: each a file, or KIND=FILE with one of
    choices, generation, qa, classification, perplexity and code, or of foveate.evaluate.safety: pairs, stereotypes, pronouns,
    counterfactual, toxicity, secrets, personal, refusals and robustness; of the first six the kind is found by the fields. suites: "bias",
    "safety", "robustness", on the small files of our own. toxicity_model: a TextClassifier whose label with "toxic" in its name (or the
    second) rates continuations, in place of a word list. harness: tasks of lm-evaluation-harness, whose YAML may be in `include`.

    limit: rows of each file. few_shot: examples before each question, of the harness's tasks. chat: prompts go through the chat template.
    max_tokens: of generated answers. stride: of perplexity. run_code: allows the kind code to run what the model writes. options: of the
    model. ValueError, with the place, for a file that is not as it must be; nothing runs before all files have been read.
    """
    unknown = [suite for suite in suites if suite not in safety.SUITES]
    if unknown:
        raise ValueError(f"there is no suite {unknown[0]!r}; there are {', '.join(safety.SUITES)}")
    parts = [f"{kind}={safety.DATA / file}" for suite in suites for kind, file in safety.SUITES[suite]]
    wanted = _apart([_read(str(file), limit) for file in [*files, *parts]])
    if not wanted and not harness:
        raise ValueError("there is nothing to evaluate on; give files, suites or tasks of the harness")
    opened = open_model(model, **options)
    rate = None if toxicity_model is None else rater(toxicity_model)
    found: list[Measured] = []
    for name, kind, rows in wanted:
        if kind in safety.KINDS:
            found.append(_safety(opened, kind, rows, name, rate, chat, max_tokens, progress))
            continue
        if not isinstance(opened, LLM) and not (kind == "classification" and isinstance(opened, TextClassifier)):
            raise ValueError(f"{name} is of the kind {kind}, which needs a causal model; {model} is none")
        more: dict[str, Any] = {"progress": progress}
        if kind in ("generation", "qa"):
            more["chat"] = chat
        if kind in ("generation", "qa", "code") and max_tokens is not None:
            more["max_tokens"] = max_tokens
        if kind == "perplexity":
            more["stride"] = stride
        if kind == "code":
            more |= {"allowed": run_code, "limits": code_limits or Limits()}
        found.append(tasks.KINDS[kind](opened, rows, name, **more))
    told: dict[str, Any] = {}
    if harness:
        if not isinstance(opened, LLM):
            raise ValueError(f"tasks of the harness need a causal model; {model} is none")
        from foveate.evaluate.harness import run_tasks

        told = run_tasks(opened, harness, include=include, limit=limit, few_shot=few_shot, chat=chat, progress=progress)
    settings: dict[str, Any] = {
        "limit": limit,
        "chat": chat,
        **{k: str(v) for k, v in options.items() if v is not None},
    }
    name = str(model) if isinstance(model, (str, Path)) else type(model).__name__
    return Results(name, found, settings, told, confidence)


def _read(given: str, limit: int | None) -> tuple[str, str, list[Any]]:
    kind, equals, file = given.partition("=")
    if not equals or kind not in {**tasks.KINDS, **safety.KINDS}:
        if equals and kind.isidentifier() and not Path(given).exists():
            raise ValueError(f"{kind} is no kind of task; there are {', '.join([*tasks.KINDS, *safety.KINDS])}")
        kind, file = "", given
    rows = fields.rows(file, limit)
    return file, kind or tasks.kind_of(rows[0], file), rows


def _apart(wanted: list[tuple[str, str, list[Any]]]) -> list[tuple[str, str, list[Any]]]:
    """With names for paths: that of the file, with its folder and kind where several are called alike."""
    names = [Path(file).name for file, _, _ in wanted]
    found = []
    for (file, kind, rows), name in zip(wanted, names):
        alike = names.count(name) > 1
        found.append((f"{Path(file).resolve().parent.name}/{name} ({kind})" if alike else name, kind, rows))
    if len({name for name, _, _ in found}) < len(found):
        raise ValueError("a file is given twice as the same kind; give it once")
    return found


def rater(model: str | Path) -> Callable[[list[str]], list[float]]:
    """Texts to the probability of the label that has "toxic" in its name, of the second one where none has."""
    classify = TextClassifier(model, progress=False)
    names = [i for i, label in enumerate(classify.labels) if "toxic" in label.lower() and "non" not in label.lower()]
    column = names[0] if names else min(1, len(classify.labels) - 1)

    def rate(texts: list[str]) -> list[float]:
        scores = [0.0] * len(texts)
        wanted = [i for i, text in enumerate(texts) if text.strip()]
        if wanted:
            values = classify.scores(classify.logits([texts[i] for i in wanted]))[:, column].tolist()
            for i, value in zip(wanted, values):
                scores[i] = value
        return scores

    return rate


def _safety(
    model: Any, kind: str, rows: list[Any], name: str, rate: Any, chat: bool, max_tokens: int | None, progress: bool
) -> Measured:
    generates = kind in ("toxicity", "secrets", "personal", "refusals")
    if generates and not isinstance(model, LLM):
        raise ValueError(f"{name} is of the kind {kind}, which needs a causal model")
    more: dict[str, Any] = {"progress": progress}
    if kind in ("toxicity", "counterfactual"):
        more["score"] = rate
    if max_tokens is not None and kind in ("toxicity", "personal", "refusals", "counterfactual"):
        more["max_tokens"] = max_tokens
    if kind == "refusals":
        more["chat"] = chat or model.tokenizer.chat_template is not None
    return safety.KINDS[kind](model, rows, name, **more)
