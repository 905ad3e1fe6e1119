"""Batches against their samples, value by value."""

import datetime

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from memory_reader import BEHAVIOURS, random_reader, random_sids

from onetrain.data.batch import BatchBuilder, gap_buckets
from onetrain.data.options import BatchOptions
from onetrain.data.samples import SampleIndex

WEIGHTS = {"buy": 4.0, "view": 0.25}


def utc_day(timestamp_ms):
    return datetime.datetime.fromtimestamp(int(timestamp_ms) / 1000, datetime.UTC).date()


def bucket(user, event):
    if event == 0:
        return 0
    seconds = int(user.timestamp_ms[event] - user.timestamp_ms[event - 1]) // 1000
    return (1 + seconds).bit_length() - 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    request_by=st.sampled_from(("event", "timestamp")),
    share_context=st.sampled_from(("request", "user")),
    max_context=st.integers(1, 9),
    levels=st.sampled_from((3, 4)),
)
def test_every_value_of_a_batch(seed, request_by, share_context, max_context, levels):
    options = BatchOptions(max_context, request_by, share_context, behaviour_weights=WEIGHTS)
    index = SampleIndex(random_reader(seed), "train", options)
    numbers = np.random.default_rng(seed).permutation(len(index))[:6].tolist()
    assume(numbers)
    samples, sids = [index[number] for number in numbers], random_sids(levels)
    batch = BatchBuilder(sids, options, BEHAVIOURS).build(samples)
    targets = [[(r.context_end, event) for r in sample.requests for event in r.targets] for sample in samples]
    assert batch.item_BN.shape == (len(samples), max(sample.end - sample.start for sample in samples))
    assert batch.weight_BT.shape == (len(samples), max(map(len, targets)))
    total = 0.0
    for row, (sample, expected) in enumerate(zip(samples, targets, strict=True)):
        user = sample.user
        assert int(batch.length_B[row]) == sample.end - sample.start
        for column in range(batch.item_BN.shape[1]):
            event = sample.start + column
            real = event < sample.end
            assert int(batch.item_BN[row, column]) == (user.item[event] if real else 0)
            assert int(batch.behaviour_BN[row, column]) == (user.behaviour[event] if real else 0)
            assert int(batch.scenario_BN[row, column]) == (user.scenario[event] if real else 0)
            assert int(batch.gap_BN[row, column]) == (bucket(user, event) if real else 0)
            if real:
                assert batch.sid_BNL[row, column].tolist() == sids.codes_IL[user.item[event]].tolist()
        for slot in range(batch.weight_BT.shape[1]):
            if slot >= len(expected):
                assert float(batch.weight_BT[row, slot]) == 0
                assert not batch.new_day_BT[row, slot]
                continue
            end, event = expected[slot]
            assert int(batch.target_item_BT[row, slot]) == user.item[event]
            assert batch.target_sid_BTL[row, slot].tolist() == sids.codes_IL[user.item[event]].tolist()
            assert int(batch.end_BT[row, slot]) == end - sample.start
            weight = WEIGHTS.get(BEHAVIOURS[user.behaviour[event]], 1.0)
            assert float(batch.weight_BT[row, slot]) == weight
            total += weight
            later = utc_day(user.timestamp_ms[event]) > utc_day(user.timestamp_ms[end - 1])
            assert bool(batch.new_day_BT[row, slot]) == later
    assert batch.weight == pytest.approx(total)
    integers = {name for name, tensor in vars(batch).items() if tensor.dtype == torch.int64}
    assert set(vars(batch)) - integers == {"weight_BT", "new_day_BT"}
    assert (batch.weight_BT.dtype, batch.new_day_BT.dtype) == (torch.float32, torch.bool)


def test_gap_buckets_at_powers_of_two_and_at_the_top():
    seconds = [0, 0, 1, 2, 3, 6, 7, 2**20 - 2, 2**20 - 1, 2**31 - 2, 2**31 - 1, 2**33]
    timestamps = np.cumsum(np.array(seconds, dtype=np.int64) * 1000)
    buckets = [0, 0, 1, 1, 2, 2, 3, 19, 20, 30, 31, 31]
    assert gap_buckets(timestamps, slice(0, len(seconds))).tolist() == buckets
    for start in range(len(seconds)):  # a window that begins later has the same buckets
        assert gap_buckets(timestamps, slice(start, len(seconds))).tolist() == buckets[start:]
    assert gap_buckets(np.array([0, 999, 1998, 2998]), slice(0, 4)).tolist() == [0, 0, 0, 1]  # whole seconds
