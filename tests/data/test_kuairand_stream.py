"""KuaiRand, real and dirty, in the order of time: every request once, and none sees its own moment or a later one."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from onetrain.data.cursor import Cursor
from onetrain.data.features import FeatureNames
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions, DataOptions, SourceOptions, SplitOptions
from onetrain.data.prepare import prepare
from onetrain.data.sids import SidMap
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.stream_options import StreamOptions
from onetrain.data.user_table import user_id

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "kuairand_pure_slice"
LOG = FOLDER / "log_20220425_20220430.parquet"
CONTEXT, GLOBAL_BATCH = 8, 512
WORLD_SIZES = (1, 3, 4)
FEEDBACK = ("hate", "follow", "forward", "comment", "like", "profile_enter", "long_view", "click")


def table():
    if not LOG.is_file():
        pytest.skip(f"{FOLDER} is not there")
    return pq.read_table(LOG)


def prepare_log(folder, rows):
    """A prepared folder of these rows, of which all train, with random SIDs."""
    log = folder / "log_standard.parquet"
    pq.write_table(rows, log)
    source = SourceOptions("kuairand", str(log), str(FOLDER / "videos.parquet"))
    everything = SplitOptions("global_time", train_fraction=1.0, valid_fraction=0.0)
    manifest = prepare(DataOptions(str(folder / "prepared"), source, everything, shard_events=9_000))
    codes_IL = np.random.default_rng(0).integers(0, 8, (manifest.items.rows, 3))
    sids = SidMap(codes_IL, (8, 8, 8), (), manifest.catalogue_fingerprint)
    sids.save(str(folder / "prepared" / "sids"))
    manifest.with_sid_fingerprint(sids.fingerprint).save(folder / "prepared")
    return folder / "prepared"


def read_events(rows):
    """{user: events (time, item index, behaviour, scenario, watch, duration)}, with all repeats, in total order."""
    columns = {name: rows[name].to_pylist() for name in rows.column_names}
    ids = set(columns["video_id"]) | set(pq.read_table(FOLDER / "videos.parquet")["video_id"].to_pylist())
    index = {item: place for place, item in enumerate(sorted(ids))}
    flags = zip(*(columns[name if name == "long_view" else f"is_{name}"] for name in FEEDBACK), strict=True)
    behaviour = [next((name for name, flag in zip(FEEDBACK, row, strict=True) if flag), "view") for row in flags]
    users = defaultdict(list)
    names = ("user_id", "time_ms", "video_id", "tab", "play_time_ms", "duration_ms")
    for kind, *row in zip(behaviour, *(columns[name] for name in names), strict=True):
        user, time, video, tab, watch, duration = row
        users[user].append((time, index[video], kind, str(tab), watch, duration))
    return {user: sorted(events) for user, events in users.items()}


@pytest.fixture(scope="module")
def some_users(tmp_path_factory):
    """A prepared folder of a quarter of the users, and their events."""
    rows = table()
    rows = rows.filter(pc.equal(pc.bit_wise_and(rows["user_id"], 3), 1))
    return prepare_log(tmp_path_factory.mktemp("kuairand"), rows), read_events(rows)


def without_repeats(events):
    return list({event[:3]: event for event in reversed(events)}.values())[::-1]


def test_the_report_counts_the_dirt(tmp_path):
    raw = read_events(table())
    manifest = Manifest.load(prepare_log(tmp_path, table()))
    report, kept = manifest.report, {user: without_repeats(events) for user, events in raw.items()}
    rows, events = sum(map(len, raw.values())), sum(map(len, kept.values()))
    assert report["rows_read"] == rows == 94_976
    assert report["duplicates"] == report["duplicates_dropped"] == rows - events == 2_986
    assert report["ties"] == events - sum(len({event[0] for event in mine}) for mine in kept.values()) == 668
    assert report["zero_duration"] == sum(event[5] == 0 for mine in raw.values() for event in mine) == 1_668
    assert manifest.n_train_events == manifest.events == events
    for name in ("bad_rows_dropped", "negative_times", "unsorted", "users_dropped", "items_not_in_file"):
        assert report[name] == 0


def buckets(milliseconds):
    """floor(log2(1 + whole seconds))"""
    return np.searchsorted(2 ** np.arange(1, 32), 1 + milliseconds // 1000, side="right")


def expected_samples(raw):
    """{what a batch shows of a request: its time}: the context before it, with its features, and its targets."""
    found = defaultdict(list)
    for user, repeated in raw.items():
        events = without_repeats(repeated)
        times, items = (np.array(column) for column in list(zip(*events, strict=True))[:2])
        begins = np.flatnonzero(np.diff(times, prepend=-1))
        for begin, end in zip(begins.tolist(), [*begins[1:].tolist(), len(times)], strict=True):
            if not begin:
                continue  # nothing is known before the first moment
            seen = slice(max(begin - CONTEXT, 0), begin)
            gaps, ages = buckets(np.diff(times, prepend=times[0])[seen]), buckets(times[begin] - times[seen])
            columns = (items[seen], gaps, ages, items[begin:end])
            found[(user_id(str(user)), *(column.tobytes() for column in columns))].append(int(times[begin]))
    return found


def samples_of(batch):
    """The same of the rows of a batch."""
    events = batch.sequences["history"]
    columns = [events.features[name].numpy().astype(np.int64) for name in ("item", "gap", "age")]
    count_B = (batch.weight_BT > 0).sum(1).tolist()
    target_BT = batch.target_item_BT.numpy().astype(np.int64)
    for row, (user, length, count) in enumerate(
        zip(batch.user["user"].tolist(), events.length_B.tolist(), count_B, strict=True)
    ):
        yield user, *(column[row, :length].tobytes() for column in columns), target_BT[row, :count].tobytes()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_pass_in_the_order_of_time(some_users, world_size):
    prepared, raw = some_users
    expected, order = expected_samples(raw), []
    batch = BatchOptions(max_context=CONTEXT, request_by="timestamp")
    features = FeatureNames(events=("item", "gap", "age"), user=("user",))
    spec = StreamSpec(str(prepared), StreamOptions(order="time"), batch, features, 0, GLOBAL_BATCH, 2, world_size)
    builder = StepBuilder(spec)
    cursor = Cursor().updated(builder.sources.newest())
    steps = builder.steps_left(cursor)
    assert steps == -(-sum(map(len, expected.values())) // GLOBAL_BATCH)
    latest = -1
    for _ in range(steps):
        times = []
        for rank in range(world_size):
            for micro_batch in builder.build(cursor, rank).micro_batches:
                for sample in samples_of(micro_batch):
                    if sample[-1]:  # else it counts for nothing
                        times.append(expected[sample].pop(0))
        assert min(times) >= latest
        latest = max(times)
        order.append(len(times))
        cursor = cursor.at(cursor.position + GLOBAL_BATCH)
    assert not any(expected.values())
    assert set(order[:-1]) == {GLOBAL_BATCH}
    assert builder.steps_left(cursor) <= 0
