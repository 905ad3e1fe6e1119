"""Every millisecond of an attempt stands in the ledger once, under the label of its phase."""

import json
import os
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from onetrain.cluster.beacon import BEACON, PHASES
from onetrain.cluster.event_log import LEDGER, read_log
from onetrain.launcher import ledger as module
from onetrain.launcher.ledger import LABELS, Ledger


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""
    now = SimpleNamespace(seconds=5e8)
    clock = SimpleNamespace(time=lambda: 1.7e9 + now.seconds, monotonic=lambda: now.seconds)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(BEACON, "attempt", None)
    return now


def times(run):
    return [record for record in read_log(run / LEDGER) if record["kind"] == "time"]


def test_labels_are_contiguous_and_add_up_to_the_time_since_the_beginning(tmp_path, clock):
    rng = random.Random(7)
    begun = clock.seconds
    ledger, spent = Ledger(), Counter()
    ledger.open(tmp_path, is_main=True)
    ledger.start(4, 0)
    label = "start_up"
    for step in range(400):
        seconds = rng.choice([rng.random() * 1e-3, rng.random(), 20 * rng.random() ** 8])
        clock.seconds += seconds
        spent[label] += seconds
        phase = rng.choice(PHASES)
        ledger.enter(phase, step, 32 * step)
        label = LABELS[phase]
        assert (BEACON.beat(0, 0).phase, BEACON.beat(0, 0).step) == (phase, step)
        ledger.note(step, 32 * step, now=step % 7 == 0)
    ledger.end("finished", 400, 32 * 400)
    total = Counter()
    for record in times(tmp_path):
        assert set(record) == {"time", "attempt", "kind", "step", "position", "seconds"}
        total.update(record["seconds"])
        assert abs((record["time"] - 1.7e9 - begun) - sum(total.values())) < 1.01e-3
    assert round(sum(total.values()), 3) == int((clock.seconds - begun) * 1000) / 1000  # every millisecond once
    for name, seconds in spent.items():
        assert abs(total[name] - seconds) < 0.4  # 400 phases, each cut at whole milliseconds
    assert abs(ledger.stood_still() - total["checkpoint"] - total["validation"]) < 1e-6
    first, last = read_log(tmp_path / LEDGER)[0], read_log(tmp_path / LEDGER)[-1]
    assert (first["kind"], first["world_size"], first["step"], first["furthest"]) == ("start", 4, 0, 0)
    assert (last["kind"], last["outcome"], last["step"]) == ("end", "finished", 400)


def test_a_record_is_due_when_asked_for_or_ten_seconds_old(tmp_path, clock):
    ledger = Ledger()
    ledger.open(tmp_path, is_main=True)
    for step in range(1, 31):
        clock.seconds += 1
        ledger.note(step, step, now=step == 15)
    assert [record["step"] for record in times(tmp_path)] == [10, 15, 25]


def test_steps_that_an_earlier_attempt_has_recorded_are_recomputed(tmp_path, clock):
    for attempt, (begin, end, furthest) in enumerate([(0, 7, 0), (4, 10, 7), (4, 6, 10)], 1):
        ledger = Ledger()
        ledger.open(tmp_path, is_main=True)
        assert (ledger.attempt, ledger.furthest) == (attempt, furthest)
        ledger.start(1, begin)
        for step in range(begin, end):  # `step` steps are done
            ledger.enter("first_step" if step == begin else "step", step, step)
            clock.seconds += 1
            ledger.enter("data_wait", step + 1, step + 1)
            clock.seconds += 0.5
        ledger.note(end, end, now=True)
        compute = max(end - max(begin, furthest), 0)
        seconds = {"compute": compute, "recompute": end - begin - compute, "data_wait": (end - begin) / 2}
        assert times(tmp_path)[-1]["seconds"] == {name: value for name, value in seconds.items() if value}
        clock.seconds += 9  # the process dies, and another one starts
    # 10 steps were made for good in 9 * 3 + 1.5 * 15 seconds
    assert ledger.goodput() == pytest.approx(10 / (27 + 1.5 * 15))


def test_the_number_that_a_supervisor_gave_goes_first(tmp_path, clock, monkeypatch):
    (tmp_path / LEDGER).write_text('{"attempt": 2, "kind": "time", "step": 9, "seconds": {}}\n{"attempt": 3, "ki')
    monkeypatch.setattr(BEACON, "attempt", 5)
    ledger = Ledger()
    ledger.open(tmp_path, is_main=True)
    assert (ledger.attempt, ledger.furthest) == (5, 9)


def test_what_cannot_be_written_is_told_once_and_not_lost(tmp_path, clock, capsys):
    ledger = Ledger()
    ledger.open(tmp_path / "run", is_main=True)
    (tmp_path / "run").write_text("no folder")
    for step in range(3):
        clock.seconds += 2
        ledger.note(step, step, now=True)
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "run").unlink()
    ledger.note(3, 3, now=True)
    assert [json.loads(line)["seconds"] for line in (tmp_path / "run" / LEDGER).open()] == [{"start_up": 6.0}]


def test_only_records_of_time_do_not_wait_for_the_disk(tmp_path, clock, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(read_log(tmp_path / LEDGER)[-1]["kind"]))
    ledger = Ledger()
    ledger.open(tmp_path, is_main=True)
    ledger.start(1, 0)
    for step in range(3):
        clock.seconds += 1
        ledger.note(step, step, now=True)
    ledger.record("skip", step=3, position=3)
    ledger.end("finished", 3, 3)
    assert synced == ["start", "skip", "end"]
    assert len(times(tmp_path)) == 4


def test_other_ranks_write_nothing(tmp_path, clock):
    ledger = Ledger()
    ledger.open(tmp_path / "run", is_main=False)
    ledger.start(2, 0)
    ledger.end("finished", 1, 1)
    assert not (tmp_path / "run").exists()
