"""The stream through crashes, resizes and any way of building: the same samples in the same global batches, once."""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared_folder import random_block, write_folder

from onetrain.data.cursor import Cursor
from onetrain.data.errors import DataError
from onetrain.data.features import FeatureNames
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.data.steps import Cost, StepBuilder, StreamSpec
from onetrain.data.stream import LocalStream
from onetrain.data.stream_options import MixtureOptions, StreamOptions

LONGEST = 40
QUICK = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def identities(batches):
    """(user, number of the target event) of every target that counts."""
    return Counter(
        (int(batch.user["user"][row]), int(batch.end_BT[row, slot]))
        for batch in batches
        for row, slot in (batch.weight_BT > 0).nonzero().tolist()
    )


def spec_of(folder, size, stream, world=1, micro_batches=1, **batch):
    options = BatchOptions(max_context=LONGEST, pathways={"history": PathwayOptions()}, **batch)
    features = FeatureNames(events=("item",), user=("user",))
    return StreamSpec(str(folder), stream, options, features, 7, size, micro_batches, world, Cost(3.0, 1.0))


def global_batches(spec, cursor, count):
    """What all ranks together train on, step after step, and the cursors after each."""
    ranks = [LocalStream(StepBuilder(spec), rank) for rank in range(spec.ranks)]
    for steps in zip(*(rank.steps(count, cursor) for rank in ranks), strict=True):
        assert len({step.cursor for step in steps}) == 1
        assert {len(step.micro_batches) for step in steps} == {spec.micro_batches}
        yield sum((identities(step.micro_batches) for step in steps), Counter()), steps[0].cursor


@st.composite
def scenes(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    lengths = rng.integers(1, LONGEST, draw(st.integers(2, 12)))
    stream = StreamOptions(
        order=draw(st.sampled_from(["shuffled", "time"])),
        prefetch_steps=draw(st.integers(1, 3)),
        builder_threads=draw(st.integers(1, 2)),
    )
    if stream.order == "shuffled":
        stream = replace(stream, shuffle_window=draw(st.sampled_from([None, 5, 17, 64])))
    attempts = draw(
        st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=4)
    )
    return rng, lengths, draw(st.integers(20, 200)), draw(st.integers(1, 30)), stream, attempts


@QUICK
@given(scenes())
def test_crashes_and_resizes_change_no_global_batch(scene):
    rng, lengths, shard_events, size, stream, attempts = scene
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_folder(Path(folder) / "data", random_block(rng, lengths), shard_events)
        one = spec_of(Path(folder) / "data", size, stream)
        samples = manifest.n_train_events - int((lengths >= 1).sum())  # the first event of a user has no context
        builder, begin = StepBuilder(one), Cursor().updated({"": 0})
        if samples == 0:
            return
        assert builder.sources.size == samples
        steps = min(-(-samples // size), 12)
        whole = list(global_batches(one, begin, steps))
        found, cursor = [], begin
        for world, micro_batches, done in [*attempts, (1, 1, steps)]:
            spec = replace(one, ranks=world, micro_batches=micro_batches)
            going_on = global_batches(spec, cursor, steps - len(found))
            for _ in range(min(done, steps - len(found))):  # then it crashes: what was built ahead is lost
                batch, cursor = next(going_on)
                cursor = Cursor.from_json(cursor.as_json())
                found.append((batch, cursor))
            going_on.close()
        assert found == whole


@QUICK
@given(scenes(), st.sampled_from(["request", "user"]), st.sampled_from(["event", "timestamp"]))
def test_every_epoch_holds_every_sample_once(scene, share_context, request_by):
    rng, lengths, shard_events, size, stream, attempts = scene
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder) / "data", random_block(rng, lengths), shard_events)
        world, micro_batches, _ = attempts[0]
        spec = spec_of(
            Path(folder) / "data",
            size,
            stream,
            world,
            micro_batches,
            share_context=share_context,
            request_by=request_by,
        )
        try:
            builder = StepBuilder(spec)
        except DataError:  # users of one event
            assert (lengths == 1).all() or request_by == "timestamp"
            return
        begin, samples = Cursor().updated({"": 0}), builder.sources.size
        every = builder.builder.build(builder.sources.rows(np.zeros(samples, np.int64), np.arange(samples)))
        expected = identities([every])
        epochs = 1 if stream.order == "time" else 2
        if stream.order == "shuffled":  # epochs begin where a global batch does
            spec = replace(spec, global_batch_size=samples)
        for epoch in range(epochs):
            at = begin.at(epoch * samples)
            seen = sum((batch for batch, _ in global_batches(spec, at, 1 if epochs == 2 else 10**6)), Counter())
            assert seen == expected


def test_four_two_three_four_ranks(tmp_path):
    rng = np.random.default_rng(3)
    write_folder(tmp_path / "data", random_block(rng, rng.integers(5, LONGEST, 30)), 200)
    spec = spec_of(tmp_path / "data", 32, StreamOptions())  # 3 does not divide it
    begin = Cursor().updated({"": 0})
    whole = list(global_batches(spec, begin, 12))
    found, cursor = [], begin
    for world in (4, 2, 3, 4):
        found += global_batches(replace(spec, ranks=world, micro_batches=8 // world), cursor, 3)
        cursor = found[-1][1]
    assert found == whole


def test_a_mixture_has_exact_proportions_and_every_source_its_own_epochs(tmp_path):
    rng = np.random.default_rng(4)
    parts = {"feed": 2.5, "search": 1, "gifts": 0.5}
    for number, name in enumerate(parts):
        write_folder(tmp_path / name, random_block(rng, rng.integers(5, 12, 3 + number), name=name), 60, name)
    mixture = {name: MixtureOptions(part, str(tmp_path / name)) for name, part in parts.items()}
    builder = StepBuilder(spec_of(tmp_path / "feed", 16, StreamOptions(mixture=mixture)))
    begin = Cursor().updated(builder.sources.newest())
    source_B, id_B = builder.order(begin).sample_ids(0, 8 * 200)
    for start in range(0, len(source_B), 8):
        assert np.bincount(source_B[start : start + 8], minlength=3).tolist() == [5, 1, 2]  # sorted by name
    for number, source in enumerate(builder.sources.sources):
        own, samples = id_B[source_B == number], source.sizes[-1]
        for epoch in range(len(own) // samples):
            assert sorted(own[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    built = builder.build(begin, 0)
    assert built.stats.sources == {"feed": 10, "search": 4, "gifts": 2}
    assert identities(built.micro_batches).total() == 16


def test_sources_that_do_not_go_together_are_refused_by_name(tmp_path):
    rng = np.random.default_rng(5)
    for name in "ab":
        write_folder(tmp_path / name, random_block(rng, [9, 9]), 60, name)
    manifest = (tmp_path / "b" / "manifest.json").read_text()
    (tmp_path / "b" / "manifest.json").write_text(manifest.replace('"search"', '"shop"'))
    mixture = {name: MixtureOptions(1, str(tmp_path / name)) for name in "ab"}
    with pytest.raises(DataError, match=r"scenarios .*search.*shop"):
        StepBuilder(spec_of(tmp_path / "a", 4, StreamOptions(mixture=mixture)))
