"""The worker group on a local Ray with two ranks: results, environment, printed lines, and every way to fail."""

import importlib
import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.util.placement_group import placement_group_table

from onetrain.cluster.errors import ClusterError
from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.worker_group import run_on_workers
from onetrain.data.errors import DataError

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import the tests
TWO = ClusterOptions(workers=2)


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    with ray_session(TWO):
        yield


@pytest.fixture(autouse=True)
def nothing_left():
    """After every run: no placement group, and all resources free again."""
    yield
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "CPUs are still reserved"
        time.sleep(0.1)


class TwoPartError(Exception):
    """Cannot be unpickled: pickle calls it with one argument."""

    exit_code = 3

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def all_reduce(scale):
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total = torch.tensor([scale * (dist.get_rank() + 1)])
    dist.all_reduce(total)
    dist.destroy_process_group()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    return total.item(), {name: os.environ[name] for name in names}, torch.get_num_threads(), os.getcwd()


def test_two_ranks_reduce_with_the_right_environment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    port = _free_port()
    results = run_on_workers(all_reduce, (2.5,), ClusterOptions(workers=2, master_port=port), threads_per_worker=2)
    assert [total for total, *_ in results] == [7.5, 7.5]
    address = ray.nodes()[0]["NodeManagerAddress"]
    for rank, (_, environment, threads, folder) in enumerate(results):
        assert environment == {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "2",
        }
        assert threads == 2
        assert Path(folder) == tmp_path


def test_lines_of_rank_0_arrive_whole_in_order_and_alone():
    def talk():
        for step in range(200):
            print(f"rank {os.environ['RANK']} step", step)
        print("warned", file=sys.stderr)
        print("the end", end="")

    lines = []
    run_on_workers(talk, (), TWO, 1, on_message=lines.append)
    assert sorted(lines[200:]) == ["the end", "warned"]
    assert lines[:200] == [f"rank 0 step {step}" for step in range(200)]


def test_a_user_facing_error_keeps_type_and_message_while_the_other_rank_waits():
    def fail():
        import torch.distributed as dist

        dist.init_process_group("gloo")
        if dist.get_rank() == 1:
            raise DataError("shard-00003.arrow is truncated")
        dist.barrier()

    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        run_on_workers(fail, (), TWO, 1)
    assert str(caught.value) == "shard-00003.arrow is truncated"
    assert caught.value.exit_code == 3
    assert "raised by rank 1 on node" in caught.value.__notes__[0]
    assert time.monotonic() - started < 60


def test_any_other_error_arrives_with_its_traceback():
    def fail():
        return {}["missing"]

    with pytest.raises(KeyError, match="missing") as caught:
        run_on_workers(fail, (), TWO, 1)
    assert ", in fail" in caught.value.__notes__[0]


def test_an_error_that_cannot_be_pickled_keeps_text_and_exit_code():
    def fail():
        raise TwoPartError("NaN", "items.arrow")

    with pytest.raises(RuntimeError, match=r"TwoPartError: NaN in items.arrow") as caught:
        run_on_workers(fail, (), TWO, 1)
    assert caught.value.exit_code == 3


def test_a_killed_worker_is_named_and_the_rest_is_stopped(tmp_path):
    def die():
        import torch.distributed as dist

        dist.init_process_group("gloo")
        rank = dist.get_rank()
        (tmp_path / str(rank)).write_text(f"{os.getpid()} {time.time()}")
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), 9)
        dist.barrier()  # fails as soon as the peer is gone; that error is not the cause

    with pytest.raises(ClusterError, match=r"rank 1 on node [0-9.]+ \(pid \d+\) died") as caught:
        run_on_workers(die, (), TWO, 1)
    pids, times = zip(*((tmp_path / rank).read_text().split() for rank in "01"), strict=True)
    assert f"pid {pids[1]})" in str(caught.value)
    assert time.time() - float(times[1]) < 20
    deadline = time.monotonic() + 10
    while psutil.pid_exists(int(pids[0])):
        assert time.monotonic() < deadline, "rank 0 still runs"
        time.sleep(0.1)


def test_missing_resources_are_shown_as_a_table():
    workers = int(ray.cluster_resources()["CPU"]) + 1
    with pytest.raises(ClusterError) as caught:
        run_on_workers(print, (), ClusterOptions(workers=workers, gpus_per_worker=1, start_timeout_s=1), 1)
    table = [line.split() for line in str(caught.value).splitlines()]
    assert ["CPU", "GPU"] in table
    assert [str(workers), "workers", "want", str(workers), str(workers)] in table
    assert ["cluster", "has", "in", "all", str(workers - 1), "0"] in table
    assert ["node", ray.nodes()[0]["NodeManagerAddress"], str(workers - 1), "0"] in table


def test_a_master_port_in_use_is_named_with_its_node():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ClusterError, match=rf"port {port} is in use on node [0-9.]+"):
            run_on_workers(print, (), ClusterOptions(workers=1, master_port=port), 1)


def test_code_that_a_worker_lacks_is_said_so(tmp_path, monkeypatch):
    (tmp_path / "only_on_the_driver.py").write_text("def train():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("only_on_the_driver")
    with pytest.raises(ClusterError, match=r"rank \d on node .* cannot load .* 'only_on_the_driver'"):
        run_on_workers(module.train, (), TWO, 1)


@pytest.mark.parametrize(
    "wrong", [{"workers": 0}, {"cpus_per_worker": 0}, {"gpus_per_worker": 0.5}, {"master_port": 70000}]
)
def test_senseless_options_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=rf"cluster.{next(iter(wrong))} is"):
        ClusterOptions(**wrong)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
