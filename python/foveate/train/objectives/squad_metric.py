"""Exact match and F1 of answers, as SQuAD's evaluation script defines them (Rajpurkar et al. 2016, arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    return float(normalize(prediction) == normalize(truth))


def f1(prediction: str, truth: str) -> float:
    """2 P R / (P + R) over the words that both have, counted as often as they occur; without words, 1 if both have none."""
    predicted, true = normalize(prediction).split(), normalize(truth).split()
    if not predicted or not true:
        return float(predicted == true)
    common = sum((Counter(predicted) & Counter(true)).values())
    return 2 * common / (len(predicted) + len(true))


def scores(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """Means in percent; of several true answers the best counts. A question without answers has the answer ""."""
    sums = {"exact_match": 0.0, "f1": 0.0}
    for prediction, answers in zip(predictions, truths):
        for name, measure in (("exact_match", exact_match), ("f1", f1)):
            sums[name] += max(measure(prediction, answer) for answer in answers or [""])
    return {name: 100 * value / len(predictions) for name, value in sums.items()}
