"""Runs that leave batches out, go back, or are asked to end: each equals, bit for bit, the run that it stands for."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from train_cases import changed, checkpoint, records

from onetrain.cluster.beacon import BEACON, DRAIN, AttemptEnded, Beacon
from onetrain.cluster.event_log import LEDGER, SKIPPED, read_log
from onetrain.data.cursor import Cursor
from onetrain.data.manifest import Manifest
from onetrain.data.steps import StepBuilder
from onetrain.launcher import train as module
from onetrain.launcher.config import run_folder
from onetrain.launcher.job import PreparedData
from onetrain.launcher.options import RunConfig
from onetrain.launcher.stream import stream_spec
from onetrain.launcher.train import train
from onetrain.parallel import process_group
from onetrain.parallel.checkpoint import read_state
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import free_port

FILES = ("model.safetensors", "optimizer.safetensors")
BATCH, STEPS = 32, 9


@pytest.fixture
def short(tiny):
    config = changed(tiny, train__steps=STEPS, train__log_every=3, train__evaluate_every=0, train__keep_last=9)
    return changed(config, evaluation__max_users=20, parallel__micro_batch_size=16, train__checkpoint_every=4)


@contextlib.contextmanager
def poisoned(factors: dict[int, float], rank: int = 0) -> Iterator[None]:
    """The loss of batches at these positions is so many times what it is, on one rank."""
    loss_of = module._Run._loss_of

    def other(run: Any, step: Any) -> Callable[..., Any]:
        loss, factor = loss_of(run, step), factors.get(run.cursor.position)
        if factor is None or run.ranks.rank != rank:
            return loss

        def times(model: Any, batch: Any) -> Any:
            total, weight, stats = loss(model, batch)
            return total * factor, weight, stats

        return times

    module._Run._loss_of = other
    try:
        yield
    finally:
        module._Run._loss_of = loss_of


def attempt(config: RunConfig, factors: dict[int, float] | None = None, rank: int = 0) -> AttemptEnded | dict[str, Any]:
    """One attempt; how it ended."""
    with poisoned(factors or {}, rank):
        try:
            return train(config)
        except AttemptEnded as ended:
            return ended


def leave_out(config: RunConfig, *positions: int) -> None:
    """As if earlier attempts had found these batches bad."""
    run_folder(config).mkdir(parents=True)
    (run_folder(config) / SKIPPED).write_text("".join(f'{{"position": {p}}}\n' for p in positions))


def assert_same_end(first: RunConfig, second: RunConfig, step: int = STEPS) -> None:
    for name in FILES:
        assert (checkpoint(first, step) / name).read_bytes() == (checkpoint(second, step) / name).read_bytes()
    states = [read_state(checkpoint(config, step)) for config in (first, second)]
    assert states[0]["cursor"] == states[1]["cursor"]
    assert states[0]["losses"] == states[1]["losses"]


Call = tuple[RunConfig, dict[int, float] | None, int | None]


def on_two_ranks(ranks: Ranks, calls: list[Call], ports: list[int]) -> list[AttemptEnded | dict[str, Any]]:
    """Attempts, one after the other, each poisoned on rank 1 or asked to drain at a step, through rank 1."""
    process_group.stop()  # the pool's own
    ends = []
    for (config, factors, asked), port in zip(calls, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with asked_at(asked, 1):
            ends.append(attempt(config, factors, rank=1))
    return ends


@contextlib.contextmanager
def asked_at(step: int | None, rank: int) -> Iterator[None]:
    """The wish to drain reaches one rank while it computes this step."""
    train_step = Engine.train_step

    def and_ask(engine: Engine, *arguments: Any) -> Any:
        if engine.step == step and engine.ranks.rank == rank:
            BEACON.ask(DRAIN, "node given back")
        return train_step(engine, *arguments)

    Engine.train_step = and_ask
    try:
        yield
    finally:
        Engine.train_step = train_step
        Beacon.__init__(BEACON)  # a new process has a new one


def test_two_ranks_skip_roll_back_and_drain_as_if_nothing_had_been(short, two_ranks):
    names, options = ("skipping", "rolling", "without", "drained"), {"parallel__zero_stage": 2}
    skipping, rolling, without, drained = (changed(short, name=name, **options) for name in names)
    skipping = changed(skipping, guards__not_finite="skip")
    rolling = changed(rolling, guards__not_finite="roll_back")
    bad = {3 * BATCH: math.nan, 7 * BATCH: math.inf}
    for config in (without, drained):
        leave_out(config, *bad)
    calls = [(skipping, bad, None), *[(rolling, bad, None)] * 3, (without, None, None)]
    calls += [(drained, None, 5), (drained, None, None)]
    for ends in two_ranks.run(on_two_ranks, calls, [free_port() for _ in calls]):
        stopped = [(end.kind, end.step) for end in ends if isinstance(end, AttemptEnded)]
        assert stopped == [("rolled_back", 3), ("rolled_back", 6), ("drained", 6)]
        assert "node given back" in str(ends[5])  # on both, though rank 1 alone was told
    for config in (skipping, rolling, drained):
        assert_same_end(config, without)
    assert read_state(checkpoint(skipping, STEPS))["cursor"]["position"] == (STEPS + 2) * BATCH

    told = read_log(run_folder(rolling) / SKIPPED)
    assert [(r["attempt"], r["position"], r["action"]) for r in told] == [
        (1, 3 * BATCH, "roll_back"),
        (2, 7 * BATCH, "roll_back"),
    ]
    outcomes = [record["outcome"] for record in read_log(run_folder(rolling) / LEDGER) if record["kind"] == "end"]
    assert outcomes == ["rolled_back", "rolled_back", "finished"]
    starts = [record for record in read_log(run_folder(rolling) / LEDGER) if record["kind"] == "start"]
    assert [(r["attempt"], r["step"], r["furthest"]) for r in starts] == [(1, 0, 0), (2, 0, 3), (3, 4, 6)]
    # one value for every step, of the attempt that made it for good
    assert [(r["step"], r["attempt"]) for r in records(rolling)] == [(3, 2), (6, 3), (9, 3)]
    assert [(r["step"], r["attempt"]) for r in records(drained)] == [(3, 1), (6, 1), (9, 2)]
    spent = [r["seconds"] for r in read_log(run_folder(rolling) / LEDGER) if r["kind"] == "time" and r["attempt"] == 2]
    assert min(sum(seconds.get(label, 0) for seconds in spent) for label in ("compute", "recompute")) > 0


def test_what_was_left_out_is_recorded_by_source_and_sample(short):
    config = changed(short, guards__not_finite="skip")
    attempt(config, {2 * BATCH: math.nan, 4 * BATCH: math.inf})
    data, state = PreparedData.open(config), read_state(checkpoint(config, STEPS))
    steps = StepBuilder(stream_spec(config, data, Mesh.plan(1, config.parallel, config.model)))
    skipped, cursor = read_log(run_folder(config) / SKIPPED), Cursor.from_json(state["cursor"])
    for record, position, value in zip(skipped, (2 * BATCH, 4 * BATCH), ("nan", "inf"), strict=True):
        ids = steps.order(cursor).sample_ids(position, BATCH)[1].tolist()
        del record["time"]
        assert len(record.pop("updates")) == 16
        expected = {"attempt": 1, "step": position // BATCH - position // (4 * BATCH), "position": position}
        assert record == {
            **expected,
            "action": "skip",
            "reason": "not_finite",
            "value": value,
            "samples": {"data.prepared": ids},
        }
    told = [record for record in read_log(run_folder(config) / LEDGER) if record["kind"] == "skip"]
    assert [(r["step"], r["position"], r["reason"], r["value"]) for r in told] == [
        (2, 2 * BATCH, "not_finite", "nan"),
        (3, 4 * BATCH, "not_finite", "inf"),
    ]
    json.loads((run_folder(config) / LEDGER).read_text().splitlines()[-1], parse_constant=pytest.fail)


def test_the_ledger_of_a_run_adds_up_to_its_wall_time(short):
    train(short)
    ledger = read_log(run_folder(short) / LEDGER)
    start, *_, end = (record for record in ledger if record["kind"] in ("start", "end"))
    times = [record for record in ledger if record["kind"] == "time"]
    total = sum(seconds for record in times for seconds in record["seconds"].values())
    assert total == pytest.approx(times[-1]["time"] - start["begun"], abs=2e-3)
    assert times[-1]["time"] == pytest.approx(end["time"], abs=0.5)
    labels = {label for record in times for label in record["seconds"]}
    assert labels == {"start_up", "compute", "data_wait", "checkpoint", "validation"}
    assert [record["step"] for record in times] == [3, 6, 9, 9]
    assert 0 < records(short)[-1]["goodput"] < 1


def test_a_spike_is_left_out_and_a_resumed_run_decides_alike(short):
    options = {"guards__spike": "skip", "guards__spike_window": 4, "guards__spike_factor": 20.0}
    straight, halves, without = (changed(short, name=name, **options) for name in ("straight", "halves", "without"))
    spike = {5 * BATCH: 3.0}
    attempt(straight, spike)
    attempt(changed(halves, train__steps=4), spike)
    attempt(changed(halves, train__steps=9), spike)
    assert [record["reason"] for record in read_log(run_folder(straight) / SKIPPED)] == ["spike"]
    leave_out(without, 5 * BATCH)
    attempt(without)
    assert_same_end(straight, without)
    # another length is another schedule of learning rates, so that only the decisions compare
    assert len(read_state(checkpoint(halves, 4))["losses"]) == 4
    assert [record["position"] for record in read_log(run_folder(halves) / SKIPPED)] == [5 * BATCH]


def test_the_policy_stop_names_the_batch_and_the_way_to_go_on(short):
    with poisoned({2 * BATCH: math.nan}), pytest.raises(ParallelError) as caught:
        train(short)
    for part in ("Step 2, samples 64 on", "the loss is nan", "guards.not_finite: skip or roll_back"):
        assert part in str(caught.value)
    assert not (run_folder(short) / SKIPPED).exists()
    assert read_log(run_folder(short) / LEDGER)[-1]["outcome"] == "failed"


def test_a_run_that_leaves_too_much_out_stops(short):
    config = changed(short, guards__not_finite="skip", guards__max_skips=2)
    with poisoned({position * BATCH: math.nan for position in (1, 3, 6)}):
        with pytest.raises(ParallelError, match=r"samples 192 on: .*guards\.max_skips is 2"):
            train(config)
        assert [record["position"] for record in read_log(run_folder(config) / SKIPPED)] == [BATCH, 3 * BATCH]
        train(changed(config, guards__max_skips=3))  # the first two do not count again
    assert read_state(checkpoint(config, STEPS))["cursor"]["position"] == (STEPS + 3) * BATCH


def test_an_order_that_ends_with_a_bad_batch_still_ends_with_a_checkpoint(short):
    config = changed(short, stream__order="time", train__steps=1000, guards__not_finite="skip", train__log_every=100)
    manifest = Manifest.load(short.data.prepared)
    samples = manifest.n_train_events - manifest.users
    steps = -(-samples // BATCH)
    assert attempt(config, {(steps - 1) * BATCH: math.nan, 5 * BATCH: math.nan})["step"] == steps - 2
    assert read_state(checkpoint(config, steps - 2))["cursor"]["position"] == samples
    assert [record["step"] for record in records(config, "valid")] == [steps - 2]
    # known from the start
    again = changed(config, name="again")
    leave_out(again, (steps - 1) * BATCH, 5 * BATCH)
    assert train(again)["step"] == steps - 2
    for name in FILES:
        assert (checkpoint(config, steps - 2) / name).read_bytes() == (checkpoint(again, steps - 2) / name).read_bytes()


def test_a_wish_to_drain_during_the_last_step_changes_nothing(short):
    with asked_at(STEPS - 1, 0):
        assert train(short)["step"] == STEPS
    assert read_log(run_folder(short) / LEDGER)[-1]["outcome"] == "finished"


def test_a_drained_attempt_records_what_it_made_and_leaves_its_validation_to_the_next(short):
    config = changed(short, train__steps=8, train__evaluate_every=5, train__log_every=4, parallel__micro_batch_size=32)
    straight, drained = changed(config, name="straight"), changed(config, name="drained")
    train(straight)
    with asked_at(4, 0), pytest.raises(AttemptEnded, match="node given back"):
        train(drained)
    assert [record["step"] for record in records(drained)] == [4, 5]  # the second of one step
    assert records(drained, "valid") == []
    train(drained)
    assert [(r["step"], r["attempt"]) for r in records(drained)] == [(4, 1), (5, 1), (8, 2)]
    assert [(r["step"], r["attempt"]) for r in records(drained, "valid")] == [(5, 2), (8, 2)]
    for one, other in zip(records(straight, "valid"), records(drained, "valid"), strict=True):
        assert (one["recall@10"], one["loss"]) == (other["recall@10"], other["loss"])
    whole, first, rest = records(straight)[1], *records(drained)[1:]
    assert whole["loss"] == pytest.approx((first["loss"] + 3 * rest["loss"]) / 4, rel=0.05)  # nearly equal weights
    assert_same_end(straight, drained, 8)
