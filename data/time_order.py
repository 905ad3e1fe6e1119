"""Sorts the samples of a table by their moments, on disk: memory does not grow with their number."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from onetrain.data.sidecar import append, mapped

CHUNK = 1 << 20  # samples in memory at a time
_LOOKS = 256  # moments that are looked at for every bucket, to find where it ends

Ids = NDArray[np.int64]


def build_time_order(folder: Path) -> None:
    """Write by_time.bin: the numbers of the samples of moments.bin, by time, and by number where times are equal.

    A bucket sort: buckets of about CHUNK samples, between quantiles of every so manieth moment, each a file that is
    sorted in memory. Moments that are far off move no quantile; samples of one and the same moment stay in their
    order, and need no memory. moments.bin is removed.
    """
    moments = mapped(folder / "moments.bin", np.int64)
    if len(moments) == 0:
        return
    edges = _edges(moments)
    for at in range(0, len(moments), CHUNK):
        part = moments[at : at + CHUNK]
        bucket = np.searchsorted(edges, part, side="right")
        pairs = np.stack([part, np.arange(at, at + len(part))], axis=1)
        for number in np.unique(bucket).tolist():
            append(_bucket(folder, number), pairs[bucket == number])
    for number in range(len(edges) + 1):
        pairs = mapped(_bucket(folder, number), np.int64).reshape(-1, 2)
        _append_sorted(folder / "by_time.bin", pairs)
        _bucket(folder, number).unlink(missing_ok=True)
    (folder / "moments.bin").unlink()


def _edges(moments: Ids) -> Ids:
    """First moments of all buckets but the first; around a frequent moment, which has a bucket of its own, two."""
    buckets = -(-len(moments) // CHUNK)
    looked_at = np.sort(moments[:: max(len(moments) // (buckets * _LOOKS), 1)])
    found, counts = np.unique(looked_at[np.arange(1, buckets) * len(looked_at) // buckets], return_counts=True)
    edges: Ids = np.union1d(found, found[counts > 1] + 1)
    return edges


def _append_sorted(path: Path, pairs: Ids) -> None:
    """Numbers arrive in rising order, so that a stable sort by moments is one by both."""
    alike = all((pairs[at : at + CHUNK, 0] == pairs[0, 0]).all() for at in range(0, len(pairs), CHUNK))
    if not alike:
        append(path, pairs[np.argsort(pairs[:, 0], kind="stable"), 1])
        return
    for at in range(0, len(pairs), CHUNK):
        append(path, pairs[at : at + CHUNK, 1])


def _bucket(folder: Path, number: int) -> Path:
    return folder / f"bucket-{number:06d}.bin"
