"""Shards hold what was written into them, however they are cut, and damage is found when it is read."""

import pickle
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from random_shards import random_data
from raw_events import options, prepare_and_open, random_events, reference, shuffled_rows, write_rows

from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.manifest import verify_shards
from onetrain.data.options import BatchOptions
from onetrain.data.samples import SampleIndex
from onetrain.data.shard_writer import ShardWriter, UserBlock
from onetrain.data.shards import Histories, ShardReader
from onetrain.data.user_table import BATCHES, USERS


@pytest.fixture
def prepared(tmp_path):
    events = random_events(0, users=80)
    log = write_rows(tmp_path / "log", shuffled_rows(events, 0))
    manifest, reader = prepare_and_open(options(tmp_path, log, shard_events=150))
    assert len(manifest.shards) > 2
    return manifest, reader, reference(events)


def test_users_are_views_of_the_shards(prepared):
    _, reader, expected = prepared
    for row, (name, events) in enumerate(expected.items()):
        user = reader.user(row)
        assert user.user == name
        assert len(user) == len(events)
        assert user.timestamp_ms.tolist() == [e.timestamp for e in events]
        assert (user.item.dtype, user.behaviour.dtype, user.timestamp_ms.dtype) == (np.int32, np.int16, np.int64)
        for values in (user.item, user.timestamp_ms, user.behaviour, user.scenario, user.watch_ms, user.duration_ms):
            assert not values.flags.owndata
            assert not values.flags.writeable
    for row in (-1, reader.n_users):
        with pytest.raises(IndexError):
            reader.user(row)


def test_split_bounds(prepared):
    _, reader, expected = prepared
    lengths, valid_start, test_start = reader.split_bounds()
    assert lengths.tolist() == [len(events) for events in expected.values()]
    assert {values.dtype for values in (lengths, valid_start, test_start)} == {np.dtype(np.int64)}
    rows = [reader.user(row) for row in range(reader.n_users)]
    assert valid_start.tolist() == [user.valid_start for user in rows]
    assert test_start.tolist() == [user.test_start for user in rows]


def test_pickles_into_another_process(prepared):
    _, reader, _ = prepared
    other = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(other.user(3).item, reader.user(3).item)


def columns_of(user):
    bounds = (user.train_start, user.valid_start, user.test_start)
    names = ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms", "duration_ms")
    events = {name: getattr(user, name).tolist() for name in names}
    prices = [None if np.isnan(price) else float(price) for price in user.extra["price"]]
    return (user.user, *bounds, events, prices, user.features)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 300), grown=st.booleans(), longest=st.sampled_from((3, 14, 60)))
def test_users_are_what_was_written_and_what_arrow_reads(seed, grown, longest):
    data = random_data(seed, longest=longest, grown=grown)
    found = [columns_of(data.reader.user(row)) for row in range(data.reader.n_users)]
    assert found == [columns_of(user) for user in data.users]
    by_arrow = []
    for shard in data.manifest.shards:
        by_arrow += pa.ipc.open_file(str(data.folder / shard.file)).read_all().to_pylist()
    assert [columns_of(user) for user in data.users] == [
        (
            row["user"],
            *(row[name] for name in ("train_start", "valid_start", "test_start")),
            {name: row[name] for name in found[0][4]},
            [None if np.isnan(price) else price for price in row["x_price"]],
            {"city": row["u_city"]},
        )
        for row in by_arrow
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 300), other=st.integers(301, 400))
def test_events_of_many_users_are_read_one_user_after_another(seed, other):
    both = [random_data(number, longest=30) for number in (seed, other)]
    rng = np.random.default_rng(seed)
    reader_B, row_B = rng.integers(0, 2, 20), rng.integers(0, 8, 20)
    users = [both[number].users[row] for number, row in zip(reader_B, row_B, strict=True)]
    bounds_B2 = np.sort([rng.integers(0, len(user) + 1, 2) for user in users], axis=1)
    histories = Histories([data.reader for data in both], reader_B, row_B)
    for name in ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms", "duration_ms", "x_price"):
        values = [user.extra["price"] if name == "x_price" else getattr(user, name) for user in users]
        expected = np.concatenate([column[start:stop] for column, (start, stop) in zip(values, bounds_B2, strict=True)])
        found = histories.events(name, *bounds_B2.T)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    assert histories.users("length").tolist() == [len(user) for user in users]
    assert histories.users("u_city").tolist() == [user.features["city"] for user in users]
    assert histories.users("id").tolist() == [xxhash.xxh3_64_intdigest(user.user.encode()) % 2**63 for user in users]


def copied(data, folder):
    """A fresh copy of the folder, to damage."""
    shutil.copytree(data.folder, folder, ignore=shutil.ignore_patterns("index"))
    return ShardReader(folder, data.manifest)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100), where=st.floats(0, 1, exclude_max=True), of_users=st.booleans())
def test_a_flipped_bit_is_found_at_the_first_touch_and_only_there(seed, where, of_users):
    data = random_data(seed, longest=30)
    table = data.reader.table
    batch = int(where * len(table.batches))
    first = np.append(table.batches["first_row"], data.manifest.users).tolist()
    inside = where * len(table.batches) - batch
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "copy"
        copied(data, folder)
        shard = data.manifest.shards[table.batches["shard"][batch]].file
        if of_users:
            size = table.users.dtype.itemsize
            flip(folder / USERS, first[batch] * size + int(inside * size * (first[batch + 1] - first[batch])))
        else:
            flip(folder / shard, int(table.batches["at"][batch]) + int(inside * int(table.batches["size"][batch])))
        reader = ShardReader(folder, data.manifest)
        for row in np.random.default_rng(seed).permutation(data.manifest.users).tolist():
            if first[batch] <= row < first[batch + 1]:
                for _ in range(2):  # and every time
                    with pytest.raises(DamagedShardError, match=r"is damaged.*Copy it again") as caught:
                        reader.user(row)
                    assert caught.value.shard == (USERS if of_users else shard)
                assert reader.damaged == {int(table.batches["shard"][batch])}
            else:
                assert columns_of(reader.user(row)) == columns_of(data.users[row])


@pytest.mark.parametrize("damage", ["truncated", "missing"])
@pytest.mark.parametrize("which", ["shard", "users", "batches"])
def test_missing_and_truncated_files_are_named(prepared, damage, which):
    manifest, reader, _ = prepared
    folder = Path(reader.store.name)
    path = folder / {"shard": manifest.shards[1].file, "users": USERS, "batches": BATCHES}[which]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        path.unlink()

    def read_all():
        other = ShardReader(folder, manifest)
        assert which == "shard"  # opening looks at the tables alone
        assert other.user(0).user == reader.user(0).user  # of the first shard
        return [other.user(row) for row in range(manifest.users)]

    with pytest.raises(DamagedShardError, match=f"{path.name}.*(truncated|cannot be read)") as caught:
        read_all()
    assert caught.value.shard == path.name
    with pytest.raises(DataError, match=path.name):
        verify_shards(manifest, folder)


@pytest.mark.parametrize("which", ["shard", "items", "batches"])
def test_verify_shards_reads_everything(prepared, which):
    manifest, reader, _ = prepared
    folder = Path(reader.store.name)
    path = folder / {"shard": manifest.shards[1].file, "items": manifest.items.file, "batches": BATCHES}[which]
    verify_shards(manifest, folder)
    flip(path, path.stat().st_size // 2)
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        verify_shards(manifest, folder)
    if which == "batches":
        with pytest.raises(DamagedShardError, match=rf"{BATCHES} is damaged"):
            ShardReader(folder, manifest)


def test_a_split_is_not_counted_by_a_damaged_user_table(prepared):
    manifest, reader, _ = prepared
    folder = Path(reader.store.name)
    flip(folder / USERS, 1000)
    with pytest.raises(DamagedShardError, match=f"{USERS} is damaged"):
        SampleIndex(ShardReader(folder, manifest), "train", BatchOptions())


def test_batches_are_bounded(tmp_path):
    lengths = np.full(20_000, 10)
    names = ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms", "duration_ms")
    users = pa.array([str(i) for i in range(len(lengths))])
    columns = {name: np.arange(200_000) % 100 for name in names}
    writer = ShardWriter(tmp_path, (), 1_000_000)
    writer.append(UserBlock(users, lengths, lengths * 0, lengths - 2, lengths - 1, columns))
    writer.close()
    file = pa.ipc.open_file(str(tmp_path / writer.shards[0].file))
    rows = [file.get_batch(index).num_rows for index in range(file.num_record_batches)]
    assert rows == [*[1638] * 12, 344]


@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_pieces_do_not_show_in_the_files(tmp_path, pieces):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 40)
    lengths[5] = 500  # longer than a batch and a shard
    n = int(lengths.sum())
    columns = {name: rng.integers(0, 50, n) for name in ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms")}
    columns["duration_ms"] = rng.integers(0, 50, n)
    block = UserBlock(pa.array([f"u{i:02}" for i in range(40)]), lengths, lengths * 0, lengths, lengths, columns)

    def written(folder, cuts):
        folder.mkdir()
        writer = ShardWriter(folder, (), 120)
        for start, stop in pairwise(cuts):
            writer.append(block[start:stop])
        writer.close()
        for shard in writer.shards:
            assert shard.events <= 120 or shard.rows == 1
        return {path.name: path.read_bytes() for path in folder.iterdir()}, writer.shards

    whole, shards = written(tmp_path / "whole", [0, 40])
    cuts = np.linspace(0, 40, pieces + 1).astype(int).tolist()
    assert written(tmp_path / "pieces", cuts) == (whole, shards)
    assert sum(shard.rows for shard in shards) == 40
    assert sum(shard.events for shard in shards) == n
