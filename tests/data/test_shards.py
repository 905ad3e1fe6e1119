import pickle
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from raw_events import options, prepare_and_open, random_events, reference, shuffled_rows, write_rows

from onetrain.data.errors import DataError
from onetrain.data.manifest import verify_shards
from onetrain.data.shard_writer import ShardWriter, UserBlock
from onetrain.data.shards import ShardReader, read_items


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


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
@pytest.mark.parametrize("which", ["shard", "items"])
def test_damage_is_found_on_opening(prepared, damage, which):
    manifest, reader, _ = prepared
    path = reader.folder / (manifest.shards[1].file if which == "shard" else manifest.items.file)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        ShardReader(reader.folder, manifest, checksum=False)  # sizes alone do not tell
    for check in (ShardReader, lambda folder, manifest: verify_shards(manifest, folder)):
        with pytest.raises(DataError, match=path.name):
            check(reader.folder, manifest)


def test_remote_folder_is_refused(prepared):
    manifest, _, _ = prepared
    with pytest.raises(DataError, match="Copy the folder"):
        ShardReader("s3://bucket/prepared", manifest)
    with pytest.raises(DataError, match="Copy the folder"):
        read_items("s3://bucket/prepared")


def test_batches_are_bounded(tmp_path):
    lengths = np.full(20_000, 10)
    names = ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms", "duration_ms")
    users = pa.array([str(i) for i in range(len(lengths))])
    columns = {name: np.arange(200_000) % 100 for name in names}
    writer = ShardWriter(tmp_path, (), 1_000_000)
    writer.append(UserBlock(users, lengths, lengths - 2, lengths - 1, columns))
    writer.close()
    file = pa.ipc.open_file(str(tmp_path / writer.shards[0].file))
    rows = [file.get_batch(index).num_rows for index in range(file.num_record_batches)]
    assert rows == [6553, 6553, 6553, 341]


@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_pieces_do_not_show_in_the_files(tmp_path, pieces):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 30, 40)
    lengths[5] = 500  # longer than a batch and a shard
    n = int(lengths.sum())
    columns = {name: rng.integers(0, 50, n) for name in ("item", "timestamp_ms", "behaviour", "scenario", "watch_ms")}
    columns["duration_ms"] = rng.integers(0, 50, n)
    block = UserBlock(pa.array([f"u{i:02}" for i in range(40)]), lengths, lengths, lengths, columns)

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
