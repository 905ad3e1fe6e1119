"""Permutations of [0, n) as pure functions: nothing is stored, any element costs the same.

A keyed Feistel network permutes, walking along the cycle until it lands inside (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002).
"""

from functools import lru_cache

import numpy as np
import xxhash
from numba import njit
from numpy.typing import NDArray

from onetrain.data.compiled import loop

ROUNDS = 6
BLOCKS = 64  # contiguous pieces that one window of a windowed shuffle is made of

Ids = NDArray[np.int64]


def key_of(*parts: object) -> int:
    """A key, from whatever names it."""
    return xxhash.xxh3_64_intdigest("/".join(map(str, parts)).encode())


def permute(index: Ids, n: int, key: int) -> Ids:
    """Images of `index` (each in [0, n)) under the bijection of [0, n) that `key` selects."""
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    image = np.empty(len(index), dtype=np.int64)
    _walk(index.astype(np.uint64), np.uint64(n), np.uint64(half_bits), _round_keys(key), image)
    return image


def permute_in_windows(index: Ids, n: int, key: int, window: int | None) -> Ids:
    """The same, where each run of `window` indices has images from few contiguous pieces of [0, n); None = `permute`.

    [0, n) is cut into pieces of window / BLOCKS; the pieces are permuted, and as many of them as fit (about BLOCKS) are
    one window, inside which images are permuted. What is left over at the end of [0, n) belongs to the last window.
    """
    if window is None or window >= n:
        return permute(index, n, key)
    size = max(window // BLOCKS, 1)
    pieces, left_over = n // size, n % size
    per_window = min(window // size, pieces)
    number = np.minimum(index // (per_window * size), (pieces - 1) // per_window)
    image = np.empty_like(index)
    for at in np.unique(number).tolist():
        here = number == at
        first = at * per_window
        last = at == (pieces - 1) // per_window
        length = (pieces - first) * size + left_over if last else per_window * size
        inside = permute(index[here] - first * size, length, key_of(key, "window", at))
        slot, offset = first + inside // size, inside % size
        tail = slot >= pieces  # the left over has no piece of its own
        slot[~tail] = permute(slot[~tail], pieces, key_of(key, "pieces"))
        image[here] = slot * size + offset
    return image


@lru_cache(maxsize=4096)
def _round_keys(key: int) -> NDArray[np.uint64]:
    keys = [xxhash.xxh3_64_intdigest(number.to_bytes(1, "little"), seed=key) for number in range(ROUNDS)]
    return np.array(keys, dtype=np.uint64)


@njit(inline="always")
def _mix(value):  # type: ignore[no-untyped-def]
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@loop
def _walk(index, n, half_bits, round_keys, image):  # type: ignore[no-untyped-def]
    """Applies the Feistel network to every index until it is below n."""
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    for place in range(len(index)):
        value = index[place]
        while True:
            left, right = value >> half_bits, value & mask
            for round_key in round_keys:
                left, right = right, left ^ (_mix(right + round_key) & mask)
            value = (left << half_bits) | right
            if value < n:
                break
        image[place] = value
