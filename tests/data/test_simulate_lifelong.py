import hashlib
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onetrain.data import simulate_lifelong
from onetrain.data.errors import DataError
from onetrain.data.options import BatchOptions, DataOptions, LifelongOptions, SourceOptions, SplitOptions
from onetrain.data.prepare import prepare
from onetrain.data.samples import SampleIndex
from onetrain.data.shards import ShardReader
from onetrain.model.options import TokenizerOptions
from onetrain.model.tokenizer import tokenize_items

SMALL = LifelongOptions(
    users=40,
    held_out_users=6,
    themes=6,
    variants=4,
    rebuys=3,
    min_events=150,
    max_events=400,
    min_distance=100,
    max_distance=300,
    item_dim=12,
    seed=2,
)


def read_users(folder):
    """Columns of every user's events, oldest first: item, timestamp, behaviour."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(Path(folder).glob("events-*.parquet")))
    users = {}
    for user, *event in zip(
        *(table[name].to_pylist() for name in ("user", "item", "timestamp", "behaviour")), strict=True
    ):
        users.setdefault(user, []).append(event)
    return users


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lifelong")
    simulate_lifelong.write_logs(SMALL, path)
    return path


@pytest.fixture(scope="module")
def users(folder):
    return read_users(folder)


@pytest.fixture(scope="module")
def truth(folder):
    """(user, theme) -> (variant, distance)."""
    rows = simulate_lifelong.read_truth(folder).to_pylist()
    return {(row["user"], row["theme"]): (row["variant"], row["distance"]) for row in rows}


def theme_and_variant(item):
    return int(item[1:4]), int(item[5:8])


def test_equal_options_give_equal_bytes_and_older_logs_go(tmp_path, folder, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "events-00007.parquet").write_bytes(b"old")
    simulate_lifelong.write_logs(SMALL, tmp_path / "a")
    simulate_lifelong.write_logs(replace(SMALL, seed=3), tmp_path / "b")
    assert digests(tmp_path / "a") == digests(folder) != digests(tmp_path / "b")
    monkeypatch.setattr(simulate_lifelong, "USERS_PER_CHUNK", 16)
    simulate_lifelong.write_logs(SMALL, tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").glob("events-*")) == [
        f"events-0000{number}.parquet" for number in range(3)
    ]
    assert read_users(tmp_path / "c").keys() == read_users(folder).keys()


def test_only_one_event_long_ago_tells_a_favourite(users, truth):
    assert len(users) == SMALL.users
    for user, events in users.items():
        history, request = events[: -SMALL.rebuys], events[-SMALL.rebuys :]
        assert SMALL.min_events <= len(history) <= SMALL.max_events
        assert {behaviour for *_, behaviour in request} == {"rebuy"}
        assert len({timestamp for _, timestamp, _ in request}) == 1
        assert all(a[1] < b[1] for a, b in zip(history, [*history[1:], request[0]], strict=True))
        bought = {
            theme_and_variant(item): len(history) - place
            for place, (item, _, behaviour) in enumerate(history)
            if behaviour == "buy"
        }
        told = {(theme, truth[user, theme][0]): truth[user, theme][1] for theme in range(SMALL.themes)}
        assert bought == told
        assert all(SMALL.min_distance <= distance <= SMALL.max_distance for distance in bought.values())
        taken = [theme_and_variant(item) for item, *_ in request]
        assert len({theme for theme, _ in taken}) == SMALL.rebuys
        assert all(pair in bought for pair in taken)


def test_distances_and_favourites_are_spread(truth):
    distances = np.array([distance for _, distance in truth.values()])
    assert distances.min() < SMALL.min_distance + 20
    assert distances.max() > 240
    assert Counter(variant for variant, _ in truth.values()).keys() == set(range(SMALL.variants))


def test_what_is_not_the_deciding_event_tells_nothing(users, truth):
    """Noise shows a favourite no more often than chance, and themes follow one another."""
    shown, followed, events = 0, Counter(), 0
    for user, rows in users.items():
        pairs = [theme_and_variant(item) for item, _, behaviour in rows if behaviour in ("view", "click")]
        shown += sum(truth[user, theme][0] == variant for theme, variant in pairs)
        themes = [theme for theme, _ in pairs]
        followed.update((after - before) % SMALL.themes for before, after in itertools.pairwise(themes))
        events += len(pairs)
    assert abs(shown / events - 1 / SMALL.variants) < 4 * np.sqrt(0.25 * 0.75 / events)
    share = np.array([followed[step] for step in range(SMALL.themes)]) / sum(followed.values())
    jump = 1 - simulate_lifelong.STAY - simulate_lifelong.FOLLOW
    expected = np.full(SMALL.themes, jump / SMALL.themes)
    expected[:2] += simulate_lifelong.STAY, simulate_lifelong.FOLLOW
    assert np.abs(share - expected).max() < 0.04  # the deciding events break the chain now and then


def test_recent_themes_are_those_seen_last(tmp_path):
    simulate_lifelong.write_logs(replace(SMALL, themes_of="recent"), tmp_path)
    for events in read_users(tmp_path).values():
        themes = [theme_and_variant(item)[0] for item, *_ in events]
        history, taken = themes[: -SMALL.rebuys], set(themes[-SMALL.rebuys :])
        assert set(list(dict.fromkeys(reversed(history)))[: SMALL.rebuys]) == taken


def test_one_history_has_many_targets_and_users_are_kept_apart(tmp_path, folder):
    source = SourceOptions(reader="lifelong", events=str(tmp_path / "logs"), lifelong=SMALL)
    split = SplitOptions("global_time", simulate_lifelong.VALID_FROM_MS, simulate_lifelong.TEST_FROM_MS)
    options = DataOptions(prepared=str(tmp_path / "prepared"), source=source, split=split)
    manifest = prepare(options)
    assert {name: digest for name, digest in digests(tmp_path / "logs").items() if name != "simulator.json"} == digests(
        folder
    )
    reader = ShardReader(tmp_path / "prepared", manifest)
    batch = BatchOptions(max_context=500, request_by="timestamp", target_behaviours=("rebuy",))
    seen = {}
    for name in ("train", "valid", "test"):
        index = SampleIndex(reader, name, batch)
        samples = [index[number] for number in range(len(index))]
        assert all(len(sample.requests) == 1 for sample in samples)
        assert all(len(sample.requests[0].targets) == SMALL.rebuys for sample in samples)
        assert all(sample.end == len(sample.user) - SMALL.rebuys for sample in samples)
        seen[name] = {sample.user.user for sample in samples}
    assert [len(users) for users in seen.values()] == [28, 6, 6]
    assert len(set.union(*seen.values())) == SMALL.users
    with pytest.raises(DataError, match="holds logs of other simulator options"):
        prepare(replace(options, source=replace(source, lifelong=replace(SMALL, seed=9))))


@pytest.mark.parametrize("themes", [8, 24])
def test_residual_kmeans_finds_themes_and_variants(tmp_path, themes):
    options = LifelongOptions(users=1, held_out_users=0, themes=themes)
    simulate_lifelong.write_logs(options, tmp_path)
    items = pq.read_table(tmp_path / "items.parquet")
    embeddings = np.array(items["embedding"].to_pylist(), dtype=np.float32)
    codes_IL = tokenize_items(embeddings, TokenizerOptions(codebook=(themes, 8), restarts=10)).codes_IL
    pairs = {
        (theme_and_variant(item), tuple(codes)) for item, codes in zip(items["id"].to_pylist(), codes_IL, strict=True)
    }
    for level, count in enumerate((options.themes, options.variants)):
        assert len({(pair[level], codes[level]) for pair, codes in pairs}) == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rebuys": 7}, "rebuys is 7"),
        ({"users": 12}, "leave none to train on"),
        ({"item_dim": 9}, "item_dim is 9"),
        ({"min_events": 110}, "cannot hold 6 deciding events"),
        ({"max_distance": 104}, "cannot hold 6 deciding events"),
        ({"max_events": 149}, "cannot hold"),
        ({"variants": 1}, "variants is 1"),
    ],
)
def test_options_that_fit_no_user(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        simulate_lifelong.write_logs(replace(SMALL, **change), tmp_path)
