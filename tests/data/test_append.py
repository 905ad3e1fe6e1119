"""Appended versions hold every new event once, behind the newest known events of its user, in one chain."""

import fcntl
import itertools
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from raw_events import options, random_events, shuffled_rows, write_rows

from onetrain.data.append import LOCK, append
from onetrain.data.errors import DataError
from onetrain.data.manifest import verify_shards
from onetrain.data.options import DataOptions
from onetrain.data.prepare import prepare
from onetrain.data.shards import ShardReader
from onetrain.data.store import LocalStore
from onetrain.data.versions import newest_version, open_version

DAY = 100_000  # in the time of these events, which fall into 20 seconds
EXTRA = {"extra": ("price",)}


def day(seed, number, users=60, mean=8):
    """{user: events} of one day, of users that other days have too."""
    drawn = random_events(seed * 100 + number, users=users, mean=mean)
    names = np.random.default_rng(seed).choice(10_000, 2 * users, replace=False)
    chosen = np.random.default_rng([seed, number]).choice(names, users, replace=False)
    return {
        int(user): [replace(event, timestamp=event.timestamp + number * DAY) for event in events]
        for user, events in zip(chosen, drawn.values(), strict=True)
    }


def log_of(tmp_path, events, name):
    return write_rows(tmp_path / name, shuffled_rows(events, 0), files=2)


def readers_of(folder):
    store = LocalStore(folder)
    return [ShardReader(store.of_version(v), open_version(store, v)) for v in range(newest_version(str(folder)) + 1)]


def event_at(reader, user, place):
    m = reader.manifest
    columns = (user.item, user.timestamp_ms, user.behaviour, user.scenario, user.watch_ms, user.duration_ms)
    item, time, behaviour, scenario, watch, duration = (column[place].item() for column in columns)
    return (
        time,
        m.behaviours[behaviour],
        m.scenarios[scenario],
        item,
        watch,
        duration,
        user.extra["price"][place].item(),
    )


def rows_of(reader):
    for number in range(reader.n_users):
        user = reader.user(number)
        yield user, [event_at(reader, user, place) for place in range(len(user))]


def identity(event):
    return event[0], event[1], event[3]


def expected_events(days):
    """{user: {identity: number of the day that has it first}}, an item's index being its place among all ids."""
    found = {}
    for number, events in enumerate(days):
        for user, sequence in events.items():
            for event in sequence:
                key = event.timestamp, event.behaviour, event.item
                found.setdefault(str(user), {}).setdefault(key, number)
    return found


@pytest.mark.parametrize("history", [3, 2000])
def test_every_new_event_trains_in_one_version_behind_what_was_known(tmp_path, history):
    days = [day(1, number) for number in range(4)]
    known = {user: events[:2] for user, events in list(days[0].items())[:20]}
    late = {user: [replace(e, timestamp=e.timestamp + 7) for e in events] for user, events in known.items()}
    for user, events in itertools.chain(known.items(), late.items()):
        days[2].setdefault(user, []).extend(events)
    days[0][0] = [replace(days[0][user][0], item=item) for user in list(days[0])[:1] for item in range(12)]
    opts = options(tmp_path, log_of(tmp_path, days[0], "0"), source=EXTRA, shard_events=150, append_history=history)
    parents = [prepare(opts).fingerprint]
    for number in (1, 2, 3):
        made = append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, days[number], str(number)))))
        assert made.version == number
        assert made.manifest.parent == parents[-1]
        assert made.manifest.append_history == history
        parents.append(made.manifest.fingerprint)
        assert made.report.new_users == len(set(days[number]) - set().union(*days[:number])) > 0
        if number == 2:
            assert made.report.late_events > 20
            assert made.report.known_events > 20
    assert len(set(parents)) == 4

    readers, wanted = readers_of(opts.prepared), expected_events(days)
    trained = {}
    for version, reader in enumerate(readers):
        verify_shards(reader.manifest, reader.store.folder)
        assert reader.manifest.n_train_events == sum(user.valid_start - user.train_start for user, _ in rows_of(reader))
        for user, events in rows_of(reader):
            times = [event[0] for event in events]
            assert times == sorted(times)
            own = events[user.train_start :]
            for event in own:
                key = user.user, identity(event)
                assert key not in trained
                trained[key] = version
            if not version:
                continue
            assert len(own) > 0
            assert user.valid_start == user.test_start == len(user)
            known = [
                key
                for key, seen in wanted[user.user].items()
                if seen < version or (seen == version and key[0] < own[0][0])
            ]
            before = sorted(key for key in known if key[0] <= own[0][0] and key not in map(identity, own))
            context = sorted(map(identity, events[: user.train_start]))
            assert len(context) == min(history, len(before))
            assert [key[0] for key in context] == [key[0] for key in before[len(before) - len(context) :]]
            assert set(context) <= set(before)
    assert trained == {(user, key): number for user, keys in wanted.items() for key, number in keys.items()}


def test_the_same_log_again_adds_nothing(tmp_path):
    days = [day(2, 0), day(2, 1)]
    opts = options(tmp_path, log_of(tmp_path, days[0], "0"), source=EXTRA)
    prepare(opts)
    new = replace(opts, source=replace(opts.source, events=log_of(tmp_path, days[1], "1")))
    first = append(new)
    again = append(new)
    assert (again.version, again.manifest) == (None, None)
    assert again.report.known_events == first.manifest.n_train_events
    assert newest_version(opts.prepared) == 1
    assert append(opts).version is None


def test_row_order_and_memory_do_not_show(tmp_path, monkeypatch):
    days = [day(3, 0), day(3, 1)]
    rows, found = shuffled_rows(days[1], 5), []
    for number, files in enumerate((1, 3)):
        opts = options(tmp_path, log_of(tmp_path, days[0], "0"), source=EXTRA, name=f"p{number}")
        prepare(opts)
        log = write_rows(tmp_path / f"new{number}", rows if files == 1 else rows[::-1], files)
        if number:
            monkeypatch.setattr("onetrain.data.append.BATCH_EVENTS", 40)
        found.append(append(replace(opts, source=replace(opts.source, events=log))).manifest)
    assert found[0].fingerprint == found[1].fingerprint
    assert found[0].shards == found[1].shards


def test_items_that_the_folder_lacks_are_counted(tmp_path):
    old, new = random_events(4, items=6), random_events(5, items=12)
    opts = options(tmp_path, log_of(tmp_path, old, "0"), source=EXTRA)
    prepare(opts)
    before = (tmp_path / "prepared" / "items.arrow").read_bytes()
    made = append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, new, "1"))))
    assert made.report.unknown_items == sum(event.item >= 6 for events in new.values() for event in events)
    assert (tmp_path / "prepared" / "items.arrow").read_bytes() == before
    foreign = {user: [replace(e, item=e.item + 50) for e in events] for user, events in new.items()}
    with pytest.raises(DataError, match="no item of the log is among the 6 items"):
        append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, foreign, "2"))))


@pytest.mark.parametrize("column", ["behaviour", "scenario"])
def test_names_that_the_folder_lacks_are_errors(tmp_path, column):
    old = random_events(6)
    opts = options(tmp_path, log_of(tmp_path, old, "0"), source=EXTRA)
    prepare(opts)
    new = {user: [replace(e, **{column: "clack"}) for e in events] for user, events in old.items()}
    with pytest.raises(DataError, match=f"{column} 'clack'"):
        append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, new, "1"))))
    with pytest.raises(DataError, match=r"data\.source\.extra is empty"):
        append(replace(opts, source=replace(opts.source, extra=())))
    assert newest_version(opts.prepared) == 0


def test_short_users_are_counted_with_what_is_known(tmp_path):
    old = {1: next(iter(random_events(7, users=1, mean=50).values()))[:4]}
    fresh = [replace(event, timestamp=event.timestamp + DAY) for event in old[1][:2]]
    opts = options(tmp_path, log_of(tmp_path, old, "0"), source=EXTRA, min_user_events=3)
    prepare(opts)
    made = append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, {1: fresh, 2: fresh}, "1"))))
    assert (made.report.users_dropped, made.report.events_dropped) == (1, 2)
    (reader,) = readers_of(opts.prepared)[1:]
    assert [user.user for user, _ in rows_of(reader)] == ["1"]


def test_attributes_are_the_files_or_what_was_known(tmp_path):
    def write_users(name, rows):
        (tmp_path / name).write_text("id,city\n" + "".join(f"{user},{city}\n" for user, city in rows))
        return str(tmp_path / name)

    def with_day(number, chosen, **source):
        events = {user: [replace(e, timestamp=e.timestamp + number * DAY) for e in sequence] for user, sequence in log}
        log_folder = log_of(tmp_path, {user: events[user] for user in chosen}, str(number))
        return options(tmp_path, log_folder, source=EXTRA | source)

    log = list(zip(range(1, 5), random_events(8, users=4).values(), strict=True))
    attributes = {"user_features": {"city": "city"}}
    first = write_users("a.csv", [(1, "Bonn"), (2, "Ulm"), (3, "")])
    prepare(with_day(0, [1, 2, 3], users=first, **attributes))
    append(with_day(1, [1, 2, 4]))
    append(with_day(2, [1, 2, 3, 4], users=write_users("b.csv", [(1, "Ulm"), (4, "Bonn"), (9, "Köln")]), **attributes))
    found = [{user.user: user.features["city"] for user, _ in rows_of(r)} for r in readers_of(tmp_path / "prepared")]
    assert found == [{"1": 1, "2": 2, "3": 0}, {"1": 1, "2": 2, "4": 0}, {"1": 2, "2": 2, "3": 0, "4": 1}]
    with pytest.raises(DataError, match=r"attribute city has the value 'Köln'"):
        append(with_day(3, [1], users=write_users("c.csv", [(1, "Köln")]), **attributes))


KILLED = """
import os, sys, signal
from onetrain.data.append import append
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions, SourceOptions
Manifest.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
append(DataOptions(prepared=sys.argv[1], source=SourceOptions(events=sys.argv[2], extra=("price",))))
"""


def test_a_killed_append_leaves_no_version(tmp_path):
    days = [day(9, 0), day(9, 1)]
    opts = options(tmp_path, log_of(tmp_path, days[0], "0"), source=EXTRA)
    prepare(opts)
    new = replace(opts, source=replace(opts.source, events=log_of(tmp_path, days[1], "1")))
    assert subprocess.run([sys.executable, "-c", KILLED, opts.prepared, new.source.events]).returncode == -9
    versions = tmp_path / "prepared" / "versions"
    assert len(list(versions.iterdir())) == 1  # the unfinished one
    assert newest_version(opts.prepared) == 0
    with (tmp_path / "prepared" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="Another `onetrain append` is at work"):
            append(new)
    assert append(new).version == 1
    assert [path.name for path in versions.iterdir()] == ["00001"]


def test_versions_of_another_folder_are_refused(tmp_path):
    days = [day(10, 0), day(10, 1), day(10, 2)]
    opts = options(tmp_path, log_of(tmp_path, days[0], "0"), source=EXTRA)
    first = prepare(opts)
    append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, days[1], "1"))))
    path = tmp_path / "prepared" / "manifest.json"
    changed = json.loads(path.read_text()) | {"fingerprint": "another"}
    path.write_text(json.dumps(changed))
    with pytest.raises(DataError, match=rf"fingerprint {first.fingerprint}, but the version before it is another"):
        append(replace(opts, source=replace(opts.source, events=log_of(tmp_path, days[2], "2"))))


def test_a_remote_folder_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match="name a local folder, and copy it there"):
        append(DataOptions(prepared="s3://bucket/shop"))
