"""A rank's steps: micro batches of like lengths, what is counted of them, and threads that neither hide errors nor
linger. That ranks, threads and restarts change no global batch, test_elastic.py shows.
"""

import threading
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from prepared_folder import random_block, write_folder

from onetrain.data.cursor import Cursor
from onetrain.data.errors import DataError
from onetrain.data.features import FeatureNames
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.stream import LocalStream
from onetrain.data.stream_options import StreamOptions

GLOBAL_BATCH = 8
FEATURES = FeatureNames(events=("item", "gap"))
BEGIN = Cursor().updated({"": 0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few users of up to 30 events."""
    path, rng = tmp_path_factory.mktemp("stream") / "data", np.random.default_rng(3)
    write_folder(path, random_block(rng, rng.integers(2, 30, 12)), 60)
    return path


def builder_of(folder, micro_batches=1, ranks=1, stream=None, **batch):
    options = BatchOptions(**{"max_context": 6, **batch})
    spec = StreamSpec(str(folder), stream or StreamOptions(), options, FEATURES, 1, GLOBAL_BATCH, micro_batches, ranks)
    return StepBuilder(spec)


def steps_of(folder, count, rank=0, **options):
    return LocalStream(builder_of(folder, **options), rank).steps(count, BEGIN)


def lengths_of(step, pathway):
    return [batch.sequences[pathway].length_B.tolist() for batch in step.micro_batches]


def test_micro_batches_grow_in_length_and_all_that_is_counted_is_there(folder):
    pathways = {"short": PathwayOptions(length=2), "long": PathwayOptions(length=12)}
    longest = 0
    for step in steps_of(folder, 5, micro_batches=4, max_context=2, pathways=pathways):
        assert sum(batch.rows for batch in step.micro_batches) == GLOBAL_BATCH
        lengths = lengths_of(step, "long")
        assert all(max(some) <= min(more) for some, more in pairwise(lengths))
        longest = max(longest, *map(max, lengths))
        every = [row for name in pathways for batch in lengths_of(step, name) for row in batch]
        shapes = [columns.index_BN.shape for batch in step.micro_batches for columns in batch.sequences.values()]
        stats = step.stats
        assert (stats.samples, stats.events, stats.skipped) == (GLOBAL_BATCH, sum(every), 0)
        assert stats.padding == pytest.approx(1 - sum(every) / sum(rows * width for rows, width in shapes))
        assert stats.bytes == sum(batch.n_bytes for batch in step.micro_batches)
        assert stats.cost == sum(len(some) * (1 + max(some)) for some in lengths)
        assert stats.seconds > 0
    assert longest > 2  # max_context


def test_cursors_follow_one_another_and_ranks_share_a_batch(folder):
    ranks = [list(steps_of(folder, 4, rank, ranks=3)) for rank in range(3)]
    for number, steps in enumerate(zip(*ranks, strict=True), 1):
        assert {step.cursor for step in steps} == {BEGIN.at(number * GLOBAL_BATCH)}
        assert sum(step.stats.samples for step in steps) == GLOBAL_BATCH


def test_no_samples_are_an_error(folder):
    with pytest.raises(DataError, match=r"There is no training sample in .*min_context"):
        builder_of(folder, max_context=50, min_context=50)


class Failing:
    """A step builder that builds as usual until a call fails."""

    def __init__(self, folder, error, after, prefetch_steps=2):
        self.inner = builder_of(folder, stream=StreamOptions(prefetch_steps=prefetch_steps))
        self.error, self.left, self.calls = error, after, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def build(self, cursor, rank):
        self.calls += 1
        if self.left == 0:
            raise self.error
        self.left -= 1
        return self.inner.build(cursor, rank)


def no_thread_lingers():
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not [thread for thread in threading.enumerate() if thread.name.startswith("onetrain-stream")]:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("error", [RuntimeError("a damaged shard"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_while_building_is_raised_where_the_steps_are_read(folder, error, after):
    read = []
    steps = LocalStream(Failing(folder, error, after), 0).steps(10, BEGIN)
    with pytest.raises(type(error), match=str(error)):
        read.extend(step.cursor.position for step in steps)
    assert read == [GLOBAL_BATCH * number for number in range(1, after + 1)]  # those built before it are still given
    assert no_thread_lingers()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("read", [1, 3, 10])
def test_stopping_early_leaves_no_thread(folder, read, threads):
    steps = steps_of(folder, 10, stream=StreamOptions(builder_threads=threads))
    for _ in range(read):
        next(steps)
    steps.close()
    assert no_thread_lingers()


@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_threads_run_ahead_by_a_bounded_number_of_steps(folder, prefetch_steps):
    builder = Failing(folder, RuntimeError("never"), 1000, prefetch_steps)
    steps = LocalStream(builder, 0).steps(100, BEGIN)
    next(steps)
    deadline = time.monotonic() + 20
    while builder.calls < 2 + prefetch_steps and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert builder.calls == 2 + prefetch_steps  # one read, those that are ready, and one that takes its place
    assert next(steps).ready >= prefetch_steps
    steps.close()
    assert no_thread_lingers()


def test_threads_and_prefetch_change_nothing(folder):
    plain = list(steps_of(folder, 9, micro_batches=2))
    other = list(steps_of(folder, 9, micro_batches=2, stream=StreamOptions(builder_threads=3, prefetch_steps=5)))
    for one, two in zip(plain, other, strict=True):
        assert one.cursor == two.cursor
        assert replace(one.stats, seconds=0) == replace(two.stats, seconds=0)
        for a, b in zip(one.micro_batches, two.micro_batches, strict=True):
            assert a.target_item_BT.tolist() == b.target_item_BT.tolist()
            assert a.sequences["history"].features["item"].tolist() == b.sequences["history"].features["item"].tolist()
