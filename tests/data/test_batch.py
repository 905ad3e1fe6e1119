"""Batches against their samples, value by value, by a slow reading of the rules, event by event."""

import datetime
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_shards import (
    BEHAVIOURS,
    MANIFEST,
    SCENARIOS,
    random_data,
    random_items,
    random_reader,
    random_sids,
    random_user,
    store,
)

from onetrain.data.batch import BatchBuilder
from onetrain.data.buckets import gap_buckets, number_buckets
from onetrain.data.errors import DataError
from onetrain.data.features import FeatureNames
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.data.pathways import Pathway
from onetrain.data.samples import SampleIndex, SampleRows

WEIGHTS = {"buy": 4.0, "view": 0.25}
OF_REQUESTS = ("scenario", "hour", "weekday", "weekend")
OF_ITEMS = ("item", "category", "maker")
OF_EVENTS = (*OF_ITEMS, *OF_REQUESTS, "behaviour", "gap", "watch", "duration", "watched", "x_price")
EVERYTHING = FeatureNames(("sid", *OF_EVENTS, "age"), ("user", "city"), OF_REQUESTS, ("sid", *OF_ITEMS))
ITEMS = random_items()


def day_of(timestamp_ms, offset_hours=0.0):
    zone = datetime.timezone(datetime.timedelta(hours=offset_hours))
    return datetime.datetime.fromtimestamp(int(timestamp_ms) / 1000, zone)


def time_bucket(milliseconds):
    return min((1 + int(milliseconds) // 1000).bit_length() - 1, 31)


def number_bucket(value):
    """Half octaves of 1 + |value|: as many as fit between 1 and it."""
    if math.isnan(value):
        return 0
    steps = 0
    while steps < 31 and (1 + abs(float(value))) ** 2 >= 2.0 ** (steps + 1):
        steps += 1
    return 32 + (steps if value >= 0 else -steps)


def feature(name, user, event, options, moment_ms):
    """Id of one feature of one event; `moment_ms` is when its request was made."""
    clock = day_of(user.timestamp_ms[event], options.utc_offset_hours)
    watch, duration = int(user.watch_ms[event]), int(user.duration_ms[event])
    if name in ITEMS.features:
        return ITEMS.features[name][user.item[event]]
    if name in ("item", "behaviour", "scenario"):
        return getattr(user, name)[event]
    if name == "gap":
        return time_bucket(user.timestamp_ms[event] - user.timestamp_ms[event - 1]) if event else 0
    if name == "age":
        return time_bucket(moment_ms - user.timestamp_ms[event])
    if name in ("watch", "duration"):
        value = {"watch": watch, "duration": duration}[name]
        return number_bucket(value / 1000 if value >= 0 else math.nan)
    if name == "watched":
        if watch < 0 or duration <= 0:
            return 0
        return 1 + next((tenth for tenth in range(10) if watch * 10 < duration * (tenth + 1)), 10)
    if name == "x_price":
        return number_bucket(user.extra["price"][event])
    return {"hour": clock.hour, "weekday": clock.weekday(), "weekend": clock.strftime("%a") in ("Sat", "Sun")}[name]


def chosen(user, end, pathway, max_context):
    """Numbers of the events of a pathway, newest first until it is full, then turned around, and from the oldest on as
    many left out as `align` asks for."""
    found, older, skip = [], 0, pathway.skip
    for event in reversed(range(end)):
        share = user.watch_ms[event] / user.duration_ms[event] if user.duration_ms[event] > 0 else -1
        if pathway.behaviours and BEHAVIOURS[user.behaviour[event]] not in pathway.behaviours:
            continue
        if pathway.scenarios and SCENARIOS[user.scenario[event]] not in pathway.scenarios:
            continue
        if pathway.min_watched is not None and (user.watch_ms[event] < 0 or share < max(pathway.min_watched, 0)):
            continue
        if skip:
            skip -= 1
            continue
        if len(found) < (max_context if pathway.length is None else pathway.length):
            found.append(event)
        else:
            older += 1
    while older % (pathway.align or 1):
        found.pop()
        older += 1
    return found[::-1]


pathway_options = st.builds(
    PathwayOptions,
    length=st.none() | st.integers(1, 14),
    behaviours=st.lists(st.sampled_from(BEHAVIOURS), max_size=2, unique=True).map(tuple),
    scenarios=st.lists(st.sampled_from(SCENARIOS), max_size=1).map(tuple),
    min_watched=st.none() | st.sampled_from((0.0, 0.1, 0.7, 1.0, 2.5)),
    skip=st.sampled_from((0, 0, 1, 3, 20)),
)
aligned_options = st.tuples(pathway_options, st.sampled_from((1, 2, 3, 5))).map(
    lambda drawn: replace(drawn[0], align=drawn[1], length=max(drawn[0].length or drawn[1], drawn[1]))
)


@st.composite
def batch_options(draw):
    share_context = draw(st.sampled_from(("request", "user")))
    plain = {"history": PathwayOptions()}
    several = st.dictionaries(st.sampled_from(("a", "b", "history")), pathway_options | aligned_options, min_size=1)
    return BatchOptions(
        max_context=draw(st.integers(1, 9)),
        request_by=draw(st.sampled_from(("event", "timestamp"))),
        share_context=share_context,
        behaviour_weights=WEIGHTS,
        pathways=plain if share_context == "user" else draw(several),
        utc_offset_hours=draw(st.sampled_from((0.0, 8.0, -5.0, 5.5))),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=batch_options(),
    seed=st.integers(0, 200),
    levels=st.sampled_from((3, 4)),
    longest=st.sampled_from((14, 14, 90)),
)
def test_every_value_of_a_batch(options, seed, levels, longest):
    index = SampleIndex(random_reader(seed, longest=longest), "train", options)
    numbers = np.random.default_rng(seed).permutation(len(index))[:6]
    assume(len(numbers))
    samples, sids = [index[number] for number in numbers.tolist()], random_sids(levels)
    wanted = EVERYTHING if options.share_context == "request" else FeatureNames(OF_EVENTS, request=OF_REQUESTS)
    batch = BatchBuilder(sids, MANIFEST, ITEMS, options, wanted).build(index.rows(numbers))
    check_batch(batch, samples, sids, options, wanted)


def check_batch(batch, samples, sids, options, wanted):
    assert batch.rows == len(samples)
    assert list(batch.sequences) == list(options.pathways)
    for name, columns in batch.sequences.items():
        rows = [chosen(sample.user, sample.end, options.pathways[name], options.max_context) for sample in samples]
        if options.share_context == "user":
            rows = [list(range(sample.start, sample.end)) for sample in samples]
        assert batch.n_events[name] == sum(map(len, rows))
        check_sequence(columns, samples, rows, sids, options, set(wanted.events) - {"sid"})
    check_targets(batch, samples, sids, options, wanted)


def check_sequence(columns, samples, rows, sids, options, names):
    assert set(columns.features) == names
    width = max(1, *map(len, rows))
    assert columns.length_B.tolist() == [len(row) for row in rows]
    for tensor in (columns.index_BN, columns.length_B, columns.sid_BNL, *columns.features.values()):
        assert tensor.dtype == torch.int64
        assert tensor is columns.length_B or tensor.shape[:2] == (len(samples), width)
    for row, (sample, events) in enumerate(zip(samples, rows, strict=True)):
        user = sample.user
        moment = user.timestamp_ms[sample.requests[0].targets[0]]
        assert columns.index_BN[row, : len(events)].tolist() == [event - sample.start for event in events]
        for column, event in enumerate(events):
            assert columns.sid_BNL[row, column].tolist() == sids.codes_IL[user.item[event]].tolist()
            for name in names:
                expected = feature(name, user, event, options, moment)
                assert (name, int(columns.features[name][row, column])) == (name, expected)
        for tensor in (columns.index_BN, columns.sid_BNL, *columns.features.values()):
            assert not tensor[row, len(events) :].any()


def check_targets(batch, samples, sids, options, wanted):
    targets = [[(r.context_end, event) for r in sample.requests for event in r.targets] for sample in samples]
    assert set(batch.request) == set(wanted.request)
    assert set(batch.target_features) == set(wanted.items) - {"sid"}
    assert set(batch.user) == set(wanted.user)
    total, everyone = 0.0, ITEMS.train_count_I.sum()
    shape = (len(samples), max(map(len, targets)))
    integers = (batch.target_item_BT, batch.end_BT, *batch.request.values(), *batch.target_features.values())
    assert {tensor.dtype for tensor in (*integers, batch.target_sid_BTL, *batch.user.values())} == {torch.int64}
    assert (batch.weight_BT.dtype, batch.log_q_BT.dtype, batch.new_day_BT.dtype) == (
        *(torch.float32, torch.float32),
        torch.bool,
    )
    for tensor in (*integers, batch.weight_BT, batch.new_day_BT, batch.log_q_BT):
        assert tensor.shape == shape
    for row, (sample, expected) in enumerate(zip(samples, targets, strict=True)):
        user = sample.user
        of_user = {"user": xxhash.xxh3_64_intdigest(user.user.encode()) % 2**63, **user.features}
        assert {name: int(ids_B[row]) for name, ids_B in batch.user.items()} == {n: of_user[n] for n in batch.user}
        for slot in range(shape[1]):
            if slot >= len(expected):
                for tensor in (*integers, batch.weight_BT, batch.new_day_BT, batch.log_q_BT):
                    assert not tensor[row, slot]
                continue
            end, event = expected[slot]
            item = user.item[event]
            assert int(batch.target_item_BT[row, slot]) == item
            assert batch.target_sid_BTL[row, slot].tolist() == sids.codes_IL[item].tolist()
            assert int(batch.end_BT[row, slot]) == end - sample.start
            weight = WEIGHTS.get(BEHAVIOURS[user.behaviour[event]], 1.0)
            assert float(batch.weight_BT[row, slot]) == weight
            total += weight
            later = day_of(user.timestamp_ms[event]).date() > day_of(user.timestamp_ms[end - 1]).date()
            assert bool(batch.new_day_BT[row, slot]) == later
            share = max(ITEMS.train_count_I[item], 1) / everyone
            assert float(batch.log_q_BT[row, slot]) == pytest.approx(math.log(share), rel=1e-6)
            moment = user.timestamp_ms[event]
            for name, ids in (*batch.request.items(), *batch.target_features.items()):
                assert int(ids[row, slot]) == feature(name, user, event, options, moment)
    assert batch.weight == pytest.approx(total)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 200), short=st.integers(1, 6), long=st.integers(1, 12), pathway=pathway_options)
def test_a_long_pathway_that_skips_goes_on_where_the_short_one_ends(seed, short, long, pathway):
    filters = {name: value for name, value in vars(pathway).items() if name not in ("length", "skip")}
    lengths = {"whole": (short + long, 0), "short": (short, 0), "long": (long, short)}
    options = BatchOptions(
        max_context=3,
        pathways={name: PathwayOptions(length, skip=skip, **filters) for name, (length, skip) in lengths.items()},
    )
    index = SampleIndex(random_reader(seed), "train", options)
    assume(len(index))
    builder = BatchBuilder(random_sids(), MANIFEST, ITEMS, options, FeatureNames())
    batch = builder.build(index.rows(range(len(index))))
    for row in range(batch.rows):
        index_of = {
            name: columns.index_BN[row, : columns.length_B[row]].tolist() for name, columns in batch.sequences.items()
        }
        assert index_of["whole"] == index_of["long"] + index_of["short"]
        assert all(event < int(batch.end_BT[row, 0]) for event in index_of["whole"])


def test_the_random_users_reach_every_case():
    """Otherwise the comparison above would compare little."""
    options = BatchOptions(pathways={"rare": PathwayOptions(behaviours=("buy",), skip=2)})
    builder = BatchBuilder(random_sids(), MANIFEST, ITEMS, options, FeatureNames(OF_EVENTS))
    seen, empty = {name: Counter() for name in OF_EVENTS}, 0
    for seed in range(40):
        index = SampleIndex(random_reader(seed), "train", options)
        if not len(index):
            continue
        columns = builder.build(index.rows(range(len(index)))).sequences["rare"]
        empty += int((columns.length_B == 0).sum())
        for name, ids in columns.features.items():
            real = torch.arange(ids.shape[1]) < columns.length_B[:, None]
            seen[name].update(ids[real].tolist())
    assert empty
    assert set(seen["watched"]) >= {0, 1, 2, 3, 5, 8, 11}
    assert set(seen["weekend"]) == {0, 1}
    assert len(seen["x_price"]) >= 9
    assert {0, 32, 63} <= set(seen["watch"])


def test_gap_buckets_at_powers_of_two_and_at_the_top():
    seconds = np.array([0, 1, 2, 3, 6, 7, 2**20 - 2, 2**20 - 1, 2**31 - 2, 2**31 - 1, 2**33])
    buckets = [0, 1, 1, 2, 2, 3, 19, 20, 30, 31, 31]
    assert gap_buckets(seconds * 1000).tolist() == buckets
    assert gap_buckets(seconds * 1000 + 999).tolist() == buckets  # whole seconds
    assert gap_buckets(np.array([-5000, 0, 999, 1000])).tolist() == [0, 0, 0, 1]


def test_number_buckets_are_monotone_and_symmetric():
    values = np.sort(
        np.random.default_rng(0).normal(size=2000) * 10.0 ** np.random.default_rng(1).integers(-3, 7, 2000)
    )
    buckets = number_buckets(values)
    assert buckets.tolist() == [number_bucket(value) for value in values]
    assert (np.diff(buckets) >= 0).all()
    assert set(buckets) == set(range(1, 64))  # 0 is left for what is unknown
    np.testing.assert_array_equal(number_buckets(-values), 64 - buckets)
    assert number_buckets(np.array([0.0, -0.0, np.nan, np.inf, -np.inf])).tolist() == [32, 32, 0, 63, 1]
    assert number_buckets(np.array([1, 3, 7, 15])).tolist() == [34, 36, 38, 40]


@pytest.mark.parametrize("filters", [{}, {"behaviours": ("click", "view")}])
def test_an_aligned_pathway_begins_anew_only_every_few_events(filters):
    """Cut into chunks of 4, an event is always in the same place of the same chunk."""
    user = next(user for seed in range(99) if len(user := random_user(np.random.default_rng(seed), longest=120)) > 90)
    pathway, reader = (
        Pathway("long", PathwayOptions(length=21, align=4, skip=1, **filters), 50, MANIFEST),
        store([user]).reader,
    )
    every = [event for event in range(len(user)) if not filters or BEHAVIOURS[user.behaviour[event]] != "buy"]
    begins = []
    for end in range(len(user)):
        place = np.array([end])
        rows = SampleRows((reader,), *np.zeros((3, 1), np.int64), first_B=place, stop_B=place + 1, end_B=place)
        events = pathway.events(rows, rows.histories()).place_E.tolist()
        if events:
            begins.append(every.index(events[0]))
            assert events == every[begins[-1] : begins[-1] + len(events)]
            assert len(events) > 17 or begins[-1] == 0
    assert {begin % 4 for begin in begins} == {0}
    assert len(set(begins)) > 4
    assert max(begins) > 16


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100),
    length=st.integers(1, 4),
    skip=st.integers(0, 3),
    behaviours=st.sampled_from((("buy",), ("buy", "view"))),
    align=st.sampled_from((None, 1, 2)),
)
def test_a_filtered_pathway_looks_back_as_far_as_it_must(seed, length, skip, behaviours, align):
    """Users whose events of a behaviour lie in one stretch, far from most requests; also in two folders at once."""
    rng, users = np.random.default_rng(seed), []
    for number in range(3):
        user = random_user(rng, f"u{number}", longest=200)
        stretch = sorted(rng.integers(0, len(user) + 1, 2).tolist())
        rare = np.arange(len(user)) - stretch[0]
        behaviour = np.where((rare >= 0) & (rare < stretch[1] - stretch[0]) & (rare % 3 > 0), 0, 1).astype(np.int16)
        users.append(replace(user, behaviour=behaviour))
    readers = (store(users[:1], batch_events=50).reader, store(users[1:], batch_events=50).reader)
    place = [(number, row) for number, row in ((0, 0), (1, 0), (1, 1)) for _ in range(6)]
    reader_B, row_B = np.array(place).T
    end_B = np.array([int(rng.integers(0, len(users[number + row]) + 1)) for number, row in place])
    rows = SampleRows(readers, reader_B, row_B, np.zeros_like(end_B), end_B, end_B, end_B)
    options = PathwayOptions(length, behaviours, skip=skip, align=align if (align or 1) <= length else None)
    events = Pathway("rare", options, 50, MANIFEST).events(rows, rows.histories())
    expected = [
        chosen(users[number + row], end, options, 50) for (number, row), end in zip(place, end_B.tolist(), strict=True)
    ]
    assert events.length_B.tolist() == [len(found) for found in expected]
    assert events.place_E.tolist() == [event for found in expected for event in found]
    assert events.column("item").tolist() == [
        int(users[number + row].item[event])
        for (number, row), found in zip(place, expected, strict=True)
        for event in found
    ]


def test_the_samples_of_a_batch_may_lie_in_several_folders():
    options = BatchOptions(max_context=5, pathways={"a": PathwayOptions(), "b": PathwayOptions(9, ("view",))})
    indices = [SampleIndex(random_data(seed).reader, "train", options) for seed in (1, 2, 3)]
    rng, parts = np.random.default_rng(0), []
    for number, index in enumerate(indices):
        rows = index.rows(rng.integers(0, len(index), 5))
        parts.append((np.full(5, number), rows.row_B, rows.start_B, rows.first_B, rows.stop_B, rows.end_B))
    mixed = rng.permutation(15)
    columns = [np.concatenate(column)[mixed] for column in zip(*parts, strict=True)]
    rows = SampleRows(tuple(index.reader for index in indices), *columns)
    builder = BatchBuilder(random_sids(), MANIFEST, ITEMS, options, EVERYTHING)
    batch = builder.build(rows)
    for place in range(15):
        alone = builder.build(rows[place : place + 1])
        for name, columns in batch.sequences.items():
            length = int(alone.sequences[name].length_B[0])
            assert int(columns.length_B[place]) == length
            for feature_name, ids_BN in columns.features.items():
                found = ids_BN[place, :length].tolist()
                assert found == alone.sequences[name].features[feature_name][0, :length].tolist()
        assert batch.user["user"][place] == alone.user["user"][0]
        assert batch.target_item_BT[place, 0] == alone.target_item_BT[0, 0]
        assert batch.new_day_BT[place, 0] == alone.new_day_BT[0, 0]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (FeatureNames(events=("makr",)), r"'makr' is no feature of an event.*x_price.*Did you mean 'maker'"),
        (FeatureNames(user=("age_group",)), "'age_group' is no feature of a user in these data; they have user, city"),
        (FeatureNames(request=("item",)), "'item' is no feature of a request .* have scenario, hour, weekday, weekend"),
        (FeatureNames(items=("gap",)), "'gap' is no feature of an item in these data; they have item, category, maker"),
    ],
)
def test_features_that_the_data_lack_are_named(wanted, message):
    with pytest.raises(DataError, match=message):
        BatchBuilder(random_sids(), MANIFEST, ITEMS, BatchOptions(), wanted)


def test_pathways_that_cannot_be_are_named():
    for pathway, message in [
        (PathwayOptions(behaviours=("bye",)), r"history.behaviours names 'bye'.*buy, click, view.*'buy'"),
        (PathwayOptions(scenarios=("sea",)), r"history.scenarios names 'sea'.*feed, search"),
    ]:
        with pytest.raises(DataError, match=message):
            BatchBuilder(random_sids(), MANIFEST, ITEMS, BatchOptions(pathways={"history": pathway}), FeatureNames())
    options = BatchOptions(share_context="user")
    with pytest.raises(DataError, match=r"'age' differs between the requests.*share_context"):
        BatchBuilder(random_sids(), MANIFEST, ITEMS, options, FeatureNames(events=("age",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pathways": {}}, "batch.pathways is empty"),
        ({"pathways": {"my path": PathwayOptions()}}, "'my path' is no name"),
        ({"utc_offset_hours": 15.0}, "batch.utc_offset_hours is 15.0"),
        ({"pathways": {"long": PathwayOptions(length=7, align=8)}}, "long: align 8 is more than its length 7"),
        ({"max_context": 5, "pathways": {"long": PathwayOptions(align=8)}}, "long: align 8 is more than its length 5"),
        ({"share_context": "user", "pathways": {"h": PathwayOptions(skip=1)}}, "user needs one plain pathway"),
        (
            {"share_context": "user", "pathways": {"h": PathwayOptions(length=50)}},
            "user needs one plain pathway",
        ),
        ({"share_context": "user", "pathways": {"a": PathwayOptions(), "b": PathwayOptions()}}, "one plain pathway"),
    ],
)
def test_options_that_cannot_be_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        BatchOptions(**change)
    for wrong, name in (
        ({"length": 0}, "length"),
        ({"skip": -1}, "skip"),
        ({"align": 0}, "align"),
        ({"min_watched": -0.5}, "min_watched"),
    ):
        with pytest.raises(ValueError, match=f"pathway {name} is"):
            PathwayOptions(**wrong)
    assert BatchOptions(share_context="user", pathways={"mine": PathwayOptions()}).pathway_lengths == {"mine": 50}
