"""Sorts the samples of a table by their moments, on disk: memory does not grow with their number."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onetrain.data.sidecar import append, mapped

CHUNK = 1 << 20  # samples in memory at a time
_BINS = 1 << 16


def build_time_order(folder: Path) -> None:
    """Write by_time.bin: the numbers of the samples of moments.bin, by time, and by number where times are equal.

    A bucket sort: counts per time bin, bins joined to buckets of about CHUNK samples, each bucket a file that is sorted
    in memory. moments.bin is removed.
    """
    moments = mapped(folder / "moments.bin", np.int64)
    if len(moments) == 0:
        return
    chunks = range(0, len(moments), CHUNK)
    low = min(int(moments[at : at + CHUNK].min()) for at in chunks)
    high = max(int(moments[at : at + CHUNK].max()) for at in chunks)
    width = (high - low) // _BINS + 1
    counts = np.zeros(_BINS, np.int64)
    for at in chunks:
        counts += np.bincount((moments[at : at + CHUNK] - low) // width, minlength=_BINS)
    bucket_of_bin = (np.cumsum(counts) - counts) // CHUNK
    for at in chunks:
        part = moments[at : at + CHUNK]
        bucket = bucket_of_bin[(part - low) // width]
        pairs = np.stack([part, np.arange(at, at + len(part))], axis=1)
        for number in np.unique(bucket).tolist():
            append(_bucket(folder, number), pairs[bucket == number])
    for number in np.unique(bucket_of_bin[counts > 0]).tolist():
        pairs = mapped(_bucket(folder, number), np.int64).reshape(-1, 2)
        append(folder / "by_time.bin", _sorted(pairs))
        _bucket(folder, number).unlink()
    (folder / "moments.bin").unlink()


def _sorted(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    by_time: NDArray[np.int64] = pairs[np.argsort(pairs[:, 0], kind="stable"), 1]  # numbers arrive in rising order
    return by_time


def _bucket(folder: Path, number: int) -> Path:
    return folder / f"bucket-{number:06d}.bin"
