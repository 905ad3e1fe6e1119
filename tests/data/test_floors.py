"""Floors against counting in plain Python, and against the figures that BASELINES.md records for Amazon Beauty."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from random_shards import ITEMS, MANIFEST, random_data, random_items, random_sids

from onetrain.data import floors as floors_module
from onetrain.data import training_events
from onetrain.data.batch import BatchBuilder
from onetrain.data.features import FeatureNames
from onetrain.data.floors import FLOORS, Floors
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions, DataOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.samples import SampleIndex
from onetrain.data.shards import ShardReader
from onetrain.model.ranking import ranking_metrics

BEAUTY = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "amazon14_beauty"


def scores(users):
    """Plain counts: training events of every item, and training pairs."""
    popularity, follows = Counter(), Counter()
    for user in users:
        trained = user.item[: user.valid_start].tolist()
        popularity.update(trained)
        follows.update(pairwise(trained))
    return popularity, follows


@pytest.mark.parametrize("events", [1, 20, 10**6])
def test_training_events_come_in_blocks_of_whole_users(events, monkeypatch):
    data = random_data(2, users=40)
    monkeypatch.setattr(training_events, "MOST_USERS", 9)
    blocks = list(training_events.training_blocks(data.reader, events))
    trained = [(int(item), row) for row, user in enumerate(data.users) for item in user.item[: user.valid_start]]
    assert [pair for block in blocks for pair in zip(*(values.tolist() for values in block), strict=True)] == trained
    of_users = [set(user.tolist()) for _, user in blocks]
    assert sum(map(len, of_users)) == len(set.union(*of_users))  # nobody is cut in two
    assert all(len(users) == 1 or len(item) <= events for (item, _), users in zip(blocks, of_users, strict=True))
    assert all(len(users) <= 9 for users in of_users)
    monkeypatch.setattr(floors_module, "EVENTS_PER_BLOCK", events)
    floors, (popularity, follows) = Floors(data.reader, ITEMS), scores(data.users)
    assert {item: floors.popularity_I[item] for item in popularity} == popularity
    assert floors.popularity_I.sum() == len(trained)
    for (before, after), times in follows.items():
        assert floors.transitions[before, after] == times + 0.5 * follows[after, before]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("request_by", ["event", "timestamp"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_ranks_equal_plain_counting(seed, request_by, split):
    data = random_data(seed, users=15)
    index = SampleIndex(data.reader, split, BatchOptions(max_context=3, request_by=request_by))
    samples = [index[number] for number in range(len(index))]
    builder = BatchBuilder(random_sids(), MANIFEST, random_items(), index.options, FeatureNames())
    batch = builder.build(index.rows(range(len(index))))
    floors, (popularity, follows) = Floors(data.reader, ITEMS), scores(data.users)
    ranks = {name: floors.ranks(name, samples, batch.target_item_BT.numpy()) for name in FLOORS}
    for row, sample in enumerate(samples):
        items = sample.user.item.tolist()
        history, last = set(items[: sample.end]), items[sample.end - 1]
        targets = [items[event] for request in sample.requests for event in request.targets]
        listed = [item for item in range(ITEMS) if item not in history or item in targets]

        def by_popularity(item):
            return popularity[item]

        def by_transitions(item, last=last):
            return (follows[last, item] + 0.5 * follows[item, last], popularity[item])

        for name, score in zip(FLOORS, (by_popularity, by_transitions), strict=True):
            for slot, target in enumerate(targets):
                ahead = sum(score(item) > score(target) for item in listed)
                tied = sum(score(item) == score(target) for item in listed) - 1
                assert ranks[name][row, slot] == ahead + tied / 2


@pytest.fixture(scope="module")
def beauty(tmp_path_factory):
    """Per request of the test split: ranks by either floor, and whether its day is a later one."""
    if not BEAUTY.is_dir():
        pytest.skip("amazon14_beauty is not present")
    folder = tmp_path_factory.mktemp("beauty")
    source = SourceOptions("amazon", str(BEAUTY / "sequences.tsv.gz"), str(BEAUTY / "items.tsv.gz"))
    prepare(DataOptions(str(folder / "prepared"), source))
    manifest = Manifest.load(folder / "prepared")
    reader = ShardReader(folder / "prepared", manifest)
    index = SampleIndex(reader, "test", BatchOptions())
    floors = Floors(reader, manifest.items.rows)
    ranks, new_day = {name: [] for name in FLOORS}, []
    for start in range(0, len(index), 256):
        samples = [index[number] for number in range(start, min(start + 256, len(index)))]
        events = [sample.requests[0].targets[0] for sample in samples]
        targets = np.array([[s.user.item[e]] for s, e in zip(samples, events, strict=True)], dtype=np.int64)
        for name in FLOORS:
            ranks[name].append(floors.ranks(name, samples, targets))
        days = [s.user.timestamp_ms // 86_400_000 for s in samples]
        new_day += [day[e] > day[e - 1] for day, e in zip(days, events, strict=True)]
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in ranks.items()}, torch.tensor(new_day)


def figures(ranks):
    metrics = ranking_metrics(ranks, torch.ones_like(ranks, dtype=torch.bool), (5, 10))
    return [float(metrics[name].mean()) for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("floor", "published"),
    [("popularity", [0.0081, 0.0044, 0.0120, 0.0056]), ("last-item transitions", [0.0530, 0.0397, 0.0693, 0.0449])],
)
def test_beauty_floors_are_those_of_the_baselines(beauty, floor, published):
    ranks, _ = beauty
    assert len(ranks[floor]) == 22_363
    assert figures(ranks[floor]) == pytest.approx(published, abs=5e-4)


@pytest.mark.slow
def test_beauty_transitions_on_users_whose_test_item_is_of_a_later_day(beauty):
    ranks, new_day = beauty
    assert figures(ranks["last-item transitions"][new_day])[2:] == pytest.approx([0.0434, 0.0248], abs=5e-4)
    assert figures(ranks["last-item transitions"][~new_day])[2:] == pytest.approx([0.1030, 0.0712], abs=5e-4)
