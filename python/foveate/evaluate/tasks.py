"""Tasks on local files for causal models: choices, generation, questions over a text, classes, perplexity, code."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foveate.evaluate import rows as fields
from foveate.evaluate.measured import Measured, Metric, ratio, shares
from foveate.evaluate.sandbox import Limits, run_python
from foveate.evaluate.scoring import Scored, Scorer
from foveate.generation.llm import LLM
from foveate.generation.params import SamplingParams
from foveate.progress import ProgressBar
from foveate.tokenizer import Tokenizer

Rows = Sequence[Mapping[str, Any]]


def tokenizer_of(llm: LLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer, so it cannot be measured on texts")
    return llm.tokenizer


def encode_pair(llm: LLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of a context and of what follows; spaces at the context's end belong to what follows. An empty context is the token
    that begins texts."""
    if context.strip() == "":
        ids = tokenizer_of(llm).encode(context + continuation, add_special_tokens=False)
        return [begin_id(llm)], ids
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    start = llm.encode(context)
    return start, llm.encode(context + continuation)[len(start) :]


def begin_id(llm: LLM) -> int:
    """The token before the first one of a text: the tokenizer's beginning of text, or its end of text."""
    tokenizer = tokenizer_of(llm)
    found = tokenizer.bos_id if tokenizer.bos_id is not None else min(tokenizer.eos_ids, default=None)
    if found is None:
        raise ValueError(
            "the tokenizer names no token that begins or ends a text, so the first token of a text has no probability"
        )
    return int(found)


def score_texts(
    llm: LLM, pairs: Sequence[tuple[str, str]], title: str = "scoring", progress: bool = False
) -> list[Scored]:
    """The scores of pairs (context, continuation)."""
    ids = [encode_pair(llm, *pair) for pair in pairs]
    with ProgressBar(title, "bar", "count", "remaining", total=len(ids), shown=progress) as bar:
        return Scorer(llm).score(ids, bar.advance)


def choices(llm: LLM, rows: Rows, name: str, *, progress: bool = False, template: str | None = None) -> Measured:
    """accuracy: the choice of the highest log-likelihood; accuracy_normalised: of the highest one for each byte of its text."""
    form = template or "Question: {question}\nAnswer:"
    pairs, counts, right, texts = [], [], [], []
    for row in rows:
        found, answer = fields.choices(row)
        context = form.replace("{question}", fields.take(row, "question"))
        pairs += [(context, " " + text) for text in found]
        counts.append(len(found))
        right.append(answer)
        texts.append(found)
    scored = score_texts(llm, pairs, name, progress)
    plain, normalised, at = [], [], 0
    for count, answer, found in zip(counts, right, texts):
        totals = np.array([one.total for one in scored[at : at + count]])
        at += count
        plain.append(int(totals.argmax()) == answer)
        normalised.append(int((totals / [max(1, len(text.encode())) for text in found]).argmax()) == answer)
    return Measured(name, "choices", "accuracy", {"accuracy": shares(plain), "accuracy_normalised": shares(normalised)})


def normalised(text: str) -> str:
    """SQuAD's: small letters, no punctuation, no articles, single spaces."""
    text = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def f1(prediction: str, truth: str) -> float:
    """F1 of the words of the normalised texts (Rajpurkar et al. 2016); of the characters where no spaces stand between words."""
    a, b = normalised(prediction), normalised(truth)
    cjk = re.search(r"[\u3040-\u9fff]", b)
    left, right = (list(a.replace(" ", "")), list(b.replace(" ", ""))) if cjk else (a.split(), b.split())
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 0.0 if not common else 2 * common / (len(left) + len(right))


def _answered(
    llm: LLM,
    prompts: list[str],
    rows: Rows,
    kind: str,
    name: str,
    most: int,
    stop: list[str],
    progress: bool,
    chat: bool,
) -> Measured:
    params = SamplingParams(temperature=0.0, max_tokens=most, stop=None if chat else stop)
    given: list[Any] = [llm.encode_chat([{"role": "user", "content": p}]) for p in prompts] if chat else list(prompts)
    outputs = llm.generate(given, params, progress=progress)
    exact, overlap, examples = [], [], []
    for row, prompt, output in zip(rows, prompts, outputs):
        said, truths = output.outputs[0].text.strip(), fields.answers(row)
        exact.append(any(normalised(said) == normalised(truth) for truth in truths))
        overlap.append(max(f1(said, truth) for truth in truths))
        examples.append({"prompt": prompt[-200:], "said": said, "wanted": truths[0]})
    return Measured(name, kind, "f1", {"exact_match": shares(exact), "f1": Metric(overlap)}, examples=examples[:5])


def generation(
    llm: LLM, rows: Rows, name: str, *, progress: bool = False, max_tokens: int = 64, chat: bool = False
) -> Measured:
    """exact_match and f1 of what is generated greedily, up to the end of its line without a chat template."""
    prompts = [fields.take(row, "prompt") for row in rows]
    return _answered(llm, prompts, rows, "generation", name, max_tokens, ["\n"], progress, chat)


def questions(
    llm: LLM, rows: Rows, name: str, *, progress: bool = False, max_tokens: int = 32, chat: bool = False
) -> Measured:
    """Questions over a text, in SQuAD's shape: exact_match and f1."""
    prompts = []
    for row in rows:
        context, question = row.get("context"), row.get("question")
        if not isinstance(context, str) or not isinstance(question, str):
            raise ValueError(f"{getattr(row, 'place', 'a row')} needs the fields question and context, both texts")
        prompts.append(f"{context}\n\nQuestion: {question}\nAnswer:")
    return _answered(llm, prompts, rows, "qa", name, max_tokens, ["\n"], progress, chat)


def macro_f1(rows: np.ndarray) -> float:
    """The mean F1 of the classes that are right for some of the rows (number of the right class, number of the given one)."""
    values = []
    for label in np.unique(rows[:, 0]):
        hit = ((rows[:, 0] == label) & (rows[:, 1] == label)).sum()
        values.append(2 * hit / ((rows[:, 0] == label).sum() + (rows[:, 1] == label).sum()))
    return float(np.mean(values))


def classes(model: Any, rows: Rows, name: str, *, progress: bool = False) -> Measured:
    """Texts and their classes: by the log-likelihood of the classes' names after the text, or by a TextClassifier."""
    texts = [fields.take(row, "text") for row in rows]
    wanted = [str(fields.take(row, "class", object)) for row in rows]
    labels = sorted(set(wanted))
    if hasattr(model, "labels"):
        unknown = [label for label in labels if label not in model.labels]
        if unknown:
            raise ValueError(f"{name} has the class {unknown[0]!r}, and the model has {', '.join(model.labels)}")
        given = [found["label"] for found in model(texts)]
        labels = list(model.labels)
    else:
        if len(labels) < 2:
            raise ValueError(f"{name} has the one class {labels[0]!r}; it needs at least two")
        pairs = [(f"Text: {text}\nLabel:", f" {label}") for text in texts for label in labels]
        totals = np.array([one.total for one in score_texts(model, pairs, name, progress)]).reshape(len(texts), -1)
        given = [labels[i] for i in totals.argmax(1)]
    pairs_of_numbers = [(labels.index(a), labels.index(b)) for a, b in zip(wanted, given)]
    metrics = {
        "accuracy": shares([a == b for a, b in zip(wanted, given)]), "macro_f1": Metric(pairs_of_numbers, macro_f1),
    }  # fmt: skip
    return Measured(name, "classification", "accuracy", metrics)


def perplexity(llm: LLM, rows: Rows, name: str, *, progress: bool = False, stride: int | None = None) -> Measured:
    """exp of the mean negative log-likelihood of each token, and bits for each byte. Windows of the model's context begin every
    `stride` tokens, each scoring what the one before it did not; by default half of the context."""
    length = llm.max_model_len
    stride = stride or length // 2
    if not 1 <= stride <= length:
        raise ValueError(f"stride={stride} must be from 1 to the context, {length}")
    requests: list[tuple[list[int], list[int]]] = []
    owners: list[int] = []
    sizes = []
    for number, row in enumerate(rows):
        text = fields.take(row, "text")
        ids = [begin_id(llm), *tokenizer_of(llm).encode(text, add_special_tokens=False)]
        sizes.append((len(ids) - 1, len(text.encode())))
        at = 1
        while at < len(ids):
            end = min(len(ids), at + (length if at == 1 else stride))
            requests.append((ids[max(0, end - length - 1) : at], ids[at:end]))
            owners.append(number)
            at = end
    with ProgressBar(name, "bar", "count", "remaining", total=len(requests), shown=progress) as bar:
        scored = Scorer(llm).score(requests, bar.advance)
    losses = [0.0] * len(sizes)
    for owner, one in zip(owners, scored):
        losses[owner] -= one.total
    by_token, _ = ratio("lower", math.exp)
    by_byte, _ = ratio("lower", lambda value: value / math.log(2))
    metrics = {
        "perplexity": Metric([(loss, n) for loss, (n, _) in zip(losses, sizes)], by_token, better="lower"),
        "bits_per_byte": Metric([(loss, n) for loss, (_, n) in zip(losses, sizes)], by_byte, better="lower"),
    }
    note = "one text: there is nothing to draw from, so the interval is a point" if len(sizes) == 1 else ""
    return Measured(name, "perplexity", "perplexity", metrics, note)


def code(
    llm: LLM, rows: Rows, name: str, *, progress: bool = False, max_tokens: int = 256, limits: Limits = Limits(),  # noqa: B008
    allowed: bool = False,
) -> Measured:  # fmt: skip
    """pass@1: prompt, what the model writes greedily, and the test, run as one program that must end with status 0."""
    if not allowed:
        raise ValueError(
            f"{name} runs programs that the model writes; allow it with --run-code (run_code=True), best inside a container"
        )
    prompts = [fields.take(row, "prompt") for row in rows]
    tests = [fields.take(row, "test") for row in rows]
    stop = ["\ndef ", "\nclass ", "\nif __name__", "\nprint(", "\n#", "```"]
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=stop), progress=progress
    )
    passed, examples = [], []
    for prompt, output, test in zip(prompts, outputs, tests):
        ran = run_python(f"{prompt}{output.outputs[0].text}\n\n{test}\n", limits)
        passed.append(ran.passed)
        examples.append({"prompt": prompt[-200:], "said": output.outputs[0].text, "reason": ran.reason})
    return Measured(name, "code", "pass@1", {"pass@1": shares(passed)}, examples=examples[:5])


KINDS: dict[str, Callable[..., Measured]] = {
    "choices": choices, "generation": generation, "qa": questions, "classification": classes, "perplexity": perplexity, "code": code,
}  # fmt: skip


def kind_of(row: Mapping[str, Any], file: str | Path) -> str:
    """The shape of a file's first row."""
    if fields.has(row, "prompt", "test"):
        return "code"
    if any(isinstance(row.get(key), (list, dict)) for key in ("choices", "options", "endings")):
        return "choices"
    if row.get("question") is not None and row.get("context") is not None and row.get("answers") is not None:
        return "qa"
    if fields.has(row, "prompt", "answer"):
        return "generation"
    if fields.has(row, "text", "class"):
        return "classification"
    if fields.has(row, "text"):
        return "perplexity"
    raise ValueError(
        f"{file} has rows of {', '.join(row)}, which fit no task; name one, as KIND={file}: {', '.join(KINDS)}"
    )
