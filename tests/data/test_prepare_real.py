"""Preparation of real logs, where they are present beside the project."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from raw_events import prepare_and_open

from onetrain.data.options import DataOptions, SourceOptions
from onetrain.data.shards import read_items

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def folder_of(name):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not present")
    return folder


def test_amazon_beauty(tmp_path):
    beauty = folder_of("amazon14_beauty")
    source = SourceOptions("amazon", str(beauty / "sequences.tsv.gz"), str(beauty / "items.tsv.gz"))
    manifest, reader = prepare_and_open(DataOptions(str(tmp_path / "prepared"), source))
    items = read_items(tmp_path / "prepared")
    assert (manifest.users, len(items), manifest.events) == (22_363, 12_101, 198_502)
    assert manifest.report["duplicates"] == 0
    assert items["item"].to_pylist() == [str(i) for i in range(1, 12_102)]  # row i is row i of the published arrays
    lengths, _, test_start = reader.split_bounds()
    assert (lengths.min(), lengths.max(), np.median(lengths)) == (5, 204, 6)
    np.testing.assert_array_equal(test_start, lengths - 1)
    same_day = manifest.report["ties"] / (manifest.events - manifest.users)
    assert round(100 * same_day, 1) == 43.9
    undated = sum(int(reader.user(row).timestamp_ms[0] == 0) for row in range(reader.n_users))
    assert undated == 194
    assert items["text"].null_count == 0  # the 7 without a title have keywords


def test_kuairand_pure(tmp_path):
    folder = folder_of("kuairand_pure_slice")
    log = folder / "log_20220425_20220430.parquet"
    source = SourceOptions("kuairand", str(log), str(folder / "videos.parquet"), extra=("profile_stay_time",))
    manifest, reader = prepare_and_open(DataOptions(str(tmp_path / "prepared"), source))
    raw = {name: column.to_numpy() for name, column in zip(pq.read_schema(log).names, pq.read_table(log), strict=True)}
    report = manifest.report
    assert report["rows_read"] == len(raw["user_id"]) == 94_976
    assert report["zero_duration"] == (raw["duration_ms"] == 0).sum() > 0
    names = ("hate", "follow", "forward", "comment", "like", "profile_enter", "long_view", "click")
    feedback = [raw[name if name == "long_view" else f"is_{name}"] > 0 for name in names]
    behaviour = np.select(feedback, names, "view").tolist()
    user, item, time = (raw[name].tolist() for name in ("user_id", "video_id", "time_ms"))
    unique = set(zip(user, item, time, behaviour, strict=True))
    assert manifest.events == len(unique)
    assert report["duplicates_dropped"] == 94_976 - len(unique) > 0
    # a repeat with other feedback is no duplicate
    assert report["duplicates_dropped"] <= 94_976 - len(set(zip(user, item, time, strict=True)))
    assert report["ties"] == len(unique) - len(set(zip(user, time, strict=True))) > 0
    assert manifest.users == len(set(user))
    items = read_items(tmp_path / "prepared")
    assert len(items) == 7_583
    found = Counter()
    for row in range(reader.n_users):
        found.update(reader.user(row).behaviour.tolist())
    wanted = Counter(name for *_, name in unique)
    assert {manifest.behaviours[index]: count for index, count in found.items()} == wanted
    assert pc.sum(items["train_count"]).as_py() == manifest.n_train_events


def test_kuairand_attributes(tmp_path):
    folder = folder_of("kuairand_pure_slice")
    paths = [str(folder / f"{name}.parquet") for name in ("log_20220425_20220430", "videos", "users")]
    source = SourceOptions(
        "kuairand",
        *paths,
        item_features={"author": "author_id", "kind": "video_type"},
        user_features={"activity": "user_active_degree", "device": "onehot_feat4"},
    )
    manifest, reader = prepare_and_open(DataOptions(str(tmp_path / "prepared"), source))
    videos, people = (pq.read_table(path).to_pylist() for path in paths[1:])
    items = read_items(tmp_path / "prepared")
    author = {str(video["video_id"]): str(video["author_id"]) for video in videos}
    names = (None, *manifest.item_features["author"])
    assert list(names[1:]) == sorted(set(author.values()))
    assert [names[number] for number in items["f_author"].to_pylist()] == [author[i] for i in items["item"].to_pylist()]
    user_of = {str(person["user_id"]): person for person in people}
    activity, device = ((None, *manifest.user_features[name]) for name in ("activity", "device"))
    unknown = 0
    for row in range(reader.n_users):
        user = reader.user(row)
        person = user_of[user.user]
        assert activity[user.features["activity"]] == person["user_active_degree"]
        value = person["onehot_feat4"]
        missing = value is None or np.isnan(value)
        assert device[user.features["device"]] == (None if missing else str(int(value)))
        unknown += missing
    assert manifest.report["users_not_in_file"] == 0
    assert unknown  # the file has users without it
