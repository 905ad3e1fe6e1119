"""Enumeration of samples against a plain reading of the rules, event by event, over shards of any layout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_shards import BEHAVIOURS, random_data, random_reader

from onetrain.data.errors import DataError
from onetrain.data.options import BatchOptions
from onetrain.data.samples import SampleIndex


@st.composite
def batch_options(draw, **fixed):
    max_context = draw(st.integers(1, 8))
    chosen = {
        "max_context": max_context,
        "min_context": draw(st.integers(1, max_context)),
        "request_by": draw(st.sampled_from(("event", "timestamp"))),
        "share_context": draw(st.sampled_from(("request", "user"))),
        "target_behaviours": tuple(draw(st.lists(st.sampled_from(BEHAVIOURS), max_size=2, unique=True))),
    }
    return BatchOptions(**{**chosen, **fixed})


def split_of(user, event):
    if event < user.train_start:
        return "context only"
    if event < user.valid_start:
        return "train"
    return "valid" if event < user.test_start else "test"


def expected_requests(user, split, options):
    """[(context end, targets)] of one user in time order."""
    requests = {}
    for event in range(len(user)):
        if split_of(user, event) != split:
            continue
        if options.target_behaviours and BEHAVIOURS[user.behaviour[event]] not in options.target_behaviours:
            continue
        if options.request_by == "event":
            key = end = event
        else:
            key = end = sum(1 for other in range(len(user)) if user.timestamp_ms[other] < user.timestamp_ms[event])
        if end >= options.min_context:
            requests.setdefault(key, (end, []))[1].append(event)
    return [(end, tuple(targets)) for end, targets in requests.values()]


def expected_samples(user, split, options):
    """[(window start, requests)] of one user."""
    size, samples = options.max_context, []
    for end, targets in expected_requests(user, split, options):
        if options.share_context == "request" or not samples:
            samples.append((max(0, end - size), [(end, targets)]))
        elif end - samples[-1][0] <= size:
            samples[-1][1].append((end, targets))
        else:
            samples.append((end - max(1, size // 2), [(end, targets)]))
    return samples


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    options=batch_options(),
    split=st.sampled_from(("train", "valid", "test")),
    seed=st.integers(0, 300),
    grown=st.booleans(),
    by_time=st.booleans(),
)
def test_samples_are_those_of_the_rules(options, split, seed, grown, by_time):
    data = random_data(seed, grown=grown)
    index = SampleIndex(data.reader, split, options, by_time=by_time)
    found = [index[number] for number in range(len(index))]
    expected = [(user.user, *sample) for user in data.users for sample in expected_samples(user, split, options)]
    assert [
        (s.user.user, s.start, [(request.context_end, request.targets) for request in s.requests]) for s in found
    ] == expected
    requests = [(user.user, *request) for user in data.users for request in expected_requests(user, split, options)]
    assert [(s.user.user, r.context_end, r.targets) for s in found for r in s.requests] == requests  # each once
    for sample in found:
        assert 0 <= sample.start < sample.end <= sample.start + options.max_context
        for request in sample.requests:
            assert request.context_end - sample.start >= min(request.context_end, max(1, options.max_context // 2))
            for target in request.targets:
                assert request.context_end <= target  # nothing at or after its own moment
                assert split_of(sample.user, target) == split
                if options.request_by == "timestamp":
                    seen = sample.user.timestamp_ms[: request.context_end]
                    assert (seen < sample.user.timestamp_ms[target]).all()
    check_rows(index, found, data.users)
    if by_time:
        moments = [int(s.user.timestamp_ms[s.requests[-1].targets[0]]) for s in found]
        assert index.by_time.tolist() == sorted(range(len(found)), key=lambda number: (moments[number], number))


def check_rows(index, found, users):
    """The columns of any samples, in any order and more than once, say what looking at each one says."""
    ids = np.random.default_rng(0).integers(0, max(len(found), 1), 2 * len(found))
    rows = index.rows(ids)
    assert len(rows) == len(ids)
    for place, number in enumerate(ids.tolist()):
        sample = found[number]
        user = users[rows.row_B[place]]
        assert (user.user, rows.start_B[place], rows.end_B[place]) == (sample.user.user, sample.start, sample.end)
        targets = [event for request in sample.requests for event in request.targets]
        allowed = [BEHAVIOURS.index(name) for name in index.options.target_behaviours or BEHAVIOURS]
        within = range(rows.first_B[place], rows.stop_B[place])
        assert [event for event in within if user.behaviour[event] in allowed] == targets


@settings(max_examples=40, deadline=None, derandomize=True)
@given(options=batch_options(share_context="request"), seed=st.integers(0, 300))
def test_sharing_contexts_covers_the_same_requests(options, seed):
    reader = random_reader(seed)
    shared = SampleIndex(reader, "train", BatchOptions(**{**vars(options), "share_context": "user"}))
    alone = SampleIndex(reader, "train", options)
    assert [(s.user.user, r) for s in map(shared.__getitem__, range(len(shared))) for r in s.requests] == [
        (s.user.user, r) for s in map(alone.__getitem__, range(len(alone))) for r in s.requests
    ]


def test_numbers_outside_the_index_and_unknown_behaviours_are_errors():
    reader = random_reader(0)
    index = SampleIndex(reader, "train", BatchOptions())
    for number in (-1, len(index)):
        with pytest.raises(IndexError):
            index[number]
    for options in (BatchOptions(target_behaviours=("share",)), BatchOptions(behaviour_weights={"share": 2.0})):
        with pytest.raises(DataError, match=r"share.*buy, click, view"):
            SampleIndex(reader, "train", options)
