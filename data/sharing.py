"""How a global batch is shared out: over micro batches by length, and over ranks by padded cost instead of rows.

A micro batch is padded to its longest row, so it costs rows x cost(longest). Ranks wait for each other, so what counts
is the dearest micro batch: with equal rows, all wait for the rank with the longest histories.

Legend: G samples of a global batch, R ranks.
"""

from collections.abc import Callable
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST_ROWS = 2  # times the even share: memory of targets grows with rows, however short the histories
PRECISION = 1e-3  # relative, of the bound for the dearest piece
ROUNDING = 1e-12  # relative; so that the cost of r rows, taken as a bound, holds r rows
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Shares = list[list[Ints]]  # of every rank, of every micro batch: places in the global batch


class Balance(NamedTuple):
    """How even a step is."""

    imbalance: float  # padded cost of the dearest rank over that of the mean rank; 1 is perfect
    padding: float  # share of all positions that are padding


def share_out(length_G: Ints, cost: Callable[[Ints], Floats], ranks: int, micro_batches: int) -> Shares:
    """Places (0 to G - 1) of the samples of every micro batch of every rank: result[rank][micro batch].

    Samples sorted by length (ties: by place) are cut into `micro_batches` tiers, shortest first, whose sizes differ by
    at most one, and a tier into one piece per rank. The dearest piece costs as little as can be (within PRECISION), and
    the others follow closely; no piece has more than MOST_ROWS times the even share of rows (rounded up), nor more
    positions, padding included, than that share of the tier's longest (memory grows with positions, even where cost
    grows with their square); none is empty unless samples are fewer than pieces. Which rank gets the longest rotates
    with the tier.

    `cost` gives the cost of one row that is padded to a length; at least 0, and it never falls as lengths grow. A pure
    function: every rank finds the same shares.
    """
    place_G = _sorted(length_G)
    sorted_G = length_G[place_G]
    cost_G = np.maximum(cost(sorted_G), np.finfo(np.float64).tiny).tolist()
    size, larger = divmod(len(place_G), micro_batches)
    shares: Shares = [[] for _ in range(ranks)]
    start = 0
    for tier in range(micro_batches):
        stop = start + size + (tier < larger)
        end, most = stop, _most_rows(sorted_G[start:stop], ranks).tolist()
        for piece, below in enumerate(_Tier(cost_G[start:stop], most, ranks).cuts()):  # the longest first
            shares[(piece + tier) % ranks].append(place_G[start + below : end])
            end = start + below
        start = stop
    return shares


def balance(length_G: Ints, cost: Callable[[Ints], Floats], shares: Shares) -> Balance:
    """What sharing out has made of a step."""
    counts = [[len(places) for places in share] for share in shares]
    longest = [[length_G[places].max(initial=0) for places in share] for share in shares]
    rows, padded = np.array(counts, np.int64), np.array(longest, np.int64)
    cost_R = (rows * np.asarray(cost(padded.ravel()), np.float64).reshape(rows.shape)).sum(1)
    positions = int((rows * padded).sum())
    return Balance(
        imbalance=float(cost_R.max() / cost_R.mean()) if cost_R.any() else 1.0,
        padding=1 - int(length_G.sum()) / positions if positions else 0.0,
    )


def _sorted(length_G: Ints) -> Ints:
    """Places by rising length, ties by place."""
    small = len(length_G) > 0 and length_G.min() >= 0 and length_G.max() < 2**16
    return np.argsort(length_G.astype(np.uint16) if small else length_G, kind="stable")  # small numbers sort faster


def _most_rows(length_N: Ints, pieces: int) -> Ints:
    """How many rows a piece may have whose longest is this one, of a sorted tier."""
    even = -(-len(length_N) // pieces)
    by_positions_N = even * length_N[-1:] // np.maximum(length_N, 1)
    return np.clip(by_positions_N, even, MOST_ROWS * even)


class _Walk(NamedTuple):
    """What comes of one bound: from the longest row down, every piece takes as many rows as the bound allows."""

    cuts: list[int]  # rows that lie below each piece; 0 once none are left
    dearest: float  # cost of the dearest piece of several rows
    following: float  # the next larger bound with which any piece takes another row


class _Tier:
    """One tier, to be cut into contiguous pieces: `cost` is that of every row, rising; `most` the rows of a piece that
    ends with it, falling.

    A bound is one for pieces of several rows: a single row may cost more, as it cannot be cut. Walks are plain Python:
    pieces are few, and each begins where the one before has ended.
    """

    def __init__(self, cost: list[float], most: list[int], pieces: int) -> None:
        self.cost, self.most, self.pieces = cost, most, pieces

    def cuts(self) -> list[int]:
        """How many rows lie below each piece, the first of which has the longest rows; the last number is 0."""
        rows, pieces = len(self.cost), self.pieces
        if rows <= pieces:
            return [max(rows - piece, 0) for piece in range(1, pieces + 1)]
        least = self._least_bound()
        cuts = self._spread(self._walk(rows, pieces, least).cuts, least * (1 - PRECISION))
        return [max(below, pieces - piece) for piece, below in enumerate(cuts, 1)]  # no piece is empty

    def _least_bound(self) -> float:
        """The smallest bound with which the pieces hold all rows, but for PRECISION."""
        rows, pieces = len(self.cost), self.pieces
        low, high, bound = 0.0, -(-rows // pieces) * self.cost[-1], sum(self.cost) / pieces
        while low < high * (1 - PRECISION):
            walk = self._walk(rows, pieces, bound)
            if walk.cuts[-1]:
                low = walk.following
            else:
                high = walk.dearest
            bound = (low + high) / 2
        return high

    def _spread(self, cuts: list[int], scant: float) -> list[int]:
        """As few of these pieces as will do, and the others by a bound that is `scant`: pieces that are all full leave
        all slack to the last one."""
        starts, few, enough = [len(self.cost), *cuts], 0, self.pieces
        while few < enough:
            full = (few + enough) // 2
            others = self._walk(starts[full], self.pieces - full, scant).cuts
            if others[-1]:
                few = full + 1
            else:
                enough, cuts = full, starts[1 : full + 1] + others
        return cuts

    def _walk(self, start: int, pieces: int, bound: float) -> _Walk:
        cuts: list[int] = []
        dearest, following = 0.0, inf
        limit = bound * (1 + ROUNDING)
        for _ in range(pieces):
            if start == 0:
                break
            of_row, most = self.cost[start - 1], self.most[start - 1]
            rows = int(limit / of_row) if limit < most * of_row else most
            if rows < 1:
                rows = 1
            if rows < most and (rows + 1) * of_row < following:
                following = (rows + 1) * of_row
            if rows > start:
                rows = start
            if rows > 1 and rows * of_row > dearest:
                dearest = rows * of_row
            start -= rows
            cuts.append(start)
        cuts += [0] * (pieces - len(cuts))
        return _Walk(cuts, dearest, following)
