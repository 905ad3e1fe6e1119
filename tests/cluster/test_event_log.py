"""The log of a run: whole records, on a disk that is nearly full too."""

import errno
import os
from pathlib import Path

import pytest

from onetrain.cluster.event_log import EventLog, read_log


def test_a_disk_that_takes_a_part_gets_the_rest_or_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, write, room = EventLog(tmp_path / "events.jsonl"), os.write, [1000]

    def nearly_full(descriptor: int, content: bytes) -> int:
        taken = min(len(content), 10, room[0])
        room[0] -= taken
        return write(descriptor, content[:taken])

    monkeypatch.setattr(os, "write", nearly_full)
    log.add(event="first", text="x" * 100)
    room[0] = 15
    with pytest.raises(OSError, match="No space left") as caught:
        log.add(event="second")
    assert caught.value.errno == errno.ENOSPC
    room[0] = 1000
    log.add(event="third")
    assert [record["event"] for record in read_log(log.path)] == ["first", "third"]


def test_only_what_must_survive_the_machine_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = EventLog(tmp_path / "ledger.jsonl")
    log.add(durable=False, kind="time")
    assert not synced
    record = log.add(kind="end")
    assert len(synced) == 1
    assert read_log(log.path)[1] == record
    assert "durable" not in record
