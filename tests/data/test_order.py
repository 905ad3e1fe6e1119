"""The global order is a permutation in every epoch, and a function of fingerprint, seed, epoch and position alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from onetrain.data.errors import DataError
from onetrain.data.order import GlobalOrder, permute

SIZES = st.one_of(st.integers(1, 70), st.integers(1, 5000), st.sampled_from((255, 256, 257, 1024, 4095, 4096, 4097)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=SIZES, key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(n, key):
    image = permute(np.arange(n), n, key)
    assert np.array_equal(np.sort(image), np.arange(n))
    some = np.random.default_rng(0).integers(0, n, 20)
    assert np.array_equal(permute(some, n, key), image[some])  # of each index alone


@pytest.mark.parametrize("n", [2**31 + 11, 10**12, 2**40])
def test_permute_reaches_into_huge_ranges(n):
    index = np.concatenate([np.arange(2000), np.arange(n - 2000, n)])
    image = permute(index, n, 7)
    assert len(np.unique(image)) == 4000
    assert image.min() >= 0
    assert image.max() < n
    assert stats.kstest(image / n, "uniform").pvalue > 1e-4


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 300), seed=st.integers(0, 99), epochs=st.integers(1, 4))
def test_every_epoch_holds_every_sample_once_however_it_is_read(n, seed, epochs):
    order = GlobalOrder(n, "abc", seed)
    whole = order.sample_ids(0, epochs * n)
    for epoch in whole.reshape(epochs, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(0, epochs * n + 1, 5))
    pieces = [order.sample_ids(int(a), int(b - a)) for a, b in zip([0, *cuts], [*cuts, epochs * n], strict=True)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_seed_fingerprint_and_epoch_each_change_the_order():
    orders = [
        tuple(order.sample_ids(start, 500).tolist())
        for order, start in [
            (GlobalOrder(500, "abc", 0), 0),
            (GlobalOrder(500, "abc", 0), 500),
            (GlobalOrder(500, "abc", 1), 0),
            (GlobalOrder(500, "abd", 0), 0),
            (GlobalOrder(500, "abc/0", 0), 0),
        ]
    ]
    assert len(set(orders)) == 5
    places = np.array(orders)
    for a in range(5):
        for b in range(a):  # two random permutations agree in about one place
            assert (places[a] == places[b]).sum() < 10


@pytest.mark.parametrize("n", [2, 3, 5, 16, 37])
def test_every_sample_lands_everywhere_equally_often(n):
    """Over epochs: chi-square of the place of the first sample, and of the difference of neighbours."""
    order = GlobalOrder(n, "fingerprint", 3)
    epochs = order.sample_ids(0, 1500 * n).reshape(1500, n)
    first = np.bincount(epochs[:, 0], minlength=n)
    assert stats.chisquare(first).pvalue > 1e-4
    if n > 2:
        steps = np.bincount((epochs[:, 1] - epochs[:, 0]) % n, minlength=n)[1:]
        assert stats.chisquare(steps).pvalue > 1e-4


def test_within_a_large_epoch_no_stretch_prefers_some_samples():
    image = permute(np.arange(100_000), 100_000, 11)
    tables = np.zeros((10, 10))
    np.add.at(tables, (np.arange(100_000) // 10_000, image // 10_000), 1)
    assert stats.chisquare(tables.ravel(), ddof=18).pvalue > 1e-4
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert np.unique(np.diff(image)).size > 50_000


def test_the_order_of_a_seed_never_changes():
    """A resumed run reads on in the same order, also under a later version."""
    assert GlobalOrder(10, "fingerprint", 0).sample_ids(0, 10).tolist() == [6, 5, 2, 8, 7, 3, 1, 0, 9, 4]


def test_no_samples_are_an_error():
    with pytest.raises(DataError, match="no training sample"):
        GlobalOrder(0, "abc", 0)
