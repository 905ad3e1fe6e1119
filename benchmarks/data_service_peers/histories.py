"""Simulated histories: drawn once, by blocks of users, the same for every system.

Legend: U users of a block, E events of a block one after another, F features, B rows of a batch, N = WINDOW.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from onetrain.data.features import gap_buckets, hours, number_buckets, watched_buckets

FEATURES = ("item", "behaviour", "scenario", "gap", "hour", "watch", "duration", "watched")
WINDOW = 256  # events of a history that a batch holds: the last ones, padded at the end with zeros
BATCH = 512
ITEMS = 100_000
BEHAVIOURS = ("buy", "click", "like", "request")
REQUEST = BEHAVIOURS.index("request")  # one event behind each history: what a sample predicts
SCENARIOS = ("feed", "profile", "search")
MIN_EVENTS, MAX_EVENTS = 20, 500
USERS_PER_BLOCK = 2048
FIRST_MS, DAY_MS = 1_700_000_000_000, 86_400_000
MEAN_GAP_MS = 1_800_000

Padded = tuple[Tensor, Tensor]  # length (B,) and ids (F, B, N), int64
Batch = dict[str, Tensor]  # every feature (B, N), and "length" (B,); all int64


@dataclass(frozen=True)
class Block:
    """Users `first_user`, `first_user` + 1, ...; their events lie one after another, the request last."""

    first_user: int
    length_U: NDArray[np.int64]  # with the request
    raw: dict[str, NDArray]  # (E,) columns of a log

    def histories(self) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Lengths (U,) and ids (F, E) without the requests."""
        first_E = np.zeros(int(self.length_U.sum()), bool)
        first_E[np.cumsum(self.length_U) - self.length_U] = True
        time_E, watch_E, duration_E = (self.raw[name] for name in ("timestamp_ms", "watch_ms", "duration_ms"))
        gap_E = np.where(first_E, 0, time_E - np.roll(time_E, 1))
        ids = {
            **{name: self.raw[name] for name in ("item", "behaviour", "scenario")},
            "gap": gap_buckets(gap_E),
            "hour": hours(time_E),
            "watch": number_buckets(np.where(watch_E < 0, np.nan, watch_E / 1000)),
            "duration": number_buckets(np.where(duration_E < 0, np.nan, duration_E / 1000)),
            "watched": watched_buckets(watch_E, duration_E),
        }
        history_E = self.raw["behaviour"] != REQUEST
        return self.length_U - 1, np.stack([ids[name][history_E].astype(np.int32) for name in FEATURES])


def draw_blocks(users: int, seed: int = 0) -> Iterator[Block]:
    """All users; equal arguments give equal blocks."""
    for first in range(0, users, USERS_PER_BLOCK):
        rng = np.random.default_rng([seed, first])
        length_U = 1 + rng.integers(MIN_EVENTS, MAX_EVENTS + 1, min(USERS_PER_BLOCK, users - first))
        n, last_U = int(length_U.sum()), np.cumsum(length_U) - 1
        passed_E = np.cumsum(1 + rng.exponential(MEAN_GAP_MS, n).astype(np.int64))
        start_U = FIRST_MS + rng.integers(0, 300 * DAY_MS, len(length_U)) - passed_E[last_U - length_U + 1]
        behaviour = rng.integers(0, REQUEST, n)
        behaviour[last_U] = REQUEST
        duration = rng.integers(1000, 300_000, n)
        watch = np.where(rng.random(n) < 0.1, -1, duration * rng.random(n) * 1.2).astype(np.int64)
        raw = {
            "item": rng.integers(0, ITEMS, n).astype(np.int32),
            "timestamp_ms": passed_E + np.repeat(start_U, length_U),
            "behaviour": behaviour.astype(np.int16),
            "scenario": rng.integers(0, len(SCENARIOS), n).astype(np.int16),
            "watch_ms": watch,
            "duration_ms": duration,
        }
        yield Block(first, length_U, raw)


def rows_of(block: Block) -> list[NDArray[np.int32]]:
    """Every user's ids (F, events)."""
    length_U, ids_FE = block.histories()
    return np.split(ids_FE, np.cumsum(length_U)[:-1], axis=1)


def pad(rows: list[NDArray[np.int32]]) -> Padded:
    """Ids (F, events) of B users to lengths (B,) and (F, B, N), int64.

    One slice copy a row, of all features: 2 ms a batch, and no slower than one gather over the concatenated rows, which
    would first have to be concatenated.
    """
    ids_FBN, length_B = _zeros(len(FEATURES), len(rows), WINDOW), torch.empty(len(rows), dtype=torch.int64)
    into_FBN, into_B = ids_FBN.numpy(), length_B.numpy()
    for place, ids_FE in enumerate(rows):
        last = ids_FE[:, -WINDOW:]
        into_B[place] = n = last.shape[1]
        into_FBN[:, place, :n] = last
    return length_B, ids_FBN


def _zeros(*shape: int) -> Tensor:
    """In a worker in shared memory, as torch's own collate function does: handing it over copies nothing."""
    if get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.int64)
    storage = torch.UntypedStorage._new_shared(8 * math.prod(shape))  # new pages are zero
    return torch.empty(0, dtype=torch.int64).set_(storage, 0, shape)


def as_batch(padded: Padded) -> Batch:
    """Views of one tensor: a worker process hands over two tensors, not nine."""
    length_B, ids_FBN = padded
    return {**dict(zip(FEATURES, ids_FBN.unbind(0), strict=True)), "length": length_B}


def signatures(batch: Batch) -> list[bytes]:
    """What tells one user's row: its length and, of every feature, the sum, also weighted by position."""
    weight_N = torch.arange(1, WINDOW + 1)
    sums = [batch[name].sum(1) for name in FEATURES] + [(batch[name] * weight_N).sum(1) for name in FEATURES]
    return [row.tobytes() for row in torch.stack([batch["length"], *sums], 1).numpy()]


def expected_signatures(users: int, seed: int = 0) -> list[bytes]:
    """Of all users, computed from what was drawn, without any system."""
    return [sign for block in draw_blocks(users, seed) for sign in signatures(as_batch(pad(rows_of(block))))]
