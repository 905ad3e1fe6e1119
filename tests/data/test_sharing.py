"""Sharing out a global batch: every sample once, equal padded cost, bounded rows; tiny cases against brute force."""

import time
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from onetrain.data.sharing import MOST_ROWS, PRECISION, Shares, balance, share_out

Ints = NDArray[np.int64]
COSTS = {
    "linear": lambda length: length.astype(np.float64),  # rows without events cost nothing
    "rows": lambda length: np.ones(len(length)),
    "quadratic": lambda length: 3.0 + length + 0.02 * length**2.0,
    "steep": lambda length: np.exp(np.minimum(length, 9000) / 30.0),
}
LENGTHS = st.one_of(
    st.lists(st.integers(0, 5), max_size=60),
    st.lists(st.integers(0, 300), max_size=120),
    st.lists(st.sampled_from([1, 2, 256, 200_000]), max_size=80),
    st.tuples(st.integers(0, 40), st.integers(0, 30), st.integers(0, 40)).map(
        lambda n: [1] * n[0] + [200] * n[1] + [300] * n[2]  # at which the limits matter
    ),
)
EVERY = settings(max_examples=80, deadline=None, derandomize=True)


def padded_costs(shares: Shares, length_G: Ints, cost) -> NDArray[np.float64]:
    """(ranks, micro batches)."""
    one = [[len(p) * float(cost(length_G[p].max(keepdims=True))[0]) if len(p) else 0.0 for p in s] for s in shares]
    return np.array(one)


@EVERY
@given(LENGTHS, st.sampled_from(sorted(COSTS)), st.integers(1, 9), st.integers(1, 5))
def test_every_sample_once_in_tiers_of_pieces_within_the_limit_of_rows(lengths, name, ranks, micro_batches):
    length_G = np.array(lengths, np.int64)
    shares = share_out(length_G, COSTS[name], ranks, micro_batches)
    assert [len(share) for share in shares] == [micro_batches] * ranks
    assert sorted(place for share in shares for piece in share for place in piece) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda place: (lengths[place], place))
    start, sizes = 0, []
    for tier in range(micro_batches):
        pieces = [shares[rank][tier] for rank in range(ranks)]
        longest = [pieces[(piece + tier) % ranks].tolist() for piece in range(ranks)]  # from the longest down
        whole = [place for piece in longest[::-1] for place in piece]
        assert whole == order[start : start + len(whole)]
        even = -(-len(whole) // ranks)
        assert max(map(len, longest)) <= MOST_ROWS * even
        positions = [len(piece) * max(length_G[piece], default=0) for piece in longest]
        assert max(positions) <= max(even * max(length_G[whole], default=0), 0)
        assert sum(len(piece) > 0 for piece in longest) == min(len(whole), ranks)
        start += len(whole)
        sizes.append(len(whole))
    assert max(sizes) - min(sizes) <= 1
    if len(lengths) >= ranks * micro_batches:
        assert all(len(piece) for share in shares for piece in share)


def least_possible(length_N: Ints, cost_N: NDArray[np.float64], pieces: int) -> float:
    """The cheapest dearest piece over all ways to cut sorted rows into pieces, none empty, within the limits."""
    n = len(cost_N)
    even = -(-n // pieces)
    found = []
    for cuts in combinations(range(1, n), pieces - 1):
        bounds = list(zip((0, *cuts), (*cuts, n), strict=True))
        within = max(b - a for a, b in bounds) <= MOST_ROWS * even
        if within and max((b - a) * length_N[b - 1] for a, b in bounds) <= even * length_N[-1]:
            found.append(max((b - a) * cost_N[b - 1] for a, b in bounds))
    return min(found)


@EVERY
@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(1, 200)), min_size=1, max_size=11),
    st.sampled_from(sorted(COSTS)),
    st.integers(1, 4),
)
def test_the_dearest_piece_is_as_cheap_as_brute_force_finds(lengths, name, ranks):
    length_G, cost = np.array(lengths, np.int64), COSTS[name]
    dearest = padded_costs(share_out(length_G, cost, ranks, 1), length_G, cost).max()
    best = least_possible(np.sort(length_G), cost(np.sort(length_G)), min(ranks, len(lengths)))
    assert best <= dearest * (1 + 1e-9)
    assert dearest <= best * (1 + 2 * PRECISION) + 1e-9


@EVERY
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(COSTS)),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 12),
)
def test_no_micro_batch_costs_more_than_with_equal_rows(seed, name, ranks, micro_batches, rows):
    """Against every R-th sample for a rank, each share sorted and cut into micro batches of equal rows."""
    rng, cost = np.random.default_rng(seed), COSTS[name]
    length_G = np.exp(rng.normal(3, 1, ranks * micro_batches * rows)).astype(np.int64)
    ours = padded_costs(share_out(length_G, cost, ranks, micro_batches), length_G, cost).max(0)
    equal = []
    for rank in range(ranks):
        places = np.arange(len(length_G))[rank::ranks]
        equal.append(np.split(places[np.argsort(length_G[places], kind="stable")], micro_batches))
    assert np.all(ours <= padded_costs(equal, length_G, cost).max(0) * (1 + 1e-9))


@EVERY
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(1, 4))
def test_slack_is_spread_over_the_pieces(seed, ranks, micro_batches):
    """Equal lengths give rows that differ by at most one; of uneven ones no piece is far below the dearest."""
    rng = np.random.default_rng(seed)
    samples = int(rng.integers(ranks * micro_batches, 400))
    rows = [[len(p) for p in s] for s in share_out(np.full(samples, 7), COSTS["linear"], ranks, micro_batches)]
    assert max(max(row) for row in rows) - min(min(row) for row in rows) <= 1 + (samples % micro_batches > 0)
    length_G = rng.integers(20, 60, 32 * ranks * micro_batches)
    costs = padded_costs(share_out(length_G, COSTS["linear"], ranks, micro_batches), length_G, COSTS["linear"])
    assert (costs.min(0) / costs.max(0)).min() > 0.85


def test_a_pure_function_that_ignores_nothing_but_ties():
    length_G = np.random.default_rng(0).integers(0, 50, 200)
    first, again = (share_out(length_G.copy(), COSTS["quadratic"], 3, 4) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    wide = share_out(length_G * 2**17, lambda length: COSTS["quadratic"](length // 2**17), 3, 4)  # sorted otherwise
    for one, other in zip(first, wide, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    for piece in (piece for share in first for piece in share):
        rows = list(zip(length_G[piece].tolist(), piece.tolist(), strict=True))
        assert rows == sorted(rows)


def test_cheap_rows_take_no_more_room_than_even_rows_of_the_longest():
    """By cost alone 40 rows of 200 would be one piece: 8,000 positions, where 25 rows of 300 are 7,500."""
    length_G = np.repeat([200, 300], [40, 60])
    shares = share_out(length_G, COSTS["steep"], 4, 1)
    assert max(len(share[0]) * length_G[share[0]].max() for share in shares) <= 25 * 300


def test_balance_counts_padding_and_the_dearest_rank():
    length_G = np.array([4, 1, 2, 8])
    shares = [[np.array([0, 1]), np.array([3])], [np.array([2]), np.array([], np.int64)]]
    found = balance(length_G, COSTS["linear"], shares)
    assert found.imbalance == pytest.approx((2 * 4 + 8) / ((16 + 2) / 2))
    assert found.padding == pytest.approx(1 - 15 / 18)
    assert balance(np.array([], np.int64), COSTS["linear"], [[np.array([], np.int64)]]) == (1.0, 0.0)


def test_uneven_histories_leave_little_padding_and_no_rank_waiting():
    rng = np.random.default_rng(3)
    length_G, cost = np.minimum(np.exp(rng.normal(4, 0.7, 4096)).astype(np.int64) + 1, 512), COSTS["quadratic"]
    found = balance(length_G, cost, share_out(length_G, cost, 8, 4))
    interleaved = [
        np.array_split(places[np.argsort(length_G[places], kind="stable")], 4)
        for places in (np.arange(4096)[rank::8] for rank in range(8))
    ]
    before = balance(length_G, cost, interleaved)
    assert found.imbalance < 1.03 < before.imbalance
    assert found.padding < before.padding / 2


def test_a_large_batch_is_shared_out_in_milliseconds():
    length_G = np.exp(np.random.default_rng(0).normal(4, 1, 16_384)).astype(np.int64)
    took = []
    for _ in range(10):
        started = time.thread_time()
        share_out(length_G, COSTS["quadratic"], 16, 8)
        took.append(time.thread_time() - started)
    assert min(took) < 0.02  # 2 to 3 ms; busy machines are slower
