"""Versions are found with one look, hang on one another, and train after what was there before, once."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from prepared_folder import random_block, write_folder

from onetrain.data.cursor import Cursor
from onetrain.data.errors import DataError
from onetrain.data.features import FeatureNames
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.data.remote import RemoteFolder
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.store import open_store
from onetrain.data.stream_options import StreamOptions
from onetrain.data.versions import newest_version, open_version, version_folder


def add_version(folder, number, parent=None):
    """Version `number` of 8 users, of whose events the last few are new."""
    rng = np.random.default_rng(number)
    lengths = rng.integers(3, 9, 8)
    block = random_block(rng, lengths, train_start=lengths - rng.integers(1, 3, 8))
    block.valid_start[:] = lengths  # all that is new trains
    within = folder / version_folder(number)
    before = Manifest.load(folder / version_folder(number - 1)).fingerprint
    write_folder(within, block, shard_events=20, fingerprint=f"contents {number}")
    change(within, parent=parent or before)
    return int((lengths - block.train_start).sum())


def change(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def prepared(tmp_path):
    rng = np.random.default_rng(0)
    write_folder(tmp_path / "prepared", random_block(rng, rng.integers(4, 15, 20)))
    return tmp_path / "prepared"


def spec_of(folder, tmp_path, **stream):
    options = StreamOptions(cache=str(tmp_path / "cache"), **stream)
    return StreamSpec(str(folder), options, BatchOptions(max_context=6), FeatureNames(), 3, 16, 1, 1)


@pytest.mark.parametrize("where", [str, lambda folder: f"local://{folder}"])
def test_a_new_version_is_found_with_one_look(prepared, monkeypatch, where):
    looks, exists = [], RemoteFolder.exists
    monkeypatch.setattr(RemoteFolder, "exists", lambda *a: looks.append(1) or exists(*a))
    folder = where(prepared)
    assert newest_version(folder) == 0
    add_version(prepared, 1)
    add_version(prepared, 2)
    (prepared / "versions" / "00003").mkdir()  # no manifest: a copy that has not finished
    assert newest_version(folder) == newest_version(folder, 1) == 2
    looks.clear()
    assert newest_version(folder, since=2) == 2
    assert len(looks) == (folder != str(prepared))
    manifests = [open_version(open_store(folder), version) for version in range(3)]
    assert [manifest.parent for manifest in manifests] == [None, "contents", "contents 1"]


class Listing:
    """A file system that keeps its first listing until it is told not to."""

    def __init__(self):
        self.files, self.kept = set(), None

    def invalidate_cache(self):
        self.kept = None

    def exists(self, path):
        self.kept = set(self.files) if self.kept is None else self.kept
        return path in self.kept


def test_listings_that_were_kept_do_not_hide_a_version(monkeypatch):
    listing = Listing()
    monkeypatch.setattr(RemoteFolder, "_opened", (listing, "shop"))
    assert newest_version("s3://shop") == 0
    listing.files.add("shop/versions/00001/manifest.json")
    assert newest_version("s3://shop") == 1


def test_a_version_on_top_of_something_else_is_refused_with_both_names(prepared):
    add_version(prepared, 1, parent="older contents")
    with pytest.raises(
        DataError, match=r"versions/00001 was appended to .* older contents, but .* before it is contents:"
    ):
        open_version(open_store(prepared), 1)
    change(prepared / "versions" / "00001", parent="contents", catalogue_fingerprint="other items")
    with pytest.raises(DataError, match="catalogue other items"):
        open_version(open_store(prepared), 1)


@pytest.mark.parametrize("where", [str, lambda folder: f"local://{folder}"])
def test_a_run_takes_in_each_new_event_once(prepared, tmp_path, where):
    builder = StepBuilder(spec_of(where(prepared), tmp_path))
    cursor = Cursor().updated(builder.sources.newest())
    base = builder.sources.size
    cursor = cursor.at(32)
    added = add_version(prepared, 1) + add_version(prepared, 2)
    assert builder.sources.newest() == {"": 2}
    grown = cursor.updated(builder.sources.newest())
    builder.order(grown)
    assert builder.sources.size == base + added

    seen = Counter()
    for position in range(0, base + added, 16):
        count = min(16, base + added - position)
        source_B, id_B = builder.order(grown).sample_ids(position, count)
        rows = builder.sources.rows(source_B, id_B)
        seen.update(zip(rows.reader_B.tolist(), rows.row_B.tolist(), rows.first_B.tolist(), strict=True))
        for reader, row, first, stop in zip(rows.reader_B, rows.row_B, rows.first_B, rows.stop_B, strict=True):
            user = rows.readers[reader].user(int(row))
            assert user.train_start <= first < stop <= user.valid_start
        if position < 32:
            assert set(rows.reader_B.tolist()) == {0}  # what was consumed before stays what it was
    assert len(seen) == seen.total() == base + added
    assert builder.build(grown.at(32), 0).stats.samples == 16


def test_in_the_order_of_time_a_version_follows_the_one_before(prepared, tmp_path):
    added = add_version(prepared, 1)
    builder = StepBuilder(spec_of(prepared, tmp_path, order="time"))
    order = builder.order(Cursor().updated(builder.sources.newest()))
    source_B, id_B = order.sample_ids(0, order.length)
    rows = builder.sources.rows(source_B, id_B)
    assert rows.reader_B.tolist() == sorted(rows.reader_B.tolist())
    assert int((rows.reader_B == 1).sum()) == added
    for version in (0, 1):
        here = rows[rows.reader_B == version]
        times = [
            here.readers[version].user(int(r)).timestamp_ms[f] for r, f in zip(here.row_B, here.first_B, strict=True)
        ]
        assert times == sorted(times)


@pytest.mark.parametrize(("kept", "cut"), [(None, False), (9, False), (8, True)])
def test_histories_that_an_append_cut_below_a_pathway_are_warned_of_once(prepared, tmp_path, caplog, kept, cut):
    for number in (1, 2):
        add_version(prepared, number)
        change(prepared / version_folder(number), append_history=kept)
    pathways = {"near": PathwayOptions(length=3), "far": PathwayOptions(length=4, skip=5)}
    spec = replace(spec_of(prepared, tmp_path), batch=BatchOptions(max_context=6, pathways=pathways))
    for _ in range(2):
        StepBuilder(spec)
    found = [record.getMessage() for record in caplog.records if "append_history" in record.getMessage()]
    assert len(found) == cut
    if cut:
        assert f"{prepared} has versions" in found[0]
        assert "append_history 8, and the pathway far reaches 9 events back" in found[0]
