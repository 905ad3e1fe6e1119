import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import History, night

from onetrain.launcher.goodput import LABELS, goodput, goodput_metrics

WORK = ("data_wait", "recompute", "compute", "checkpoint", "validation")
ENDINGS = ("finished", "stopped", "failed", "died", "hang", "node_lost", "preempted", "drained", "rolled_back")


def contiguous(spans):
    return all(first.end == second.begin for first, second in itertools.pairwise(spans))


def check(found, history):
    """Spans without gap or overlap whose sums are the wall time."""
    assert contiguous(found.spans)
    assert all(span.seconds > 0 and span.label in LABELS for span in found.spans)
    length = found.spans[-1].end - found.spans[0].begin
    assert math.fsum(found.seconds.values()) == pytest.approx(length, abs=1e-6)
    assert found.wall_s == pytest.approx(length - found.seconds["idle"], abs=1e-6)
    for label in LABELS:
        own = math.fsum(span.seconds for span in found.spans if span.label == label)
        assert own == pytest.approx(found.seconds[label], abs=1e-6)
        assert found.seconds[label] == pytest.approx(history.truth[label], abs=1e-4), label
    assert found.ettr == pytest.approx(history.truth["compute"] / found.wall_s, abs=1e-6)


def random_history(chance):
    """Some sessions, with and without a supervisor, of some attempts that end in all ways. Returns the failures too."""
    history, furthest, failures, seconds = History(), 0, 0, lambda: chance.uniform(0.01, 60)
    for session in range(chance.randint(1, 3)):
        supervised = chance.random() < 0.7
        if session:
            history.spend("idle", seconds())
        if supervised:
            history.event("supervisor_started", pid=1, node="a", restarted=False, workers=2, sizes=[1, 2])
            history.spend("restart" if history.attempt else "start_up", seconds())
        attempts = chance.randint(1, 3) if supervised else 1
        for index in range(attempts):
            step = chance.randint(0, furthest)
            history.begin(seconds(), supervised, step, furthest, world_size=2)
            records = chance.randint(0, 5)
            for number in range(records):
                step += chance.randint(1, 9)
                labels = [label for label in WORK if chance.random() < 0.5] or ["compute"]
                first = {"start_up": seconds()} if number == 0 else {}
                history.record(step, first | {label: seconds() for label in labels})
                if supervised and number == 0:
                    history.event("training", attempt=history.attempt, step=step, seconds=1.0)
            furthest = max(furthest, step)
            kind, final = chance.choice(ENDINGS), index == attempts - 1
            on_purpose = kind in ("finished", "drained", "rolled_back")
            failures += not on_purpose and kind != "stopped"
            if on_purpose or kind == "failed":
                if kind == "failed":
                    history.spend("lost" if records else history.before_work, seconds())
                history.entry("end", outcome=kind, step=step)
            elif not supervised:  # nobody writes down how it ended
                failures += kind == "stopped"
            if supervised:
                working = records and not on_purpose and kind != "failed"
                over = "shut_down" if on_purpose and final else "restart"
                before = history.before_work if not records else over
                history.spend("lost" if working else before, seconds())
                history.end(kind, reason="why", rank=0, node="a", step=step, position=0)
                if final and kind not in ("finished", "stopped"):
                    history.event("gave_up", reason="why")
                if chance.random() < 0.5:
                    history.spend("shut_down" if final and (on_purpose or kind == "stopped") else "restart", seconds())
                    history.event("waiting", seconds=1.0, reason="")
    return history, failures


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_every_second_has_its_label(seed):
    history, failures = random_history(random.Random(seed))
    found = goodput(history.events, history.ledger)
    if not found.spans:
        assert sum(history.truth.values()) == 0
        return
    check(found, history)
    assert found.failures == failures
    assert found.mtbf_s == (found.wall_s / failures if failures else None)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 40))
def test_clocks_that_disagree_and_lost_records_leave_no_gap(seed, skew):
    chance = random.Random(seed)
    history, _ = random_history(chance)
    events = [record | {"time": record["time"] + skew} for record in history.events if chance.random() < 0.8]
    ledger = [record for record in history.ledger if chance.random() < 0.8]
    found = goodput(events, ledger, now=None if chance.random() < 0.5 else history.time + 50)
    assert contiguous(found.spans)
    if found.spans:
        length = found.spans[-1].end - found.spans[0].begin
        assert math.fsum(found.seconds.values()) == pytest.approx(length, abs=1e-6)


def example():
    """Two attempts in 200 s: 100..110 start, work to 160, death noticed at 170, next at work from 190, done at 300."""
    events = [
        {"time": 100.0, "event": "supervisor_started", "restarted": False},
        {"time": 102.0, "event": "attempt_started", "attempt": 1},
        {"time": 113.0, "event": "training", "attempt": 1, "step": 1, "seconds": 13.0},
        {"time": 170.0, "event": "attempt_ended", "attempt": 1, "kind": "died", "reason": "rank 1 is gone", "rank": 1,
         "node": "b", "step": 22},
        {"time": 172.0, "event": "attempt_started", "attempt": 2},
        {"time": 194.0, "event": "training", "attempt": 2, "step": 11, "seconds": 24.0},
        {"time": 299.0, "event": "attempt_ended", "attempt": 2, "kind": "finished", "step": 40},
        {"time": 300.0, "event": "run_finished", "step": 40},
    ]  # fmt: skip
    ledger = [
        {"time": 106.0, "attempt": 1, "kind": "start", "begun": 105.0, "step": 0, "furthest": 0},
        {"time": 130.0, "attempt": 1, "kind": "time", "step": 10,
         "seconds": {"start_up": 5.0, "compute": 17.0, "data_wait": 2.0, "checkpoint": 1.0}},
        {"time": 160.0, "attempt": 1, "kind": "time", "step": 20, "seconds": {"compute": 30.0}},
        {"time": 181.0, "attempt": 2, "kind": "start", "begun": 180.0, "step": 10, "furthest": 20},
        {"time": 220.0, "attempt": 2, "kind": "time", "step": 20, "seconds": {"start_up": 10.0, "recompute": 30.0}},
        {"time": 290.0, "attempt": 2, "kind": "time", "step": 40, "seconds": {"compute": 40.0, "validation": 30.0}},
        {"time": 291.0, "attempt": 2, "kind": "end", "outcome": "finished", "step": 40},
    ]  # fmt: skip
    return events, ledger


def test_an_example_by_hand():
    found = goodput(*example())
    expected = {"start_up": 10, "data_wait": 2, "compute": 87, "checkpoint": 1, "lost": 10, "restart": 20}
    expected |= {"recompute": 30, "validation": 30, "shut_down": 10, "idle": 0}
    assert found.seconds == pytest.approx(expected)
    assert found.wall_s == pytest.approx(200)
    assert found.ettr == pytest.approx(0.435)
    assert (found.failures, found.mtbf_s) == (1, pytest.approx(200))
    (restart,) = found.restarts
    assert (restart.attempt, restart.kind, restart.rank, restart.node, restart.step) == (1, "died", 1, "b", 22)
    assert (restart.next_attempt, restart.resumed_from, restart.seconds) == (2, 10, pytest.approx(24))
    lanes = [(span.label, span.begin, span.end, span.attempt) for span in found.spans[:6]]
    assert lanes == [
        ("start_up", 100, 110, 1), ("data_wait", 110, 112, 1), ("compute", 112, 129, 1), ("checkpoint", 129, 130, 1),
        ("compute", 130, 160, 1), ("lost", 160, 170, 1),
    ]  # fmt: skip


@pytest.mark.parametrize(("phase", "label"), [("step", "compute"), ("validation", "validation"), ("end", "compute")])
def test_a_run_that_goes_on_counts_up_to_now(phase, label):
    events, ledger = example()
    alive = goodput(events[:-2], ledger[:-1], now=310.0, phase=phase)
    before = goodput(events[:-2], ledger[:-1])
    assert alive.spans[-1].end == 310
    assert alive.seconds[label] == pytest.approx(before.seconds[label] + 20)
    assert alive.failures == 1
    assert before.failures == 2  # nobody says how the second one ended


def test_before_an_attempt_works_again_a_run_that_goes_on_restarts():
    events, ledger = example()
    found = goodput(events[:5], ledger[:3], now=180.0)
    assert found.seconds["restart"] == pytest.approx(10)
    assert found.restarts[0].seconds is None
    waiting = goodput(events[:4], ledger[:3], now=180.0)
    assert waiting.seconds == found.seconds


def test_recompute_goes_on_where_steps_are_known():
    events, ledger = example()
    found = goodput(events[:6], [*ledger[:4], ledger[4] | {"step": 15}], now=230.0)
    assert found.seconds["recompute"] == pytest.approx(40)


def test_a_lost_supervisor_leaves_idle_time():
    """The next one writes the end of the attempt that it found open, at its own start."""
    events, ledger = example()
    late = {"time": 1160.0, "event": "attempt_ended", "attempt": 1, "kind": "died", "reason": "its supervisor was lost"}
    again = {"time": 1160.1, "event": "supervisor_started", "attempt": 1, "restarted": False}
    rest = [record | {"time": record["time"] + 1000} for record in events[4:]]
    entries = [record | {"time": record["time"] + 1000} for record in ledger[3:]]
    entries[0]["begun"] += 1000
    found = goodput([*events[:3], late, again, *rest], [*ledger[:3], *entries])
    assert found.seconds["idle"] == pytest.approx(1000.1)
    assert found.seconds["lost"] == 0
    assert found.seconds["restart"] == pytest.approx(29.9)
    (restart,) = found.restarts
    assert (restart.reason, restart.time) == ("its supervisor was lost", 160)
    assert restart.seconds == pytest.approx(1194 - 1160.1)
    by_ray = goodput([*events[:3], late, again | {"restarted": True}, *rest], [*ledger[:3], *entries])
    assert by_ray.seconds["idle"] == 0
    assert by_ray.seconds["lost"] + by_ray.seconds["restart"] == pytest.approx(1030)


def test_an_attempt_that_drained_loses_nothing_though_its_node_was_taken():
    events, ledger = example()
    drained = {"time": 161.0, "attempt": 1, "kind": "end", "outcome": "drained", "step": 22}
    preempted = [*events[:3], events[3] | {"kind": "preempted"}, *events[4:]]
    found = goodput(preempted, [*ledger[:3], drained, *ledger[3:]])
    assert (found.seconds["lost"], found.seconds["restart"], found.failures) == (0, 30, 1)


def test_nothing_of_a_run_without_records(tmp_path):
    found = goodput([], [])
    assert (found.spans, found.ettr, found.mtbf_s, found.wall_s) == ((), None, None, 0)
    assert goodput_metrics(tmp_path) == {}


def test_metrics_of_a_folder(tmp_path):
    history = night(tmp_path)
    found = goodput(history.events, history.ledger)
    check(found, history)
    metrics = goodput_metrics(tmp_path)
    assert json.loads(json.dumps(metrics)) == metrics
    assert metrics["goodput/ettr"] == pytest.approx(history.truth["compute"] / found.wall_s)
    assert metrics["goodput/restart_s"] == pytest.approx(history.truth["restart"])
    assert (metrics["goodput/restarts"], metrics["goodput/failures"]) == (2, 2)
