"""Remote folders are read through a bounded cache; damage is a named error, or skipped and counted, wherever it is."""

import os
import pickle
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
from prepared_folder import random_block, write_folder

from onetrain.data import file_cache, remote
from onetrain.data.cursor import Cursor
from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.features import FeatureNames
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.remote import RemoteFolder
from onetrain.data.samples import SampleIndex
from onetrain.data.shards import ShardReader, read_items
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.store import LocalStore, RemoteStore, open_store
from onetrain.data.stream_options import StreamOptions

ROOMY = 1.0
GLOBAL_BATCH = 16
BEGIN = Cursor().updated({"": 0})


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "PAUSES_S", (0.0, 0.0, 0.0))


@pytest.fixture
def prepared(tmp_path):
    """30 users in shards of about 50 events."""
    rng = np.random.default_rng(0)
    write_folder(tmp_path / "prepared", random_block(rng, rng.integers(4, 15, 30)))
    return tmp_path / "prepared"


def url_of(folder):
    return f"local://{folder}"


def spec_of(folder, tmp_path, **stream):
    options = StreamOptions(cache=str(tmp_path / "cache"), **stream)
    batch = BatchOptions(max_context=6, request_by="timestamp")
    return StreamSpec(str(folder), options, batch, FeatureNames(events=("item", "gap")), 3, GLOBAL_BATCH, 1, 1)


def contents(step):
    """Everything that a step holds, as bytes."""
    columns = [
        tensor.numpy().tobytes()
        for batch in step.micro_batches
        for tensor in (batch.target_item_BT, batch.weight_BT, batch.sequences["history"].features["item"])
    ]
    return columns


def steps(builder, count=8, start=0):
    return [builder.build(BEGIN.at(GLOBAL_BATCH * number), 0) for number in range(start, start + count)]


def damage(path, how):
    if how == "vanished":
        path.unlink()
    elif how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def copies(tmp_path):
    return sorted((tmp_path / "cache" / "copies" / "shards").glob("*.arrow"))


def test_training_from_a_remote_folder_is_training_from_its_copy(prepared, tmp_path):
    system = fsspec.filesystem("memory")
    system.put(str(prepared), "/shop", recursive=True)
    try:
        expected = [contents(step) for step in steps(StepBuilder(spec_of(prepared, tmp_path)))]
        found = steps(StepBuilder(spec_of("memory://shop", tmp_path)))
        assert [contents(step) for step in found] == expected
        assert read_items("memory://shop", StreamOptions(cache=str(tmp_path / "cache"))).num_rows == 12
    finally:
        system.rm("/shop", recursive=True)


def test_a_shard_is_copied_when_it_is_first_touched(prepared, tmp_path):
    store = RemoteStore(url_of(prepared), tmp_path / "cache", ROOMY)
    reader = ShardReader(pickle.loads(pickle.dumps(store)), Manifest.load(store.name))
    assert copies(tmp_path) == []
    last = reader.n_users - 1
    assert reader.user(last).item.tolist() == ShardReader(prepared, reader.manifest).user(last).item.tolist()
    stored = reader.manifest.shards[int(reader.shards(np.array([last]))[0])]
    (copy,) = copies(tmp_path)
    assert copy.name == f"{stored.xxh3_128}-{stored.file}"
    assert copy.read_bytes() == (prepared / stored.file).read_bytes()


def test_the_least_recently_used_shards_make_room(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(file_cache, "_REMEMBER_S", 0.0)
    manifest, local = Manifest.load(prepared), ShardReader(prepared, Manifest.load(prepared))
    largest = max(shard.bytes for shard in manifest.shards)
    assert len(manifest.shards) > 4
    reader = ShardReader(RemoteStore(url_of(prepared), tmp_path / "cache", 2.5 * largest / 2**30), manifest)
    rng, shard_of = np.random.default_rng(1), local.shards(np.arange(local.n_users))
    for row in rng.integers(0, local.n_users, 60).tolist():
        rows = np.array([int(np.flatnonzero(shard_of == 0)[0]), row])  # the first shard is in use all the time
        for number in rows.tolist():
            assert reader.user(number).item.tolist() == local.user(number).item.tolist()
        assert sum(path.stat().st_size for path in copies(tmp_path)) <= 2.5 * largest
        names = [path.name.split("-", 1)[1] for path in copies(tmp_path)]
        assert manifest.shards[0].file in names
        assert len(reader._open) <= len(names) + 1
    assert reader.damaged == set()
    kept = {path.name.split("-", 1)[1] for path in (tmp_path / "cache" / "copies" / "files").iterdir()}
    assert kept == {"users.bin", "batches.bin"}


PROCESS = """
import os, sys
import numpy as np
from onetrain.data.manifest import Manifest
from onetrain.data.remote import RemoteFolder
from onetrain.data.shards import ShardReader
from onetrain.data.store import RemoteStore
from pathlib import Path
url, cache, log, gib = sys.argv[1:]
download = RemoteFolder.download
def counted(self, name, target):
    with open(log, "a") as file:
        file.write(name + "\\n")
    return download(self, name, target)
RemoteFolder.download = counted
print("ready", flush=True)
sys.stdin.readline()
reader = ShardReader(RemoteStore(url, Path(cache), float(gib)), Manifest.load(url))
rows = np.random.default_rng(os.getpid()).permutation(np.repeat(np.arange(reader.n_users), 3))
print(sum(int(reader.user(int(row)).item.sum()) for row in rows))
"""


def test_processes_that_ask_at_once_share_one_copy(prepared, tmp_path):
    manifest, log = Manifest.load(prepared), tmp_path / "downloads"
    expected = 3 * sum(int(ShardReader(prepared, manifest).user(row).item.sum()) for row in range(manifest.users))
    largest = max(shard.bytes for shard in manifest.shards) / 2**30
    for gib in (ROOMY, 1.5 * largest):
        arguments = [
            sys.executable,
            "-c",
            PROCESS,
            url_of(prepared),
            str(tmp_path / f"cache-{gib}"),
            str(log),
            str(gib),
        ]
        started = [
            subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
        ]
        for process in started:
            assert process.stdout.readline() == "ready\n"
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert [int(process.communicate()[0]) for process in started] == [expected] * 3
        if gib == ROOMY:
            assert sorted(log.read_text().split()) == sorted(
                [s.file for s in manifest.shards] + ["users.bin", "batches.bin"]
            )
    assert not list(tmp_path.rglob("*.part"))


def test_what_a_killed_download_left_is_no_copy(prepared, tmp_path):
    manifest, store = Manifest.load(prepared), RemoteStore(url_of(prepared), tmp_path / "cache", ROOMY)
    stored = manifest.shards[0]
    part = tmp_path / "cache" / "copies" / "shards" / f"{stored.xxh3_128}-{stored.file}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 2 * stored.bytes)
    assert store.path(stored).read_bytes() == (prepared / stored.file).read_bytes()
    assert not part.exists()


def break_off(monkeypatch, times, error):
    """Files that break off in the middle, the first `times` times."""
    opened, left = RemoteFolder._open, [times]

    @contextmanager
    def flaky(folder, name):
        chunks = []

        def read(size=-1):
            chunks.append(file.read(100))
            if len(chunks) > 1 and left[0]:
                left[0] -= 1
                raise error
            return chunks[-1]

        with opened(folder, name) as file:
            yield SimpleNamespace(read=read)

    monkeypatch.setattr(RemoteFolder, "_open", flaky)


def test_a_read_that_fails_for_a_moment_is_tried_again(prepared, tmp_path, monkeypatch):
    stored = Manifest.load(prepared).shards[0]
    break_off(monkeypatch, 3, ConnectionError("reset by peer"))
    path = RemoteStore(url_of(prepared), tmp_path / "cache", ROOMY).path(stored)
    assert path.read_bytes() == (prepared / stored.file).read_bytes()


@pytest.mark.parametrize("error", [ConnectionError("reset by peer"), PermissionError("no key")])
def test_storage_that_does_not_answer_is_no_damage(prepared, tmp_path, monkeypatch, error):
    stored = Manifest.load(prepared).shards[0]
    break_off(monkeypatch, 100, error)
    with pytest.raises(DataError, match=rf"{stored.file} cannot be read .*{error}") as raised:
        RemoteStore(url_of(prepared), tmp_path / "cache", ROOMY).path(stored)
    assert not isinstance(raised.value, DamagedShardError)  # or a broken network would be skipped as damage
    assert list((tmp_path / "cache").rglob("*.arrow*")) == []


def test_a_full_disk_is_an_error_that_says_so(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(file_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(DataError, match=r"stream\.cache: the disk of .* has 0 MB free"):
        RemoteStore(url_of(prepared), tmp_path / "cache", ROOMY).path(Manifest.load(prepared).shards[0])


def test_a_damaged_copy_is_made_again(prepared, tmp_path):
    spec = spec_of(url_of(prepared), tmp_path)
    expected = [contents(step) for step in steps(StepBuilder(spec))]
    builder = StepBuilder(spec)
    first = steps(builder, 3)
    for copy in copies(tmp_path):  # in the middle of a run
        damage(copy, "flipped")
    assert [contents(step) for step in [*first, *steps(builder, 5, 3)]] == expected
    for copy, how in zip(copies(tmp_path), ["flipped", "truncated", "vanished"] * 9, strict=False):
        damage(copy, how)
    assert [contents(step) for step in steps(StepBuilder(spec))] == expected


@pytest.mark.parametrize("how", ["truncated", "flipped", "vanished"])
@pytest.mark.parametrize("where", [str, url_of])
def test_damage_is_found_on_first_reading(prepared, tmp_path, how, where):
    damage(prepared / "shard-00002.arrow", how)
    with pytest.raises(DamagedShardError, match=rf"{where(prepared)}/shard-00002\.arrow") as raised:
        StepBuilder(spec_of(where(prepared), tmp_path))  # numbering requests by their times reads all
    assert raised.value.shard == "shard-00002.arrow"
    assert raised.value.exit_code == 3
    plain = replace(spec_of(where(prepared), tmp_path), batch=BatchOptions(max_context=6))
    builder = StepBuilder(plain)
    assert len(builder.sources.sources[0].indices[0]) > 0
    with pytest.raises(DamagedShardError, match=r"shard-00002\.arrow"):
        steps(builder, 20)


def samples_by_shard(index):
    rows = index.rows(np.arange(len(index)))
    return np.bincount(index.reader.shards(rows.row_B), minlength=len(index.reader.manifest.shards))


@pytest.mark.parametrize("how", ["truncated", "flipped", "vanished"])
@pytest.mark.parametrize(("where", "begun"), [(str, False), (str, True), (url_of, False)])
def test_samples_of_a_damaged_shard_are_skipped_and_counted(prepared, tmp_path, caplog, how, where, begun):
    batch = BatchOptions(max_context=6)
    builder = StepBuilder(replace(spec_of(where(prepared), tmp_path, damaged="skip"), batch=batch))
    index = builder.sources.sources[0].indices[0]
    epoch = -(-len(index) // GLOBAL_BATCH)
    before = steps(builder, epoch) if begun else []  # every shard is open
    assert not any(step.stats.skipped for step in before)
    damage(prepared / "shard-00001.arrow", how)
    found = steps(builder, 2 * epoch)
    ids = np.concatenate([builder.order(BEGIN).sample_ids(GLOBAL_BATCH * n, GLOBAL_BATCH)[1] for n in range(2 * epoch)])
    shard = index.reader.shards(index.rows(ids).row_B)
    assert sum(step.stats.skipped for step in found) == int((shard == 1).sum())
    assert sum(step.stats.samples for step in found) == int((shard != 1).sum())
    assert sum(batch.rows for step in found for batch in step.micro_batches if batch.weight_BT.any()) == sum(
        step.stats.samples for step in found
    )
    warned = [record.getMessage() for record in caplog.records if "shard-00001.arrow" in record.getMessage()]
    assert len(warned) == 1


def test_a_global_batch_without_any_readable_sample_counts_for_nothing(prepared, tmp_path):
    spec = replace(spec_of(prepared, tmp_path, damaged="skip"), batch=BatchOptions(max_context=6), global_batch_size=2)
    builder = StepBuilder(spec)
    index = builder.sources.sources[0].indices[0]
    damage(prepared / "shard-00000.arrow", "flipped")
    rows = index.rows(np.flatnonzero(index.reader.shards(index.rows(np.arange(len(index))).row_B) == 0)[:2])
    batch, kept = builder._build(rows, np.arange(2))
    assert (kept, batch.rows, float(batch.weight_BT.sum())) == (0, 1, 0.0)
    for shard in prepared.glob("shard-*.arrow"):
        shard.write_bytes(b"")
    everything = index.rows(np.arange(len(index)))
    with pytest.raises(DataError, match="Every shard with samples"):
        builder._build(everything, np.arange(len(index)))


@pytest.mark.parametrize("by_time", [False, True])
def test_an_index_without_a_damaged_shard_lasts_as_long_as_the_damage(prepared, tmp_path, monkeypatch, by_time):
    built, options = [], BatchOptions(max_context=6, request_by="timestamp")
    from onetrain.data import samples

    build = samples.build_table
    monkeypatch.setattr(samples, "build_table", lambda *a, **k: built.append(1) or build(*a, **k))

    def opened(skip=True):
        reader = ShardReader(prepared, Manifest.load(prepared))
        return SampleIndex(reader, "train", options, by_time=by_time, skip_damaged=skip, cache=tmp_path)

    shard, other = prepared / "shard-00001.arrow", prepared / "shard-00003.arrow"
    good = {path: path.read_bytes() for path in (shard, other)}
    damage(shard, "flipped")
    without = opened()
    assert without.skipped_shards == ("shard-00001.arrow",)
    assert samples_by_shard(without)[1] == 0
    assert (opened().skipped_shards, len(built)) == (("shard-00001.arrow",), 1)
    with pytest.raises(DamagedShardError, match=r"shard-00001\.arrow"):
        opened(skip=False)
    damage(other, "vanished")
    assert opened().skipped_shards == ("shard-00001.arrow",)  # its numbers stay; later damage is skipped when it is met
    shard.write_bytes(good[shard])
    assert opened().skipped_shards == ("shard-00003.arrow",)
    other.write_bytes(good[other])
    whole = opened()
    assert whole.skipped_shards == ()
    counts = samples_by_shard(whole)
    assert counts[1] > 0
    assert np.delete(samples_by_shard(without), 1).tolist() == np.delete(counts, 1).tolist()
    assert whole.fingerprint == whole.reader.manifest.fingerprint != without.fingerprint
    damage(shard, "truncated")
    made = len(built)
    again = opened()  # a run that goes on keeps the numbers it has
    assert (again.skipped_shards, len(again), len(built)) == ((), len(whole), made)


def test_a_damaged_item_table_is_found_and_a_damaged_copy_made_again(prepared, tmp_path):
    options, url = StreamOptions(cache=str(tmp_path / "cache")), url_of(prepared)
    expected = read_items(url, options).to_pylist()
    (copy,) = (tmp_path / "cache" / "copies" / "files").glob("*items.arrow")
    damage(copy, "flipped")
    assert read_items(url, options).to_pylist() == expected
    damage(prepared / "items.arrow", "flipped")
    assert read_items(url, options).to_pylist() == expected  # the copy is good
    for folder in (str(prepared), url):
        with pytest.raises(DataError, match=rf"{folder}/items\.arrow is damaged"):
            read_items(folder, StreamOptions(cache=str(tmp_path / "other")))


def test_stores_are_found_by_the_folders_name(tmp_path):
    assert isinstance(open_store(tmp_path), LocalStore)
    assert isinstance(open_store(f"file://{tmp_path}"), LocalStore)
    found = open_store("s3://bucket/shop/", StreamOptions(cache=str(tmp_path), cache_gib=3))
    assert isinstance(found, RemoteStore)
    assert (found.name, found.cache.gib, found.of_version(2).name) == (
        "s3://bucket/shop",
        3,
        "s3://bucket/shop/versions/00002",
    )
    with pytest.raises(DataError, match="nosuch://x cannot be opened"):
        Manifest.load("nosuch://x")
    assert Path(open_store("s3://bucket/shop").cache.folder).name == "copies"
