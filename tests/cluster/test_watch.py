"""Verdicts about beats, with a clock of the test's own."""

import re
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from onetrain.cluster.beacon import PHASES, Beat
from onetrain.cluster.recovery_options import DEADLINES_S, RecoveryOptions
from onetrain.cluster.watch import ORDER, Watch, held_up_by

OPTIONS = RecoveryOptions(silence_s=30.0, deadlines_s={"step": 20.0, "data_wait": 25.0, "checkpoint": 200.0})
WORLD = 4


def beat(rank, phase="step", in_phase_s=0.0, step=7, collectives=None):
    return Beat(rank, 1000 + rank, phase, in_phase_s, step, 64, collectives or {})


def watch_of(beats, now=0.0, ranks=WORLD):
    watch = Watch(OPTIONS, ranks, now)
    for one in beats:
        watch.heard(one, now)
    return watch


def test_before_the_first_beat_ranks_are_starting():
    watch = Watch(OPTIONS, 2, now=50.0)
    assert watch.verdict(50.0 + DEADLINES_S["start"]) is None
    watch.heard(beat(0, "build", 1.0, None), 350.0)
    verdict = watch.verdict(350.5)
    assert (verdict.kind, verdict.ranks, verdict.phase) == ("deadline", [1], "start")
    assert verdict.seconds == 300.5
    assert verdict.over_s == 0.5
    assert [view.age_s for view in watch.snapshot(351.0)] == [1.0, None]


def test_silence_is_by_the_receivers_clock():
    watch = watch_of([beat(0), beat(1)], ranks=2)
    for second in range(1, 30):
        watch.heard(beat(0, in_phase_s=1.0), second)
    assert watch.verdict(20.0) is None  # rank 1 is silent since 0 and in its step for 20 s, neither beyond its limit
    watch = watch_of([beat(0, "first_step"), beat(1, "first_step")], ranks=2)
    for second in range(1, 31):
        watch.heard(beat(0, "first_step", second), second)
    assert watch.verdict(30.0) is None
    verdict = watch.verdict(30.5)
    assert (verdict.kind, verdict.ranks, verdict.seconds, verdict.over_s) == ("silent", [1], 30.5, 0.5)
    assert "rank 1 (pid 1001)" in verdict.message
    assert "first_step after step 7" in verdict.message


def test_time_in_a_phase_goes_on_without_beats():
    watch = watch_of([beat(rank, in_phase_s=5.0) for rank in range(WORLD)])
    assert watch.verdict(15.0) is None
    verdict = watch.verdict(16.0)
    assert (verdict.kind, verdict.ranks, verdict.seconds) == ("deadline", [0, 1, 2, 3], 21.0)


def test_silent_ranks_come_before_late_ones():
    watch = watch_of([beat(2)])
    for rank in (0, 1, 3):
        watch.heard(beat(rank, in_phase_s=40.0), 40.0)
    assert watch.verdict(40.0).ranks == [2]


def test_ranks_may_wait_as_long_as_another_may_write_a_checkpoint():
    """Rank 0 writes, the others wait in a collective of their next step; it passes its own deadline at 200 s."""
    watch = Watch(OPTIONS, WORLD, 0.0)
    for now in range(1, 202):
        watch.heard(beat(0, "checkpoint", now, collectives={"world": 5}), now)
        for rank in (1, 2, 3):
            watch.heard(beat(rank, "step", now, collectives={"world": 6}), now)
        verdict = watch.verdict(now)
        assert (verdict is None) == (now <= 200)
    assert (verdict.ranks, verdict.phase) == ([0], "checkpoint")


def test_but_not_for_ever_when_it_begins_phase_after_phase():
    watch = Watch(OPTIONS, 2, 0.0)
    for now in range(1, 400):
        watch.heard(beat(0, "checkpoint", now % 50, collectives={"world": 5}), now)
        watch.heard(beat(1, "step", now, collectives={"world": 6}), now)
        if watch.verdict(now) is not None:
            break
    assert now == 20 + 200 + 1
    assert watch.verdict(now).ranks == [0]
    assert "rank 1 (pid 1001) has waited in phase step for 221 s" in watch.verdict(now).message


def test_a_rank_that_has_returned_is_no_longer_watched():
    watch = watch_of([beat(0, "end"), beat(1, "end")], ranks=2)
    watch.done(0)
    assert watch.verdict(31.0).ranks == [1]
    watch.done(1)
    assert watch.verdict(10_000.0) is None


def culprits(*beats):
    return watch_of(beats, ranks=len(beats)).verdict(26.0).ranks


def test_the_cause_is_the_rank_that_is_behind():
    others = {"world": 42}
    assert culprits(beat(0), beat(1, step=6), beat(2), beat(3)) == [1]
    assert culprits(beat(0, step=None), beat(1, step=0)) == [0]
    assert culprits(beat(0), beat(1), beat(2, "data_wait"), beat(3)) == [2]
    assert culprits(beat(0, collectives=others), beat(1, collectives={"world": 41})) == [1]
    assert culprits(beat(0, "data_wait", collectives={"world": 41}), beat(1, collectives=others)) == [0]
    assert culprits(beat(0), beat(1, "data_wait")) == [1]
    assert culprits(beat(0, "data_wait"), beat(1), beat(2, "data_wait")) == [0, 2]  # rank 1 is ahead
    assert culprits(beat(0), beat(1)) == [0, 1]  # nothing tells which


def test_every_phase_has_its_place():
    assert sorted(ORDER) == sorted(PHASES)


def test_a_rank_that_waits_for_another_in_a_second_group_is_no_cause():
    """Ranks 0 and 1 share group a, 1 and 2 group b: 2 waits for 1, which waits for 0."""
    found = culprits(
        beat(0, collectives={"a": 3}), beat(1, collectives={"a": 4, "b": 8}), beat(2, collectives={"b": 9})
    )
    assert found == [0]


@st.composite
def _beats(draw):
    def one(rank):
        return Beat(
            rank,
            rank,
            draw(st.sampled_from(PHASES)),
            draw(st.floats(0, 100)),
            draw(st.none() | st.integers(0, 3)),
            None,
            draw(st.dictionaries(st.sampled_from("ab"), st.integers(0, 3))),
        )

    return [one(rank) for rank in range(draw(st.integers(1, 6)))]


@given(_beats(), st.lists(st.floats(0, 400), min_size=1, max_size=6))
def test_any_beats(beats, waits):
    """No verdict without a passed limit; one at the latest when all limits are passed; culprits are watched ranks."""
    options = RecoveryOptions(silence_s=120.0, deadlines_s=dict.fromkeys(PHASES, 90.0))
    watch, now = Watch(options, len(beats), 0.0), 0.0
    for one, wait in zip(beats, waits * len(beats), strict=False):
        now += wait / 20
        watch.heard(one, now)
    for wait in waits:
        now += wait
        views = watch.snapshot(now)
        silent = [v.rank for v in views if v.age_s is not None and v.age_s > 120]
        late = [v.rank for v in views if v.in_phase_s > 90]
        verdict = watch.verdict(now)
        if not silent and not late:
            assert verdict is None
        if silent:
            assert (verdict.kind, verdict.ranks) == ("silent", silent)
        elif len(late) == len(beats):
            assert verdict.kind == "deadline"
        if verdict is not None:
            assert verdict.over_s > 0
            assert verdict.ranks == sorted(set(verdict.ranks))
            assert set(verdict.ranks) <= set(range(len(beats)))
            assert f"rank {verdict.ranks[0]}" in verdict.message


@given(_beats())
def test_some_rank_is_held_up_by_at_the_lowest_step(beats):
    views = watch_of(beats, ranks=len(beats)).snapshot(0.0)
    found = held_up_by(views)
    lowest = min(-1 if view.step is None else view.step for view in views)
    assert found
    assert all((-1 if view.step is None else view.step) == lowest for view in found)
    # a rank that has done more is never added to the cause
    ahead = [*views, replace(views[0], rank=99, step=10)]
    assert [view.rank for view in held_up_by(ahead)] == [view.rank for view in found]


@given(_beats(), st.integers(0, 5))
def test_one_rank_behind_in_collectives_is_found_among_ranks_alike(beats, which):
    alike = [replace(one, phase="step", step=2, collectives={"world": 9}) for one in beats]
    if len(alike) < 2:
        return
    which %= len(alike)
    alike[which] = replace(alike[which], collectives={"world": 8})
    assert [view.rank for view in held_up_by(watch_of(alike, ranks=len(alike)).snapshot(0.0))] == [which]


def test_the_documented_deadlines_are_those_of_the_code():
    text = (Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) s \|$", text, flags=re.MULTILINE)
    assert [(phase, float(seconds)) for phase, seconds in rows] == list(DEADLINES_S.items())
