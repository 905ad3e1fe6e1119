"""Samples sorted on disk, in chunks that are far too small."""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onetrain.data import time_order
from onetrain.data.sidecar import append, mapped
from onetrain.data.time_order import build_time_order


def sort_on_disk(moments, chunk):
    """Numbers by time, and the largest bucket that was sorted in memory at once."""
    largest, argsort = [0], np.argsort

    def sorted_in_memory(values, **kwargs):
        largest[0] = max(largest[0], len(values))
        return argsort(values, **kwargs)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        append(folder / "moments.bin", np.asarray(moments, np.int64))
        with mock.patch.object(time_order, "CHUNK", chunk), mock.patch.object(np, "argsort", sorted_in_memory):
            build_time_order(folder)
        found = mapped(folder / "by_time.bin", np.int64).tolist()
        assert {path.name for path in folder.iterdir()} == {"by_time.bin" if len(moments) else "moments.bin"}
    return found, largest[0]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    moments=st.lists(st.integers(0, 9) | st.integers(-(2**62), 2**62), max_size=120)
    | st.lists(st.just(5), max_size=60),
    chunk=st.integers(1, 20),
)
def test_by_moment_and_then_by_number(moments, chunk):
    found, _ = sort_on_disk(moments, chunk)
    assert found == sorted(range(len(moments)), key=lambda number: (moments[number], number))


@pytest.mark.parametrize("kind", ["even", "far off", "crowded", "rising"])
def test_buckets_stay_small_whatever_the_moments_are(kind):
    rng = np.random.default_rng(0)
    moments = rng.integers(0, 10**6, 20_000)
    if kind == "far off":  # a clock that was wrong
        moments[[0, 7]] = -(2**60), 2**60
    elif kind == "crowded":  # most of them at one moment
        moments[rng.random(20_000) < 0.7] = 31_337
    elif kind == "rising":
        moments = np.sort(moments)
    found, largest = sort_on_disk(moments, 500)
    assert found == np.lexsort((np.arange(20_000), moments)).tolist()
    assert largest < 1000
