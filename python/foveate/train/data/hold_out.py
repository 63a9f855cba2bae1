"""Which part of the training data is held out to evaluate on: a share of its tokens, drawn by the seed."""

from __future__ import annotations

import numpy as np

from foveate.train.data.examples import Examples, Parts


def hold_out(examples: Examples, parts: Parts, share: float, seed: int) -> np.ndarray:
    """bool [examples]: those that are held out, `share` of the tokens of each class, as near as whole groups come to it.

    Groups are drawn in random order. A class of one group is not held out, and neither are all. Where whole groups miss the share by more
    than a quarter of it, as with few long texts, the end of a divisible document is held out too.
    ValueError where nothing can be held out, or nothing would be left.
    """
    lengths = examples.lengths.astype(np.int64)
    rng = np.random.default_rng([seed, 1])
    groups, which = np.unique(parts.groups[examples.documents], return_inverse=True)
    tokens = np.bincount(which, lengths, len(groups)).astype(np.int64)
    classes = np.zeros(len(groups), np.int64)
    classes[which] = parts.classes[examples.documents]
    held = np.zeros(len(groups), bool)
    missing = 0.0  # of the classes before
    for each in rng.permutation(np.unique(classes)):
        members = rng.permutation(np.flatnonzero(classes == each))
        wanted = share * tokens[members].sum() + missing
        if len(members) > 1:
            held[_nearest(members, tokens, wanted)] = True
        missing = wanted - tokens[members][held[members]].sum()
    out = held[which]
    total, wanted = lengths.sum(), share * lengths.sum()
    if abs(wanted - lengths[out].sum()) > wanted / 4:
        _divide(out, examples, parts.divisible, wanted, rng)
    if not out.any() and len(groups) > 1:
        out[which == np.argmin(tokens)] = True
    if out.all() or not out.any():
        raise ValueError(
            f"eval_fraction={share} of the data, which are {len(groups)} texts of {total} tokens in {len(lengths)} examples, leaves none "
            "to train or to evaluate on; give eval_data, or more rows"
        )
    return out


def _nearest(members: np.ndarray, tokens: np.ndarray, wanted: float) -> list[int]:
    """In this order, each that brings the sum nearer to `wanted`; never all."""
    chosen: list[int] = []
    total = 0
    for member in members.tolist():
        if abs(total + tokens[member] - wanted) < abs(total - wanted) and len(chosen) + 1 < len(members):
            chosen.append(member)
            total += int(tokens[member])
    return chosen


def _divide(
    out: np.ndarray, examples: Examples, divisible: np.ndarray, wanted: float, rng: np.random.Generator
) -> None:
    """Holds out the last examples of documents that have several, until there are as many tokens as wanted; less if there are too many."""
    documents, counts = np.unique(examples.documents, return_counts=True)
    long = documents[divisible[documents] & (counts > 1)]
    if len(long) and examples.lengths[out].sum() > wanted:
        out[np.isin(examples.documents, long)] = False
    gap = wanted - examples.lengths[out].sum()
    for document in rng.permutation(long):
        mine = np.flatnonzero((examples.documents == document) & ~out)[1:]  # the first one stays
        for example in mine[np.argsort(-examples.starts[mine])].tolist():
            if gap <= examples.lengths[example] / 2:
                return
            out[example] = True
            gap -= examples.lengths[example]
