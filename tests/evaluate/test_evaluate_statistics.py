"""Intervals against published values and against what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.evaluate import bootstrap, paired, wilson


def test_wilson_against_published_values():
    """Newcombe 1998 (Statistics in Medicine 17), table I, method 3."""
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        found = wilson(successes, n)
        assert (round(found.low, 4), round(found.high, 4)) == (low, high) and found.n == n


def test_the_bootstrap_covers_the_mean():
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        found = bootstrap(generator.normal(3, 2, 50), resamples=300)
        hits += found.low <= 3 <= found.high
    assert hits >= 50  # 57 of 60 are expected


def test_pairs_see_what_two_intervals_do_not():
    generator = np.random.default_rng(1)
    hard = generator.normal(0, 5, 200)
    first, second = hard, hard + generator.normal(0.2, 0.3, 200)
    assert bootstrap(first).high > bootstrap(second).low
    found = paired(first, second)
    assert found.low > 0 and found.p < 0.01 and found.significant
    assert not paired(first, first).significant


def test_wrong_input():
    with pytest.raises(ValueError, match="same ones"):
        paired([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="confidence=1.5"):
        wilson(1, 2, 1.5)
    with pytest.raises(ValueError, match="3 successes of 2"):
        wilson(3, 2)
