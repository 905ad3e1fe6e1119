import dataclasses
import errno
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_events import (
    count_ties,
    options,
    prepare_and_open,
    random_events,
    reference,
    shuffled_rows,
    write_rows,
)

from onetrain.data import prepare as prepare_module
from onetrain.data import workspace
from onetrain.data.errors import DataError
from onetrain.data.options import BatchOptions, DataOptions, SimulatorOptions, SourceOptions, SplitOptions
from onetrain.data.prepare import prepare
from onetrain.data.samples import SampleIndex
from onetrain.data.shard_writer import ShardWriter
from onetrain.data.shards import ShardReader, read_items

EXTRA = {"extra": ("price",)}


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.arrow")}


def sequences_of(reader, manifest, items):
    found = {}
    for row in range(reader.n_users):
        user = reader.user(row)
        found[user.user] = [
            (
                int(user.timestamp_ms[i]),
                int(items[user.item[i]]),
                manifest.behaviours[user.behaviour[i]],
                manifest.scenarios[user.scenario[i]],
                int(user.watch_ms[i]),
                int(user.duration_ms[i]),
                float(user.extra["price"][i]),
            )
            for i in range(len(user))
        ]
    return found


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_plain_reference(tmp_path, seed, duplicates):
    events = random_events(seed)
    log = write_rows(tmp_path / "log", shuffled_rows(events, seed), files=3)
    manifest, reader = prepare_and_open(options(tmp_path, log, source=EXTRA, duplicates=duplicates, shard_events=100))
    everything, expected = reference(events, drop=False), reference(events, drop=duplicates == "drop")
    items = read_items(tmp_path / "prepared")["item"].to_pylist()
    assert items == sorted({str(e.item) for s in events.values() for e in s}, key=int)
    wanted = {
        user: [(e.timestamp, e.item, e.behaviour, e.scenario, e.watch_ms, e.duration_ms, e.price) for e in sequence]
        for user, sequence in expected.items()
    }
    found = sequences_of(reader, manifest, items)
    assert list(found) == list(wanted)  # users by number
    assert found == wanted
    n_all, n_unique = (sum(map(len, s.values())) for s in (everything, reference(events)))
    assert manifest.report["rows_read"] == n_all
    assert manifest.report["duplicates"] == n_all - n_unique > 0
    assert manifest.report["duplicates_dropped"] == (n_all - n_unique if duplicates == "drop" else 0)
    assert manifest.report["ties"] == count_ties(expected) > 0
    assert manifest.report["zero_duration"] == sum(e.duration_ms == 0 for s in everything.values() for e in s)
    assert manifest.events == sum(shard.events for shard in manifest.shards) == sum(map(len, expected.values()))
    assert len(manifest.shards) > 1
    assert manifest.behaviours == ("buy", "click", "view")
    times = [e.timestamp for s in expected.values() for e in s]
    assert manifest.time_range_ms == (min(times), max(times))


def test_row_order_files_and_threads_do_not_matter(tmp_path, monkeypatch):
    events = random_events(7, users=60)
    items = tmp_path / "items.parquet"
    ids = [str(i) for i in range(20)]
    texts = pa.array([f"item {i}" if i % 3 else None for i in range(20)])
    vectors = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32).tolist()
    vectors[4] = None
    results = []
    for number, (files, suffix) in enumerate([(1, ".parquet"), (4, ".parquet"), (2, ".csv")]):
        shuffle = np.random.default_rng(number).permutation(20)
        pq.write_table(
            pa.table({"id": ids, "text": texts, "embedding": pa.array(vectors, pa.list_(pa.float32()))}).take(shuffle),
            items,
        )
        monkeypatch.setattr(prepare_module, "MB_PER_THREAD", 256 if number else 1024)
        log = write_rows(tmp_path / f"log{number}", shuffled_rows(events, number), files, suffix)
        source = {"items": str(items), **EXTRA}
        opts = options(tmp_path, log, name=f"out{number}", source=source, shard_events=200, memory_limit_mb=512)
        results.append((prepare(opts), file_bytes(opts.prepared)))
    (first, first_bytes), *others = results
    assert len(first_bytes) > 2
    for manifest, found in others:
        assert manifest.fingerprint == first.fingerprint
        assert manifest.catalogue_fingerprint == first.catalogue_fingerprint
        assert found == first_bytes
        assert manifest.shards == first.shards


def test_shard_size_does_not_change_fingerprint_but_contents_do(tmp_path):
    events = random_events(1)
    log = write_rows(tmp_path / "log", shuffled_rows(events, 0))
    small = prepare(options(tmp_path, log, shard_events=50))
    large = prepare(options(tmp_path, log))
    assert len(small.shards) > len(large.shards) == 1
    assert small.fingerprint == large.fingerprint
    user = next(iter(events))
    events[user][0] = dataclasses.replace(events[user][0], watch_ms=99)
    changed = prepare(options(tmp_path, write_rows(tmp_path / "other", shuffled_rows(events, 0))))
    assert changed.fingerprint != large.fingerprint
    assert changed.catalogue_fingerprint == large.catalogue_fingerprint


def test_leave_one_out_and_train_counts(tmp_path):
    events = random_events(3, mean=4)
    manifest, reader = prepare_and_open(options(tmp_path, write_rows(tmp_path / "log", shuffled_rows(events, 0))))
    expected = reference(events)
    assert min(map(len, expected.values())) < 3
    lengths, valid_start, test_start = reader.split_bounds()
    counts = np.zeros(len(read_items(tmp_path / "prepared")), int)
    for row, sequence in enumerate(expected.values()):
        n = len(sequence)
        assert lengths[row] == n
        assert (valid_start[row], test_start[row]) == ((n - 2, n - 1) if n >= 3 else (n, n))
        np.add.at(counts, reader.user(row).item[: valid_start[row]], 1)
    assert read_items(tmp_path / "prepared")["train_count"].to_pylist() == counts.tolist()
    assert manifest.n_train_events == counts.sum()
    assert manifest.n_train_events + manifest.n_valid_events + manifest.n_test_events == manifest.events


def test_global_time_split(tmp_path):
    events = random_events(4)
    log = write_rows(tmp_path / "log", shuffled_rows(events, 0))
    times = np.sort([e.timestamp for s in reference(events).values() for e in s])
    found = options(tmp_path, log, split=SplitOptions("global_time", train_fraction=0.6, valid_fraction=0.2))
    manifest, reader = prepare_and_open(found)
    valid_from, test_from = times[round(0.6 * len(times))], times[round(0.8 * len(times))]
    assert manifest.split == {"kind": "global_time", "valid_from": valid_from, "test_from": test_from}
    for row in range(reader.n_users):
        user = reader.user(row)
        assert user.valid_start == (user.timestamp_ms < valid_from).sum()
        assert user.test_start == (user.timestamp_ms < test_from).sum()
    given = options(tmp_path, log, split=SplitOptions("global_time", int(valid_from), int(test_from)))
    assert prepare(given).fingerprint == manifest.fingerprint
    everything = prepare(
        options(tmp_path, log, split=SplitOptions("global_time", train_fraction=1.0, valid_fraction=0.0))
    )
    assert everything.n_train_events == everything.events


def test_min_user_events_counts_after_dropping_repeats(tmp_path):
    events = random_events(5, mean=5)
    log = write_rows(tmp_path / "log", shuffled_rows(events, 0))
    manifest, reader = prepare_and_open(options(tmp_path, log, min_user_events=4))
    expected = reference(events)
    assert [reader.user(row).user for row in range(reader.n_users)] == [u for u, s in expected.items() if len(s) >= 4]
    short = [len(s) for s in expected.values() if len(s) < 4]
    assert manifest.report["users_dropped"] == len(short) > 0
    assert manifest.report["events_dropped"] == sum(short)
    with pytest.raises(
        DataError, match=r"No events are left: all \d+ users have fewer than data.min_user_events = 999"
    ):
        prepare(options(tmp_path, log, min_user_events=999))


def test_unsorted_rows_are_counted_in_file_order(tmp_path):
    events = random_events(6)
    rows = shuffled_rows(events, 0)
    last, expected = {}, 0
    for user, timestamp, *_ in rows:
        expected += timestamp < last.get(user, timestamp)
        last[user] = timestamp
    log = write_rows(tmp_path / "log", rows, files=3)
    assert prepare(options(tmp_path, log)).report["unsorted"] == expected > 0
    log = write_rows(tmp_path / "sorted", sorted(rows))
    assert prepare(options(tmp_path, log)).report["unsorted"] == 0


def test_unknown_and_negative_times_are_minus_one(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp,watch_ms,duration_ms\na,x,1,,7\na,y,2,-5,0\na,z,3,12.0,\n")
    manifest, reader = prepare_and_open(options(tmp_path, log))
    assert reader.user(0).watch_ms.tolist() == [-1, -1, 12]
    assert reader.user(0).duration_ms.tolist() == [7, 0, -1]
    assert (manifest.report["negative_times"], manifest.report["zero_duration"]) == (1, 1)


def test_ids_sort_as_text_unless_all_are_integers(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("user,item,timestamp\n10,10,1\n9,9,2\n-3,b,3\n123456789012345678901234567890,10,4\n")
    _, reader = prepare_and_open(options(tmp_path, log))
    assert [reader.user(row).user for row in range(4)] == ["-3", "9", "10", "123456789012345678901234567890"]
    assert read_items(tmp_path / "prepared")["item"].to_pylist() == ["10", "9", "b"]


def test_long_user_spans_many_batches_of_rows(tmp_path):
    n = 150_000
    log = tmp_path / "log.parquet"
    users = np.where(np.arange(n + 10) < n, "heavy", "light")
    order = np.random.default_rng(0).permutation(n + 10)
    times = np.arange(n + 10)
    pq.write_table(
        pa.table({"user": users[order], "item": (times % 7)[order], "timestamp": times[order].astype(np.int64)}), log
    )
    _, reader = prepare_and_open(options(tmp_path, log))
    heavy, light = reader.user(0), reader.user(1)
    assert (heavy.user, light.user) == ("heavy", "light")
    np.testing.assert_array_equal(heavy.timestamp_ms, np.arange(n))
    np.testing.assert_array_equal(light.item, np.arange(n, n + 10) % 7)


BAD = "user,item,timestamp,watch_ms\na,x,1,5\n,y,2,5\nb,,3,5\nc,z,soon,5\nd,z,4,long\ne,z,5,\n"


def test_bad_rows_are_an_error_that_names_them(tmp_path):
    log = tmp_path / "bad.csv"
    log.write_text(BAD)
    with pytest.raises(DataError) as caught:
        prepare(options(tmp_path, log))
    message = str(caught.value)
    for part in ("1 of 6 rows have column 'user'", "'soon'", "timestamp_unit 'ms'", "'long'", str(log), "bad_rows"):
        assert part in message
    assert not (tmp_path / "prepared").exists()


def test_bad_rows_are_dropped_and_counted_on_request(tmp_path):
    log = tmp_path / "bad.csv"
    log.write_text(BAD)
    manifest, reader = prepare_and_open(options(tmp_path, log, bad_rows="drop"))
    assert manifest.report["bad_rows_dropped"] == 4
    assert [reader.user(row).user for row in range(reader.n_users)] == ["a", "e"]
    log.write_text("user,item,timestamp\na,x,never\n")
    with pytest.raises(DataError, match=r"No row of the log can be used.*'never'"):
        prepare(options(tmp_path, log, bad_rows="drop"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_must_be_finite(tmp_path, value):
    vectors = [[1.0, 2.0], [3.0, 4.0], [5.0, value], [value, 1.0]]
    pq.write_table(pa.table({"id": ["d", "a", "c", "b"], "embedding": vectors}), tmp_path / "items.parquet")
    log = write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))
    with pytest.raises(DataError, match="embedding of item 'b' holds a value that is not finite"):
        prepare(options(tmp_path, log, source={"items": str(tmp_path / "items.parquet")}))


def test_embeddings_must_have_one_length(tmp_path):
    pq.write_table(pa.table({"id": ["a", "b"], "embedding": [[1.0, 2.0], [3.0]]}), tmp_path / "items.parquet")
    log = write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))
    with pytest.raises(DataError, match="embedding of item 'b' has 1 numbers, that of the items before 2"):
        prepare(options(tmp_path, log, source={"items": str(tmp_path / "items.parquet")}))


def test_items_are_the_union_of_log_and_item_file(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,timestamp\na,2,1\na,30,2\n")
    (tmp_path / "items.csv").write_text('id,text,categories\n2,"two, too",x|y\n1,,\n2,other,\n')
    manifest = prepare(options(tmp_path, tmp_path / "log.csv", source={"items": str(tmp_path / "items.csv")}))
    assert read_items(tmp_path / "prepared").to_pylist() == [
        {"item": "1", "text": None, "categories": None, "train_count": 0},
        {"item": "2", "text": "other", "categories": None, "train_count": 1},
        {"item": "30", "text": None, "categories": None, "train_count": 1},
    ]
    assert manifest.report["items_not_in_file"] == manifest.report["duplicate_items_dropped"] == 1


@pytest.fixture
def existing(tmp_path):
    """A prepared folder, and options that would replace it by something else."""
    first = options(tmp_path, write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0)))
    manifest = prepare(first)
    other = options(tmp_path, write_rows(tmp_path / "other", shuffled_rows(random_events(1), 0)))
    return manifest, other


def assert_untouched(tmp_path, manifest):
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "other", "prepared"]
    assert type(manifest).load(tmp_path / "prepared") == manifest


@pytest.mark.parametrize("stage", ["read", "items", "sort", "write"])
def test_interruption_leaves_the_old_result_and_nothing_else(tmp_path, existing, stage):
    manifest, other = existing

    def interrupt(at, done, total):
        if at == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(other, interrupt)
    assert_untouched(tmp_path, manifest)
    replaced = prepare(other)
    assert replaced.fingerprint != manifest.fingerprint
    assert_untouched(tmp_path, replaced)


def test_preparing_again_leaves_no_index_of_the_old_samples(tmp_path, existing):
    _, other = existing
    counts, batch = [], BatchOptions(target_behaviours=("buy",))
    for number in range(2):
        manifest = prepare(other) if number else existing[0]
        index = SampleIndex(ShardReader(other.prepared, manifest), "train", batch)
        users = [index.reader.user(row) for row in range(manifest.users)]
        buy = manifest.behaviours.index("buy")
        assert len(index) == sum(int((user.behaviour[1 : user.valid_start] == buy).sum()) for user in users)
        assert len(list((tmp_path / "prepared" / "index").iterdir())) == 1
        counts.append(len(index))
    assert counts[0] != counts[1]


def test_full_disk_is_an_error_that_leaves_the_old_result(tmp_path, existing, monkeypatch):
    manifest, other = existing

    def full(self, block):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "append", full)
        with pytest.raises(DataError, match=r"no space left on the disk of .* MB free"):
            prepare(other)
    assert_untouched(tmp_path, manifest)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(workspace.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"0\.0 MB free, and preparing .* needs at least"):
        prepare(other)
    assert_untouched(tmp_path, manifest)


def test_refuses_to_replace_what_is_no_prepared_folder(tmp_path):
    log = write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not replaced"):
        prepare(options(tmp_path, log))
    assert (tmp_path / "prepared" / "thesis.tex").exists()


def test_refuses_a_log_inside_the_result(tmp_path):
    manifest = prepare(options(tmp_path, write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))))
    inside = write_rows(tmp_path / "prepared" / "raw", shuffled_rows(random_events(1), 0))
    with pytest.raises(DataError, match=r"lies in data\.prepared"):
        prepare(options(tmp_path, inside))
    assert type(manifest).load(tmp_path / "prepared") == manifest


def test_wrong_options_are_errors(tmp_path):
    log = write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))
    for wrong, message in [
        ({"min_user_events": 0}, "data.min_user_events is 0"),
        ({"memory_limit_mb": 1}, "data.memory_limit_mb is 1"),
        ({"split": SplitOptions(train_fraction=0.9, valid_fraction=0.2)}, "sum is at most 1"),
        ({"split": SplitOptions("global_time", valid_from=5, test_from=4)}, "valid_from 5 is after test_from 4"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare(options(tmp_path, log, **wrong))
    with pytest.raises(DataError, match="name a local folder"):
        prepare(DataOptions(prepared="s3://bucket/prepared", source=SourceOptions(events=log)))
    with pytest.raises(DataError, match=r"data\.prepared is empty"):
        prepare(DataOptions(source=SourceOptions(events=log)))


def test_progress_and_silence(tmp_path, capfd):
    log = write_rows(tmp_path / "log", shuffled_rows(random_events(0), 0))
    calls = []
    split = SplitOptions("global_time")
    manifest = prepare(options(tmp_path, log, split=split), lambda *call: calls.append(call))
    assert list(dict.fromkeys(stage for stage, _, _ in calls)) == ["read", "items", "sort", "split", "write"]
    assert calls[-1][:2] == ("write", manifest.events)
    assert capfd.readouterr() == ("", "")


def test_simulated_logs(tmp_path):
    small = SimulatorOptions(users=60, items=150, events_per_user=8, themes=12, embedding_dim=6, seed=3)
    source = SourceOptions(reader="simulator", events=str(tmp_path / "shop"), simulator=small)
    opts = DataOptions(prepared=str(tmp_path / "prepared"), source=source)
    manifest, reader = prepare_and_open(opts)
    items = read_items(tmp_path / "prepared")
    assert (manifest.users, reader.n_users, len(items)) == (60, 60, 150)
    assert items.schema.field("embedding").type == pa.list_(pa.float32(), 6)
    raw = pa.concat_tables(pq.read_table(path) for path in (tmp_path / "shop").glob("events-*.parquet"))
    assert manifest.events == raw.num_rows - manifest.report["duplicates_dropped"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "shop").iterdir()}
    assert prepare(opts).fingerprint == manifest.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shop").iterdir()} == stamps  # written once
    other = dataclasses.replace(source, simulator=dataclasses.replace(small, seed=4))
    with pytest.raises(DataError, match="logs of other simulator options"):
        prepare(dataclasses.replace(opts, source=other))
