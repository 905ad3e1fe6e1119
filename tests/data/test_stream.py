"""The stream gives every rank its share of the same global batches, and its thread neither hides errors nor lingers."""

import threading
import time
from collections import Counter

import pytest
from memory_reader import MANIFEST, random_items, random_reader, random_sids

from onetrain.data.batch import BatchBuilder
from onetrain.data.features import FeatureNames
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.data.order import GlobalOrder
from onetrain.data.samples import SampleIndex
from onetrain.data.stream import PREFETCH_STEPS, TrainingStream

GLOBAL_BATCH = 8


FEATURES = FeatureNames(events=("item",))
PLAIN = {"history": PathwayOptions()}


def build_with(options):
    return BatchBuilder(random_sids(), MANIFEST, random_items(), options, FEATURES)


def stream(rank=0, world_size=1, micro_batches=1, builder=None, share_context="request", max_context=6, pathways=PLAIN):
    options = BatchOptions(max_context, share_context=share_context, pathways=pathways)
    index = SampleIndex(random_reader(3, users=12), "train", options)
    builder = builder or build_with(options)
    order = GlobalOrder(len(index), "fingerprint", 1)
    return TrainingStream(index, order, builder, GLOBAL_BATCH, micro_batches, rank, world_size)


def targets_of(batches):
    """Multiset of what is trained on: context items, target item, end and weight of every target."""
    return Counter(
        (
            *(
                tuple(columns.features["item"][row, : columns.length_B[row]].tolist())
                for columns in batch.sequences.values()
            ),
            int(batch.target_item_BT[row, slot]),
            int(batch.end_BT[row, slot]),
            float(batch.weight_BT[row, slot]),
        )
        for batch in batches
        for row in range(batch.rows)
        for slot in range(batch.weight_BT.shape[1])
        if batch.weight_BT[row, slot] > 0
    )


@pytest.mark.parametrize("share_context", ["request", "user"])
def test_world_size_and_micro_batches_change_no_global_batch(share_context):
    one = stream(share_context=share_context)
    expected = [targets_of(step.micro_batches) for step in one.steps(7, 0)]
    assert one.order.samples < 7 * GLOBAL_BATCH  # more than one epoch
    for world_size in (1, 2, 4):
        for micro_batches in (1, 2):
            ranks = [stream(rank, world_size, micro_batches, share_context=share_context) for rank in range(world_size)]
            for cursor in range(0, 7 * GLOBAL_BATCH, GLOBAL_BATCH):
                shares = [rank.sample_ids(cursor) for rank in ranks]
                interleaved = [shares[i % world_size][i // world_size] for i in range(GLOBAL_BATCH)]
                assert interleaved == one.order.sample_ids(cursor, GLOBAL_BATCH).tolist() == one.sample_ids(cursor)
            for number, steps in enumerate(zip(*(rank.steps(7, 0) for rank in ranks), strict=True)):
                assert {step.cursor for step in steps} == {(number + 1) * GLOBAL_BATCH}
                assert {len(step.micro_batches) for step in steps} == {micro_batches}
                sizes = {batch.rows for step in steps for batch in step.micro_batches}
                assert sizes == {GLOBAL_BATCH // world_size // micro_batches}
                assert sum((targets_of(step.micro_batches) for step in steps), Counter()) == expected[number]


def test_going_on_from_a_cursor_is_as_if_never_stopped():
    whole = [targets_of(step.micro_batches) for step in stream().steps(6, 0)]
    first = list(stream().steps(2, 0))
    rest = stream(micro_batches=2).steps(4, first[-1].cursor)
    assert [targets_of(step.micro_batches) for step in [*first, *rest]] == whole


def lengths_of(step, pathway):
    return [int(length) for batch in step.micro_batches for length in batch.sequences[pathway].length_B]


def test_micro_batches_are_sorted_by_length_and_padding_is_counted():
    for step in stream(micro_batches=4).steps(5, 0):
        lengths = lengths_of(step, "history")
        assert lengths == sorted(lengths)
        rows = [(batch.rows, int(batch.sequences["history"].length_B.max())) for batch in step.micro_batches]
        assert step.padding == pytest.approx(1 - sum(lengths) / sum(height * width for height, width in rows))


def test_micro_batches_are_sorted_by_the_longest_pathway_and_all_padding_is_counted():
    pathways = {"short": PathwayOptions(length=2), "long": PathwayOptions(length=12)}
    longest = 0
    for step in stream(micro_batches=4, max_context=2, pathways=pathways).steps(5, 0):
        lengths = {name: lengths_of(step, name) for name in pathways}
        assert lengths["long"] == sorted(lengths["long"])
        longest = max(longest, *lengths["long"])
        positions = sum(
            batch.rows * int(columns.length_B.max())
            for batch in step.micro_batches
            for columns in batch.sequences.values()
        )
        assert step.padding == pytest.approx(1 - sum(map(sum, lengths.values())) / positions)
    assert longest > 2  # max_context


class Failing:
    """Builds as usual, until a call fails."""

    def __init__(self, error, after):
        self.inner = build_with(BatchOptions())
        self.error, self.left, self.calls = error, after, 0

    def build(self, samples):
        self.calls += 1
        if self.left == 0:
            raise self.error
        self.left -= 1
        return self.inner.build(samples)


def stream_threads():
    return [thread for thread in threading.enumerate() if thread.name == "training-stream"]


def wait_for_no_threads():
    deadline = time.monotonic() + 20
    while stream_threads() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not stream_threads()


@pytest.mark.parametrize("error", [RuntimeError("a damaged shard"), KeyboardInterrupt("stop")])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_while_building_is_raised_where_the_steps_are_read(error, after):
    read = []
    with pytest.raises(type(error), match=str(error)):
        read.extend(stream(builder=Failing(error, after)).steps(10, 0))
    assert wait_for_no_threads()


def test_steps_built_before_the_error_are_still_given():
    steps = stream(builder=Failing(RuntimeError("late"), after=3)).steps(10, 0)
    assert [next(steps).cursor for _ in range(3)] == [8, 16, 24]
    with pytest.raises(RuntimeError, match="late"):
        next(steps)


@pytest.mark.parametrize("read", [1, 3, 10])
def test_stopping_early_leaves_no_thread(read):
    steps = stream().steps(10, 0)
    for _ in range(read):
        next(steps)
    steps.close()
    assert wait_for_no_threads()


def test_the_thread_runs_ahead_by_a_bounded_number_of_steps():
    builder = Failing(RuntimeError("never"), after=1000)
    steps = stream(builder=builder).steps(100, 0)
    next(steps)
    deadline = time.monotonic() + 20
    while builder.calls < 2 + PREFETCH_STEPS and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert builder.calls == 2 + PREFETCH_STEPS  # one read, the queue, and one waiting for room
    steps.close()
    assert wait_for_no_threads()
