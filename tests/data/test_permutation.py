"""Permutations: bijections of any range, even in every way that is looked at, and windows of few pieces."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from onetrain.data.permutation import BLOCKS, permute, permute_in_windows

SIZES = st.one_of(st.integers(1, 70), st.integers(1, 5000), st.sampled_from((255, 256, 257, 1024, 4095, 4096, 4097)))
KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=SIZES, key=KEYS)
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))
    some = np.random.default_rng(0).integers(0, n, 20)
    assert np.array_equal(permute(some, n, key), image[some])  # of each index alone


@pytest.mark.parametrize("n", [2**31 + 11, 10**12, 2**40])
@pytest.mark.parametrize("window", [None, 10**6])
def test_permutations_reach_into_huge_ranges(n, window):
    index = np.concatenate([np.arange(2000), np.arange(n - 2000, n)])
    image = permute_in_windows(index, n, 7, window)
    assert len(np.unique(image)) == 4000
    assert image.min() >= 0
    assert image.max() < n
    if window is None:
        assert stats.kstest(image / n, "uniform").pvalue > 1e-4


def test_within_a_large_epoch_no_stretch_prefers_some_samples():
    image = permute(np.arange(100_000), 100_000, 11)
    tables = np.zeros((10, 10))
    np.add.at(tables, (np.arange(100_000) // 10_000, image // 10_000), 1)
    assert stats.chisquare(tables.ravel(), ddof=18).pvalue > 1e-4
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert np.unique(np.diff(image)).size > 50_000


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 200) | st.integers(1, 3000), key=KEYS, window=st.integers(1, 40) | st.integers(40, 3000))
def test_windows_are_a_bijection_and_touch_few_pieces(n, key, window):
    image = permute_in_windows(np.arange(n), n, key, window)
    assert np.array_equal(np.sort(image), np.arange(n))
    some = np.random.default_rng(1).integers(0, n, 20)
    assert np.array_equal(permute_in_windows(some, n, key, window), image[some])
    if window >= n:
        return
    size = max(window // BLOCKS, 1)
    per_window = min(window // size, n // size) * size  # indices of one window, before the last one
    for start in range(0, n, per_window):
        touched = image[start : start + per_window]
        assert len(np.unique(touched // size)) <= BLOCKS + BLOCKS // size + 1
        assert len(touched) <= window


def test_what_follows_one_another_in_a_window_is_spread_over_it():
    n, window = 100_000, 6400
    image = permute_in_windows(np.arange(n), n, 5, window)
    first = image[:window]
    pieces = first // (window // BLOCKS)
    assert len(np.unique(pieces)) == BLOCKS
    assert stats.chisquare(np.bincount(np.unique(pieces, return_inverse=True)[1][: window // 2])).pvalue > 1e-4
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
    assert (
        stats.kstest(np.unique(pieces) / (n / (window // BLOCKS)), "uniform").pvalue > 1e-4
    )  # from all over the range
    other = permute_in_windows(np.arange(n), n, 6, window)
    assert (image == other).sum() < 20
