"""Starting and stopping the process group: alone, given, reused, and the errors of each."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from onetrain.parallel import process_group
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.process_group import VARIABLES, Ranks
from onetrain.parallel.testing import WorkerPool


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_starts_stops_and_starts_again(no_variables: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        ranks = process_group.start(30)
        assert (ranks.rank, ranks.world_size, ranks.local_rank, ranks.is_main) == (0, 1, 0, True)
        assert process_group.start(30) == ranks  # reused
        assert {os.environ[name] for name in ("RANK", "WORLD_SIZE")} == {"0", "1"}
        assert process_group.all_reduce_sum([1.5, 2.0], ranks) == [1.5, 2.0]
        assert process_group.broadcast_object({"a": 1}, ranks) == {"a": 1}
        process_group.barrier(ranks)
        process_group.stop()
        assert not dist.is_initialized()
        assert not any(name in os.environ for name in VARIABLES)
    process_group.stop()  # nothing to stop


def test_incomplete_variables_are_named(no_variables: pytest.MonkeyPatch) -> None:
    no_variables.setenv("RANK", "0")
    no_variables.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParallelError, match="LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set beside RANK, WORLD_SIZE"):
        process_group.start(5)


def test_port_in_use_is_named(no_variables: pytest.MonkeyPatch) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        for name, value in zip(VARIABLES, ("0", "1", "0", "127.0.0.1", str(port)), strict=True):
            no_variables.setenv(name, value)
        with pytest.raises(ParallelError, match=rf"Rank 0 cannot listen on 127\.0\.0\.1:{port}: the port is in use"):
            process_group.start(5)


def test_rank_that_finds_nobody_says_where_it_looked(no_variables: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in zip(VARIABLES, ("1", "2", "1", "127.0.0.1", str(port)), strict=True):
        no_variables.setenv(name, value)
    with pytest.raises(ParallelError, match=rf"Rank 1 of 2 did not meet the others at 127\.0\.0\.1:{port} within 2 s"):
        process_group.start(2)


def collectives(ranks: Ranks) -> tuple:
    total = process_group.all_reduce_sum([ranks.rank + 1 / 3, 1e15 + ranks.rank], ranks)
    word = process_group.broadcast_object(f"from {ranks.rank}", ranks)
    process_group.barrier(ranks)
    try:
        process_group.raise_together("disk full" if ranks.rank == 1 else None, ranks)
    except ParallelError as error:
        return total, word, str(error), ranks.device
    return total, word, None, ranks.device


def test_collectives_agree_on_every_rank() -> None:
    with WorkerPool(2) as pool:
        first, second = pool.run(collectives)
    assert first == second == ([1 + 2 / 3, 2e15 + 1], "from 0", "disk full", torch.device("cpu"))
