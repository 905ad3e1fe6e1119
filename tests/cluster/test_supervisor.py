"""Attempts, restarts, sizes and endings, with a training function that trains nothing (toy_run.py)."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
import toy_run
from ray import cloudpickle
from ray.cluster_utils import Cluster
from toy_run import toy_job

from onetrain.cluster.detached import stop_run, supervise
from onetrain.cluster.errors import ClusterError, LostWorkerError
from onetrain.cluster.event_log import read_log
from onetrain.cluster.supervisor import Supervisor

cloudpickle.register_pickle_by_value(toy_run)

DRIVER = """
import sys
from pathlib import Path
import ray
from ray import cloudpickle
sys.path.insert(0, {folder!r})
import toy_run
cloudpickle.register_pickle_by_value(toy_run)
from onetrain.cluster.detached import supervise
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
print(supervise(toy_run.toy_job(Path(sys.argv[2]), workers=2, steps=60), print))
"""


@pytest.fixture(scope="module")
def cluster():
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    session_folder = started.head_node.get_session_dir_path()
    try:
        started.add_node(num_cpus=2)
        ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
        yield started
    finally:
        ray.shutdown()
        started.shutdown()
        shutil.rmtree(session_folder, ignore_errors=True)


def events(folder: Path, name: str) -> list[dict]:
    return [record for record in read_log(folder / "events.jsonl") if record["event"] == name]


def run(job):
    lines: list[str] = []
    return Supervisor(job, lines.append).run(), lines


def test_a_dead_rank_and_a_hanging_one_cost_an_attempt_each(cluster, tmp_path):
    result, lines = run(toy_job(tmp_path, workers=2, faults={1: "exit", 2: "stop", 3: "error"}))
    assert result == {"step": 20, "world": 2, "attempt": 4}
    endings = events(tmp_path, "attempt_ended")
    assert [ending["kind"] for ending in endings] == ["died", "hang", "failed", "finished"]
    assert [(e["attempt"], e["rank"]) for e in endings[:2]] == [(1, 1), (2, 1)]
    assert not events(tmp_path, "waiting")  # each attempt saved a checkpoint, so no failure followed another
    report = (tmp_path / "hang_2.txt").read_text()
    assert "count_steps" in report
    assert "rank 1" in report
    assert any("rank 1" in line and "hang_2.txt" in line for line in lines)
    stopped = int((tmp_path / "pid_2_1").read_text())
    assert not psutil.pid_exists(stopped) or psutil.Process(stopped).status() == psutil.STATUS_ZOMBIE


def test_failures_without_progress_end_the_run_with_the_last_one(cluster, tmp_path):
    with pytest.raises(LostWorkerError, match=r"rank 1 .* died") as caught:
        run(toy_job(tmp_path, workers=2, steps=60, max_failures=1, faults={1: "exit early", 2: "exit early"}))
    assert "given up" not in str(caught.value)
    assert [e["kind"] for e in events(tmp_path, "attempt_ended")] == ["died"] * 2
    assert "recovery.max_failures" in events(tmp_path, "gave_up")[0]["reason"]


def test_an_error_before_the_first_step_is_not_tried_again(cluster, tmp_path):
    def fails() -> None:
        raise RuntimeError("no such thing")

    job = replace(toy_job(tmp_path, workers=1), function=fails, arguments=())
    with pytest.raises(RuntimeError, match="no such thing"):
        run(job)
    assert [e["kind"] for e in events(tmp_path, "attempt_ended")] == ["refused"]


def test_what_preflight_finds_is_said_before_anything_starts(cluster, tmp_path):
    job = replace(toy_job(tmp_path, workers=1), preflight=lambda agents, say: ["node a: /data cannot be read"])
    with pytest.raises(ClusterError, match="/data cannot be read"):
        run(job)
    assert not events(tmp_path, "attempt_started")
    assert events(tmp_path, "preflight")[0]["ok"] is False


def test_a_run_shrinks_with_its_nodes_and_grows_with_them(cluster, tmp_path):
    second = cluster.add_node(num_cpus=2, node_ip_address="127.0.0.2")
    ended = {}
    job = toy_job(tmp_path, workers=4, steps=120, min_workers=1)
    thread = threading.Thread(target=lambda: ended.update(result=run(job)[0]))
    thread.start()
    wait_for(lambda: events(tmp_path, "training"))
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: len(events(tmp_path, "training")) == 2)
    cluster.add_node(num_cpus=2, node_ip_address="127.0.0.3")
    thread.join(timeout=90)
    assert ended["result"]["world"] == 4
    assert [e["world_size"] for e in events(tmp_path, "attempt_started")] == [4, 2, 4]
    assert [e["kind"] for e in events(tmp_path, "attempt_ended")] == ["node_lost", "drained", "finished"]
    assert "room for 4 ranks instead of 2" in events(tmp_path, "attempt_ended")[1]["reason"]


def test_a_detached_supervisor_outlives_its_driver_and_its_own_process(cluster, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(folder=str(Path(__file__).parent)))
    command = [sys.executable, str(script), cluster.address, str(tmp_path / "run")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: events(tmp_path / "run", "training"))
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    os.kill(events(tmp_path / "run", "supervisor_started")[0]["pid"], signal.SIGKILL)
    second = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert second.returncode == 0, second.stderr
    assert "found the supervisor of run" in second.stdout
    assert "'step': 60" in second.stdout
    assert [e["kind"] for e in events(tmp_path / "run", "attempt_ended")] == ["died", "finished"]
    assert [e["restarted"] for e in events(tmp_path / "run", "supervisor_started")] == [False, True]


def test_a_run_is_stopped_by_its_name(cluster, tmp_path):
    assert not stop_run(tmp_path.name, tmp_path)
    job = toy_job(tmp_path, workers=1, steps=1000)
    stopper = threading.Thread(
        target=lambda: (wait_for(lambda: events(tmp_path, "training")), stop_run(tmp_path.name, tmp_path))
    )
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        supervise(job, print)
    stopper.join()
    assert [e["kind"] for e in events(tmp_path, "attempt_ended")] == ["stopped"]
    assert not stop_run(tmp_path.name, tmp_path)


def test_nodes_that_will_be_taken_away_end_an_attempt_in_good_order(cluster, tmp_path):
    goes = cluster.add_node(num_cpus=4, node_ip_address="127.0.0.4")
    ended = {}
    thread = threading.Thread(target=lambda: ended.update(result=run(toy_job(tmp_path, workers=2, steps=60))[0]))
    thread.start()
    wait_for(lambda: events(tmp_path, "training"))
    victim = next(
        n for n in ray.nodes() if n["NodeManagerAddress"] == events(tmp_path, "attempt_started")[0]["nodes"][0]
    )
    command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
    command += ["--node-id", victim["NodeID"], "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "test"]
    subprocess.run([*command, "--deadline-remaining-seconds", "600"], check=True, capture_output=True)
    thread.join(timeout=90)
    first, last = events(tmp_path, "attempt_ended")
    assert (first["kind"], last["kind"]) == ("preempted", "finished")
    assert "will be taken away" in first["reason"]
    assert victim["NodeManagerAddress"] not in events(tmp_path, "attempt_started")[1]["nodes"]
    assert ended["result"]["step"] == 60
    cluster.remove_node(goes, allow_graceful=False)


def test_two_supervisors_do_not_work_on_one_run(cluster, tmp_path):
    def runs_on() -> None:
        time.sleep(60)

    first = Supervisor(replace(toy_job(tmp_path, workers=1), function=runs_on, arguments=()), print)

    def is_stopped() -> None:
        with pytest.raises(KeyboardInterrupt):
            first.run()

    thread = threading.Thread(target=is_stopped)
    thread.start()
    wait_for(lambda: events(tmp_path, "ranks_running"))
    with pytest.raises(ClusterError, match="another supervisor"):
        run(toy_job(tmp_path, workers=1))
    first.stop()
    thread.join(timeout=30)
    assert [e["kind"] for e in events(tmp_path, "attempt_ended")] == ["stopped"]


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
