"""Agents against real processes of a small local Ray: stopped, busy, gone, and somebody else's."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import ray
from ray import cloudpickle

from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.node_agent import NO_ANSWER, NodeAgents, _stack
from onetrain.cluster.options import ClusterOptions
from onetrain.data.stream_options import StreamOptions
from onetrain.launcher.preflight import _clocks
from onetrain.launcher.preflight_node import Look, look, versions

cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Rank:
    """A process that does what ranks do when they hang."""

    def processes(self):
        """Its own pid and that of a child, as a loader of data would be."""
        self.child = subprocess.Popen(["sleep", "600"])
        return os.getpid(), self.child.pid

    def spin_for_ever(self):
        while True:
            sum(range(1000))


@pytest.fixture(scope="module")
def agents():
    with ray_session(ClusterOptions(workers=2)):
        agents = NodeAgents()
        yield agents
        agents.close()


@pytest.fixture(scope="module")
def node(agents):
    (node_id,) = agents.alive_nodes()
    return node_id


@pytest.fixture
def rank(node):
    actor = ray.remote(Rank).options(num_cpus=0).remote()
    pid, child = ray.get(actor.processes.remote())
    yield actor, pid, child
    for left in (pid, child):
        if psutil.pid_exists(left):
            os.kill(left, signal.SIGKILL)


def gone(pid):
    """Whether a process has ended, or waits for its parent to notice."""
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_stacks_of_stopped_busy_and_missing_processes(agents, node, rank):
    actor, pid, child = rank
    actor.spin_for_ever.remote()
    time.sleep(0.5)
    missing = subprocess.Popen(["true"])
    missing.wait()
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    stacks = agents.stacks_of({0: (node, pid), 1: (node, os.getpid()), 2: (node, missing.pid), 3: (node, child)})
    assert time.monotonic() - started < 10
    assert "spin_for_ever" in stacks[0]
    assert stacks[0].startswith("the process is stopped by a signal\nProcess ")
    assert stacks[1].startswith("Process ")
    assert "stacks_of" in stacks[1]
    assert stacks[2].startswith(NO_ANSWER)
    assert stacks[3].startswith(NO_ANSWER)  # no Python
    assert all("backtrace" not in text for text in stacks.values())


def test_a_stopped_rank_is_killed_with_what_it_started(agents, node, rank):
    _, pid, child = rank
    os.kill(pid, signal.SIGSTOP)
    foreign = subprocess.Popen(["sleep", "600"])  # as if the pid had been given to another process
    try:
        assert agents.kill({3: (node, pid), 4: (node, foreign.pid), 5: (node, 1)}) == [3]
        assert gone(pid)
        assert gone(child)
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_a_ray_process_that_is_no_rank_is_left_alone(agents, node):
    """The agent itself, and the raylet."""
    pid, raylet = ray.get(agents.get(node).run.remote(cloudpickle.dumps((lambda: (os.getpid(), os.getppid()), ())))), 0
    pid, raylet = cloudpickle.loads(pid)
    assert agents.kill({0: (node, pid), 1: (node, raylet)}) == []
    assert psutil.Process(raylet).is_running()
    assert agents.run_on([node], os.getpid) == {node: pid}


def test_a_function_on_a_node_returns_or_raises(agents, node):
    assert agents.run_on([node], divmod, (7, 2)) == {node: (3, 1)}
    assert isinstance(agents.run_on([node], int, ("x",))[node], ValueError)
    away = ray.get(agents.get(node).clock.remote()) - time.time()
    assert -5 < away <= 0


def test_preflight_looks_around_on_a_node(agents, node, tmp_path):
    """The function and its answer make the trip to the agent and back, and its clock is ours."""
    (tmp_path / "token").write_text("seen")
    what = Look((str(tmp_path),), (), StreamOptions(), ((str(tmp_path / "token"), "seen"),))
    started = time.monotonic()
    (seen,) = agents.run_on([node], look, (what,)).values()
    assert time.monotonic() - started < 10
    assert seen.versions | {"code": ""} == versions() | {"code": ""}  # code may be edited meanwhile
    assert [check for check in seen.checks if check.state == "fail"] == []
    ((clock, _),) = _clocks({node: "here"}, agents)
    assert clock.state == "ok"


def test_a_call_that_hangs_holds_up_nobody(agents, node):
    started = time.monotonic()
    found = agents.run_on([node], time.sleep, (600,), timeout_s=0.5)[node]
    assert isinstance(found, TimeoutError)
    assert "Process" in agents.stacks_of({0: (node, os.getpid())})[0]  # by a new agent
    assert time.monotonic() - started < 10


def test_a_dead_agent_and_a_node_that_is_not_there(agents, node):
    (pid,) = agents.run_on([node], os.getpid).values()
    os.kill(pid, signal.SIGKILL)
    elsewhere = "a" * 56
    started = time.monotonic()
    stacks = agents.stacks_of({0: (node, os.getpid()), 1: (elsewhere, 1)}, timeout_s=3.0)
    assert time.monotonic() - started < 5
    assert "Process" in stacks[0]  # by a new agent
    assert stacks[1].startswith(NO_ANSWER)
    assert agents.kill({1: (elsewhere, 1)}, timeout_s=0.5) == []
    assert list(agents.alive_nodes()) == [node]


def test_py_spy_gets_no_more_time_than_there_is(monkeypatch, tmp_path):
    assert "no time was left" in _stack(os.getpid(), time.monotonic())
    slow = tmp_path / "py-spy"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    started = time.monotonic()
    assert "did not read the process" in _stack(os.getpid(), started + 0.3)
    assert time.monotonic() - started < 3
    slow.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no py-spy" in _stack(os.getpid(), time.monotonic() + 1)
