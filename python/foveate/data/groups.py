"""Groups of equal and of nearly equal things, and which of a group is kept."""

from __future__ import annotations

import numpy as np

from foveate.data.shingles import MinHash, mixed


def first_of_equal(hashes: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """int64 [n]: for each of n things the number of the equal one that is kept, -1 for that one. hashes: uint64 [n, 2]. rank: int64 [n], of
    a group the least is kept."""
    kept = np.full(len(hashes), -1, np.int64)
    if len(hashes) == 0:
        return kept
    order = np.lexsort((rank, hashes[:, 1], hashes[:, 0]))
    ordered = hashes[order]
    new = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    first = order[np.flatnonzero(new)[np.cumsum(new) - 1]]
    kept[order] = np.where(first == order, -1, first)
    return kept


def first_of_near(
    signatures: np.ndarray,
    kept: np.ndarray,
    similarity: np.ndarray,
    rank: np.ndarray,
    *,
    threshold: float,
    bands: int,
    rows: int,
) -> None:
    """Fills `kept` (see `first_of_equal`) and `similarity` (float32 [n], to the kept one; left as it is for equal things) in place.

    signatures: uint32 [n, permutations]. Things that agree in all rows of a band are compared, each with the first of its band and with
    the one before it; pairs of at least the threshold are joined into groups.
    """
    alive = np.flatnonzero((kept < 0) & (signatures != MinHash.EMPTY).any(axis=1))
    parent = np.arange(len(signatures), dtype=np.int64)
    for band in range(bands):
        keys = np.zeros(len(alive), np.uint64)
        for i in range(band * rows, (band + 1) * rows):
            keys = mixed(keys ^ (signatures[alive, i].astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        if not same.any():
            continue
        members = alive[order]
        starts = np.concatenate([[True], ~same])
        first = members[np.flatnonzero(starts)[np.cumsum(starts) - 1]][1:][same]
        second, before = members[1:][same], members[:-1][same]
        for a, b in ((first, second), (before, second)):
            roots_a, roots_b = _roots(parent, a), _roots(parent, b)
            open_pairs = roots_a != roots_b
            _join(parent, rank, *_alike(signatures, a[open_pairs], b[open_pairs], threshold))
    roots = _roots(parent, alive)
    near = roots != alive
    kept[alive[near]] = roots[near]
    for start in range(0, int(near.sum()), 4096):
        a, b = alive[near][start : start + 4096], roots[near][start : start + 4096]
        similarity[a] = (signatures[a] == signatures[b]).mean(axis=1)
    followed = kept >= 0  # an exact copy of what is now a near-duplicate names what is kept
    kept[followed] = _roots(parent, kept[followed])


def _alike(signatures: np.ndarray, a: np.ndarray, b: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    fits = np.zeros(len(a), bool)
    for start in range(0, len(a), 4096):
        part = slice(start, start + 4096)
        fits[part] = (signatures[a[part]] == signatures[b[part]]).mean(axis=1) >= threshold
    return a[fits], b[fits]


def _roots(parent: np.ndarray, members: np.ndarray) -> np.ndarray:
    roots = parent[members]
    while True:
        above = parent[roots]
        if (above == roots).all():
            return roots
        roots = above


def _join(parent: np.ndarray, rank: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """The root of a group is its member of the least rank."""
    for i, j in zip(a.tolist(), b.tolist()):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        while parent[j] != j:
            parent[j] = parent[parent[j]]
            j = int(parent[j])
        if i != j:
            low, high = (i, j) if rank[i] < rank[j] else (j, i)
            parent[high] = low
