"""Global order: which sample stands at which position, as a pure function (no permutation is ever stored).

Position p lies in epoch p // n; within an epoch a keyed Feistel network permutes [0, n), walking along the cycle until
it lands inside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
"""

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from onetrain.data.errors import DataError

ROUNDS = 6


@dataclass(frozen=True)
class GlobalOrder:
    """The endless shuffled sequence of a data set's sample ids: a function of fingerprint, seed, epoch and position."""

    samples: int
    fingerprint: str
    seed: int

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise DataError(
                "There is no training sample. Look at batch.target_behaviours, batch.min_context and data.split, and "
                "at the preparation report."
            )

    def sample_ids(self, start: int, count: int) -> NDArray[np.int64]:
        """Ids at positions [start, start + count); each epoch of `samples` positions holds every id once."""
        positions = np.arange(start, start + count, dtype=np.int64)
        epochs = positions // self.samples
        ids = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = permute(positions[here] % self.samples, self.samples, self._key(int(epoch)))
        return ids

    def _key(self, epoch: int) -> int:
        return xxhash.xxh3_64_intdigest(f"{self.fingerprint}/{self.seed}/{epoch}".encode())


def permute(index: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Images of `index` (each in [0, n)) under the bijection of [0, n) that `key` selects."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    image = index.astype(np.uint64)
    outside = np.ones(len(image), dtype=bool)
    while outside.any():
        image[outside] = _feistel(image[outside], half_bits, key)
        outside = image >= n
    return image.astype(np.int64)


def _feistel(value: NDArray[np.uint64], half_bits: int, key: int) -> NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = value >> shift, value & mask
    for round_number in range(ROUNDS):
        round_key = np.uint64(xxhash.xxh3_64_intdigest(round_number.to_bytes(1, "little"), seed=key))
        left, right = right, left ^ (_mix(right + round_key) & mask)
    return (left << shift) | right


def _mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
