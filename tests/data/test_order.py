"""The global order: every epoch holds every sample once, and it is a function of names, seed, position and updates."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from onetrain.data.cursor import Cursor, Update
from onetrain.data.order import Cycle, GlobalOrder, ShuffledOrder, TimeOrder, source_updates


def order(samples, fingerprint="abc", seed=0, window=None):
    return ShuffledOrder((samples,), (fingerprint,), seed, window=window)


def read_in_pieces(order, stop, rng):
    cuts = np.sort(rng.integers(0, stop + 1, 5)).tolist()
    pieces = [order.sample_ids(np.arange(a, b)) for a, b in zip([0, *cuts], [*cuts, stop], strict=True)]
    return np.concatenate(pieces)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 300),
    seed=st.integers(0, 99),
    epochs=st.integers(1, 4),
    window=st.none() | st.integers(1, 400),
)
def test_every_epoch_holds_every_sample_once_however_it_is_read(n, seed, epochs, window):
    one = order(n, seed=seed, window=window)
    whole = one.sample_ids(np.arange(epochs * n))
    for epoch in whole.reshape(epochs, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))
    assert np.array_equal(read_in_pieces(one, epochs * n, np.random.default_rng(seed)), whole)
    mixed = np.random.default_rng(seed).permutation(epochs * n)
    assert np.array_equal(one.sample_ids(mixed), whole[mixed])


@settings(max_examples=70, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    gaps=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    first=st.integers(1, 40),
    window=st.none() | st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_a_source_that_grows_keeps_its_epochs_whole(sizes, gaps, first, window, seed):
    """Held against a walk that only remembers which samples the epoch still owes."""
    sizes = np.cumsum([first, *sizes[1:]]).tolist()
    starts = np.cumsum([0, *gaps[: len(sizes) - 1]]).tolist()
    updates = tuple(zip(starts, range(len(sizes)), strict=True))
    fingerprints = tuple(f"version {number}" for number in range(len(sizes)))
    grown = ShuffledOrder(tuple(sizes), fingerprints, seed, updates, window)
    stop = starts[-1] + 3 * sizes[-1]
    ids = grown.sample_ids(np.arange(stop))
    assert np.array_equal(read_in_pieces(grown, stop, np.random.default_rng(seed)), ids)

    owed, have = set(range(sizes[0])), sizes[0]
    for position, sample in enumerate(ids.tolist()):
        for start, version in updates:
            if start == position and version:
                if not owed:  # an epoch that begins here
                    owed = set(range(have))
                owed |= set(range(have, sizes[version]))
                have = sizes[version]
        if not owed:
            owed = set(range(have))
        assert sample in owed
        owed.remove(sample)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=2, max_size=4).map(lambda added: np.cumsum(added).tolist()),
    at=st.integers(0, 200),
    seed=st.integers(0, 9),
)
def test_later_updates_change_nothing_before_them(sizes, at, seed):
    fingerprints = tuple(map(str, sizes))
    updates = [(0, 0), *((at + 7 * number, number) for number in range(1, len(sizes)))]
    for known in range(1, len(sizes)):
        fewer = ShuffledOrder(tuple(sizes[:known]), fingerprints[:known], seed, tuple(updates[:known]))
        more = ShuffledOrder(tuple(sizes), fingerprints, seed, tuple(updates[: known + 1]))
        before = np.arange(updates[known][0])
        assert np.array_equal(fewer.sample_ids(before), more.sample_ids(before))


def test_new_samples_are_spread_over_the_rest_of_the_epoch():
    grown = ShuffledOrder((10_000, 13_000), ("a", "b"), 0, ((0, 0), (4000, 1)))
    rest = grown.sample_ids(np.arange(4000, 13_000))  # 6,000 old and 3,000 new ones
    assert ((rest >= 10_000).reshape(-1, 30).sum(1) == 10).all()
    assert np.array_equal(rest[rest < 10_000], order(10_000, "a").sample_ids(np.arange(4000, 10_000)))
    assert set(rest[rest >= 10_000].tolist()) == set(range(10_000, 13_000))


def test_seed_fingerprint_and_epoch_each_change_the_order():
    orders = [
        tuple(one.sample_ids(np.arange(start, start + 500)).tolist())
        for one, start in [
            (order(500), 0),
            (order(500), 500),
            (order(500, seed=1), 0),
            (order(500, "abd"), 0),
            (order(500, "abc/0"), 0),
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
    epochs = order(n, "fingerprint", 3).sample_ids(np.arange(1500 * n)).reshape(1500, n)
    first = np.bincount(epochs[:, 0], minlength=n)
    assert stats.chisquare(first).pvalue > 1e-4
    if n > 2:
        steps = np.bincount((epochs[:, 1] - epochs[:, 0]) % n, minlength=n)[1:]
        assert stats.chisquare(steps).pvalue > 1e-4


def test_the_order_of_a_seed_never_changes():
    """A resumed run reads on in the same order, also under a later version."""
    assert order(10, "fingerprint").sample_ids(np.arange(10)).tolist() == [6, 5, 2, 8, 7, 3, 1, 0, 9, 4]
    grown = ShuffledOrder((4, 7), ("a", "b"), 0, ((0, 0), (2, 1)), window=2)
    assert grown.sample_ids(np.arange(14)).tolist() == [2, 0, 1, 5, 3, 4, 6, 1, 2, 6, 4, 0, 5, 3]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(1, 12), min_size=1, max_size=4), start=st.integers(0, 10**12))
def test_a_cycle_has_exact_proportions_and_spreads_them(counts, start):
    cycle = Cycle(counts)
    assert cycle.length == sum(counts)
    position_B = np.arange(start, start + 3 * cycle.length)
    source_B, own_B = cycle.split(position_B)
    for begin in range(0, 2 * cycle.length, 3):  # wherever one begins to count
        some = source_B[begin : begin + cycle.length]
        assert np.bincount(some, minlength=len(counts)).tolist() == counts
    for source, count in enumerate(counts):
        own = own_B[source_B == source]
        assert own[0] == cycle.before(start, source)
        assert (np.diff(own) == 1).all()  # each position of its own order, once
        places = np.flatnonzero(source_B == source)
        assert np.diff(places).max() <= 2 * cycle.length / count + len(counts)


def test_sources_are_mixed_and_each_keeps_its_own_order():
    cycle = Cycle((3, 1))
    first, second = order(10, "a"), order(7, "b")
    mixed = GlobalOrder([first, second], cycle)
    assert mixed.length is None
    source_B, id_B = mixed.sample_ids(5, 100)
    whole_source_B, whole_id_B = mixed.sample_ids(0, 105)
    assert np.array_equal(source_B, whole_source_B[5:])
    assert np.array_equal(id_B, whole_id_B[5:])
    for number, one in enumerate((first, second)):
        own = whole_id_B[whole_source_B == number]
        assert np.array_equal(own, one.sample_ids(np.arange(len(own))))


def test_updates_of_a_source_stand_at_its_own_positions():
    cycle = Cycle((3, 1))
    cursor = Cursor().updated({"a": 0, "b": 0}).at(8).updated({"a": 0, "b": 2}).at(21).updated({"a": 1, "b": 2})
    assert cursor.updates[2:] == (Update(8, "b", 2), Update(21, "a", 1))
    own = cycle.split(np.arange(21))[0]
    assert source_updates(cursor.updates, "b", cycle, 1) == ((0, 0), (2, 2))
    assert source_updates(cursor.updates, "a", cycle, 0) == ((0, 0), (int((own == 0).sum()), 1))
    assert Cursor.from_json(cursor.as_json()) == cursor


@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=4), seed=st.integers(0, 99), size=st.integers(1, 7))
def test_time_order_is_one_pass_version_after_version(sizes, seed, size):
    rng = np.random.default_rng(seed)
    by_time = tuple(rng.permutation(n) for n in sizes)
    one = GlobalOrder([TimeOrder(by_time)], Cycle((1,)))
    begun = np.cumsum([0, *sizes[:-1]])
    expected = [int(start + number) for start, part in zip(begun, by_time, strict=True) for number in part]
    assert one.length == len(expected)
    found = [one.sample_ids(start, size)[1].tolist() for start in range(0, len(expected) + size, size)]
    assert [number for step in found for number in step] == expected
    assert Counter(expected) == Counter(range(sum(sizes)))
    for outside in (-1, len(expected)):
        with pytest.raises(IndexError, match="not all in"):
            one.sources[0].sample_ids(np.array([outside]))


def test_positions_below_0_are_errors():
    with pytest.raises(IndexError, match="position -2 is below 0"):
        order(5).sample_ids(np.array([3, -2]))


def test_positions_far_away_cost_nothing():
    """Twenty million users' worth of samples, an epoch in the future of a long run."""
    big = ShuffledOrder((10**10, 2 * 10**10), ("a", "b"), 1, ((0, 0), (10**10 // 3, 1)), window=10**7)
    ids = big.sample_ids(np.arange(10**13, 10**13 + 512))
    assert len(np.unique(ids)) == 512
    assert ids.max() < 2 * 10**10
