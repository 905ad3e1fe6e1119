"""The data service on a local Ray: whatever befalls its actors, trainers get the steps of LocalStream, bit for bit."""

import contextlib
import itertools
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import ray
from ray.util.placement_group import placement_group_table
from service_runs import (
    CPUS,
    CURSOR,
    actor_names,
    contents,
    local_ray,
    local_steps,
    members,
    stopped,
    stream_spec,
    write_users,
)

from onetrain.data.errors import DamagedShardError, DataError
from onetrain.data.service.client import ServiceStream
from onetrain.data.service.messages import Report, pool_name
from onetrain.data.service.start import data_service, scale_service, service_status, start_service
from onetrain.data.steps import StepBuilder
from onetrain.data.stream import LocalStream

RUN = "test"
NAMESPACE = "onetrain"


@pytest.fixture(scope="module", autouse=True)
def ray_and_nothing_left():
    with local_ray():
        yield
        assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
        assert actor_names() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_users(tmp_path_factory.mktemp("service") / "prepared")


@pytest.fixture(scope="module")
def lines():
    return []


@pytest.fixture(scope="module")
def service(folder, lines):
    """One builder; the first test makes it three, and the others leave it so."""
    with data_service(RUN, stream_spec(folder).stream, lines.append) as run:
        yield run


def service_stream(spec, rank=0, warn=print):
    return ServiceStream(StepBuilder(spec), rank, RUN, warn)


def groups():
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def free_cpus(wanted):
    wait_for(lambda: ray.available_resources().get("CPU", 0) == wanted)


def test_the_pool_grows_while_steps_are_taken(service, folder):
    thread = threading.Thread(target=scale_service, args=(RUN, 3))
    taken = []
    for step in service_stream(stream_spec(folder, prefetch=4)).steps(10**6, CURSOR):
        taken.append(step)
        time.sleep(0.01)
        if len(taken) == 5:
            thread.start()
        if len(taken) > 5 and not thread.is_alive() and all(member.status.batches for member in members(RUN)):
            break
    assert len(members(RUN)) == 3
    assert sorted(len(group["bundles"]) for group in groups()) == [1, 2]
    free_cpus(CPUS - 3)
    assert contents(taken) == contents(local_steps(stream_spec(folder), 0, len(taken), CURSOR))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("order", ["shuffled", "time"])
def test_every_rank_gets_the_steps_of_its_own_process(service, folder, ranks, order):
    spec = stream_spec(folder, ranks, prefetch=ranks, order=order)
    streams = [service_stream(spec, rank).steps(10**6 if order == "time" else 40, CURSOR) for rank in range(ranks)]
    together = [list(steps) for steps in zip(*streams, strict=True)]  # one step each, turn and turn about
    for rank in range(ranks):
        expected = local_steps(spec, rank, len(together), CURSOR)
        assert contents([steps[rank] for steps in together]) == contents(expected)
    assert len(together) == 40 or (order == "time" and len(together) > 10)
    middle = together[9][0].cursor
    assert contents(service_stream(spec).steps(3, middle)) == contents(local_steps(spec, 0, 3, middle))


def test_never_more_steps_are_built_than_prefetch_ahead(service, folder):
    for prefetch in (1, 3):
        before = sum(member.status.batches for member in settled(RUN))
        steps = service_stream(stream_spec(folder, prefetch=prefetch)).steps(100, CURSOR)
        taken = [next(steps) for _ in range(5)]
        assert sum(member.status.batches for member in settled(RUN)) - before == 5 + prefetch
        assert max(step.ready for step in taken) <= prefetch
        assert next(steps).ready == prefetch - 1  # after a pause
        steps.close()


def settled(run):
    """Builders, by reports that are younger than this call."""
    called = time.monotonic()
    while True:
        found = members(run, 3)
        if all(member.age_s < time.monotonic() - called - 1 for member in found):  # the pool looks every half second
            return found
        time.sleep(0.05)


def test_killed_builders_cost_nothing_but_time(service, folder):
    spec = stream_spec(folder, ranks=2, prefetch=3)
    ended, killed = threading.Event(), set()

    def kill():
        pids = [member.status.pid for member in members(RUN, 3)]
        for victims in (pids[:1], pids[1:]):
            for pid in victims:
                os.kill(pid, signal.SIGSTOP)  # so that requests are on their way to it when it dies
            time.sleep(0.3)
            for pid in victims:
                os.kill(pid, signal.SIGKILL)
            killed.update(victims)
        wait_for(lambda: not {member.status.pid for member in members(RUN, 3)} & set(pids), 60)
        ended.set()

    thread = threading.Thread(target=kill)
    thread.start()
    taken, failures = [], 0
    for step in service_stream(spec, rank=1).steps(10**6, CURSOR):
        taken.append(step)
        failures += step.waited_s > 0.15
        time.sleep(0.02)
        if len(taken) >= 60 and not thread.is_alive():
            break
    assert ended.is_set()
    assert len(killed) == 3
    assert failures
    assert contents(taken) == contents(local_steps(spec, 1, len(taken), CURSOR))


def test_the_pool_may_die_and_finds_its_builders_again(service, folder):
    before = members(RUN, 3)
    pids, old = {member.name: member.status.pid for member in before}, service_status(RUN).pid
    steps = service_stream(stream_spec(folder)).steps(10**6, CURSOR)
    taken = [next(steps)]
    os.kill(old, signal.SIGKILL)
    while (status := service_status(RUN)) is None or status.pid == old or len(status.members) < 3:
        taken.append(next(steps))
        time.sleep(0.02)
    assert {member.name: member.status.pid for member in status.members} == pids
    assert [group["state"] for group in groups()] == ["CREATED"] * 2
    os.kill(pids[before[0].name], signal.SIGKILL)  # and still looks after them
    wait_for(lambda: pids[before[0].name] not in {member.status.pid for member in members(RUN)})
    taken += itertools.islice(steps, 20)
    assert contents(taken) == contents(local_steps(stream_spec(folder), 0, len(taken), CURSOR))


def test_a_stopped_builder_is_named_in_time_and_overcome(service, folder):
    spec = stream_spec(folder, prefetch=4, service={"actors": 2, "stall_warning_s": 1.0, "give_up_s": 60.0})
    warnings = []
    steps = service_stream(spec, warn=warnings.append).steps(60, CURSOR)
    taken = [next(steps) for _ in range(10)]
    victim = members(RUN, 3)[0]
    with stopped(victim.status.pid):
        begun = time.monotonic()
        taken += itertools.islice(steps, 20)
        assert time.monotonic() - begun < 10
    assert len({line.split(" is ")[0] for line in warnings}) == 1  # later steps do not wait for it again
    late = next(step for step in taken if step.waited_s > 1)
    position = late.cursor.position - spec.global_batch_size
    for fact in (f"position {position} of data rank 0", victim.name, f"pid {victim.status.pid}", "does not answer"):
        assert fact in warnings[0]
    assert f"node {ray.nodes()[0]['NodeManagerAddress']}" in warnings[0]
    assert "asking onetrain-data-test-" in warnings[0]
    taken += steps
    assert contents(taken) == contents(local_steps(spec, 0, 60, CURSOR))


def test_stalls_of_other_ranks_reach_the_driver_and_no_answer_at_all_is_an_error(service, folder, lines):
    spec = stream_spec(folder, ranks=2, service={"actors": 2, "stall_warning_s": 0.5, "give_up_s": 2.0})
    steps = service_stream(spec, rank=1).steps(60, CURSOR)
    next(steps)
    with contextlib.ExitStack() as stack:
        victims = members(RUN, 3)
        for victim in victims:
            stack.enter_context(stopped(victim.status.pid))
        with pytest.raises(DataError, match=r"data rank 1 is .* s late.*give_up_s is over") as caught:
            list(steps)
        assert any(victim.name in str(caught.value) for victim in victims)
        wait_for(lambda: any("data rank 1" in line for line in lines))


def wait_for(condition, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_damaged_shard_is_the_error_that_it_is_in_process(service, tmp_path):
    folder = write_users(tmp_path / "prepared", seed=2)
    spec = stream_spec(folder, prefetch=3)
    StepBuilder(spec)
    shard = folder / "shard-00001.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    served = until_error(service_stream(spec).steps(60, CURSOR))
    assert served == until_error(LocalStream(StepBuilder(spec), 0).steps(60, CURSOR))
    assert served[1:] == (DamagedShardError, served[2], 3, "shard-00001.arrow")
    assert "shard-00001.arrow is damaged" in served[2]


def until_error(steps):
    count = 0
    try:
        for _ in steps:
            count += 1
    except DataError as error:
        return count, type(error), str(error), error.exit_code, error.shard
    raise AssertionError("no error")


def test_the_pool_shrinks_while_steps_are_taken(service, folder):
    pool, taken = ray.get_actor(pool_name(RUN), NAMESPACE), []
    steps = service_stream(stream_spec(folder, prefetch=4)).steps(10**6, CURSOR)
    for actors in (2, 1):  # one of a group of two; then that group as a whole
        taken += itertools.islice(steps, 5)
        ray.get(pool.scale.remote(actors))
        wait_for(lambda: service_status(RUN).placed)
        assert [len(group["bundles"]) for group in groups()] == [1] * actors
        free_cpus(CPUS - actors)
        taken += itertools.islice(steps, 20)
    wait_for(lambda: len(members(RUN)) == 1)
    assert contents(taken) == contents(local_steps(stream_spec(folder), 0, 50, CURSOR))


def test_what_the_run_needs_to_know_is_said(service, lines):
    assert any("1 -> 3 builders" in line for line in lines)
    assert any("Ray starts it again" in line for line in lines)


def test_missing_resources_are_a_table_and_leave_nothing(folder):
    options = stream_spec(folder, service={"actors": 2, "cpus_per_actor": CPUS}).stream
    with pytest.raises(DataError) as caught:
        start_service("big", options, timeout_s=3)
    table = [line.split() for line in str(caught.value).splitlines()]
    assert ["one", "builder", "wants", str(CPUS)] in table
    assert ["2", "builders", "want", str(2 * CPUS)] in table
    assert ["cluster", "has", "in", "all", str(CPUS)] in table
    assert not any("big" in name for name in [*actor_names(), *(group["name"] for group in groups())])


def test_without_a_service_or_with_two_of_one_name(service, folder):
    with data_service("none", stream_spec(folder, service={"actors": 0}).stream) as run:
        assert run is None
    with pytest.raises(DataError, match="'test' has a data service on this Ray cluster already"):
        start_service(RUN, stream_spec(folder).stream)
    with pytest.raises(DataError, match="no data service for the run 'absent'"):
        ServiceStream(StepBuilder(stream_spec(folder)), 0, "absent")


def test_waiting_trainers_make_it_grow_by_itself_and_the_end_ends_all(folder):
    options = stream_spec(folder, service={"actors": 1, "max_actors": 2, "cpus_per_actor": 0.5}).stream
    said = []
    with data_service("grow", options, said.append) as run:
        pool = ray.get_actor(pool_name(run), NAMESPACE)
        list(ServiceStream(StepBuilder(stream_spec(folder)), 0, run).steps(1, CURSOR))
        wait_for(lambda: not ray.get(pool.report.remote(Report(0, 0.2, 0.1))) or service_status(run).wanted == 2, 30)
        wait_for(lambda: service_status(run).placed)
        assert sum(len(group["bundles"]) for group in groups() if "grow" in group["name"]) == 2
        assert service_status(run).data_wait == pytest.approx(0.5, abs=0.2)
        wait_for(lambda: said)
        assert "1 -> 2 builders" in said[0]
    assert not any("grow" in name for name in [*actor_names(), *(group["name"] for group in groups())])


def test_steps_are_read_where_they_lie_and_leave_shared_memory_when_they_are_dropped(service, folder):
    spec = stream_spec(folder, prefetch=1, micro_batches=1)
    spec = replace(spec, global_batch_size=6000, batch=replace(spec.batch, max_context=30))
    one, two = (next(service_stream(spec).steps(1, CURSOR)) for _ in range(2))
    assert one.stats.bytes > 2**20
    assert contents([one]) == contents([two]) == contents(local_steps(spec, 0, 1, CURSOR))
    capacity = ray.cluster_resources()["object_store_memory"]
    kept = [one.micro_batches[0].sequences["history"].sid_BNL]
    expected = kept[0].clone()
    del one, two
    taken = 0
    for step in service_stream(spec).steps(10**6, CURSOR):
        taken += step.stats.bytes
        del step
        if taken > 2 * capacity:
            break
    assert kept[0].equal(expected)
