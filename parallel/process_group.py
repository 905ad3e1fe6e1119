"""The process group of one rank: start, stop, and the small collectives of the training loop.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say where a rank runs; nothing else is read. Without them the
process is a world of one. Without CUDA the backend is gloo, and DeepSpeed is told so before it is first imported.
"""

import contextlib
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from onetrain.parallel.errors import ParallelError, RendezvousError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_set_here: list[str] = []  # variables that a world of one has set, and that stop() removes


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the world."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout_s: float

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and logs."""
        return self.rank == 0


def start(timeout_s: float = 600) -> Ranks:
    """Joins the process group that the environment describes, or makes a world of one.

    A process group that the caller has already started is reused. `timeout_s` bounds the start and every collective.
    Raises ParallelError for an incomplete environment, a port in use, or ranks that do not meet in time.
    """
    device = _device()
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        given = [name for name in VARIABLES if name in os.environ]
        if not given:
            _start_alone(device, timeout)
        elif len(given) == len(VARIABLES):
            _start_given(device, timeout)
        else:
            missing = ", ".join(name for name in VARIABLES if name not in os.environ)
            raise ParallelError(f"{missing} not set beside {', '.join(given)}: set all five of {', '.join(VARIABLES)}.")
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")), device, timeout_s)


def stop() -> None:
    """Leaves the process group, and lets DeepSpeed forget the groups that it has made of it."""
    if not dist.is_initialized():
        return
    deepspeed_comm: Any = sys.modules.get("deepspeed.comm.comm")
    if deepspeed_comm is not None and deepspeed_comm.cdb is not None:
        deepspeed_comm.destroy_process_group()
        deepspeed_comm.cdb = None
    else:
        dist.destroy_process_group()
    while _set_here:
        os.environ.pop(_set_here.pop(), None)


def all_reduce_sum(values: list[float], ranks: Ranks) -> list[float]:
    """Sums each value over ranks, in float64."""
    if ranks.world_size == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total)
    return total.tolist()


def all_reduce_max(value: float, ranks: Ranks) -> float:
    """The largest value of any rank, in float64."""
    if ranks.world_size == 1:
        return value
    largest = torch.tensor(value, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def broadcast_object(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on every rank."""
    if ranks.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=ranks.device)
    return box[0]


def barrier(ranks: Ranks) -> None:
    """Waits for every rank."""
    all_reduce_sum([0.0], ranks)


def first_error(error: str | None, ranks: Ranks) -> str | None:
    """The error of the lowest rank that brings one, on every rank."""
    errors: list[str | None] = [error]
    if ranks.world_size > 1:
        errors = [None] * ranks.world_size
        dist.all_gather_object(errors, error)
    return next((text for text in errors if text is not None), None)


def raise_together(error: str | None, ranks: Ranks) -> None:
    """Raises ParallelError on every rank when any rank brings an error, so that none is left in a collective."""
    if (first := first_error(error, ranks)) is not None:
        raise ParallelError(first)


def collectives() -> dict[str, int]:
    """Of every process group the collectives that this rank has begun; a rank that hangs is behind, or waits alone."""
    begun = {}
    for group in list(distributed_c10d._world.pg_map):
        name = "world" if group.group_desc == "default_pg" else f"{group.group_name} {group.group_desc}"
        name = name.removesuffix(" undefined")
        with contextlib.suppress(RuntimeError):  # a backend that does not count
            begun[name] = int(group._get_sequence_number_for_group())  # type: ignore[attr-defined]
    return begun


def _device() -> torch.device:
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ParallelError(
                f"LOCAL_RANK {local_rank} has no GPU of its own: this machine shows {torch.cuda.device_count()}. "
                "Start at most that many ranks here, or set DS_ACCELERATOR=cpu to train on CPU with gloo."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def _start_alone(device: torch.device, timeout: timedelta) -> None:
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True, timeout=timeout)  # port 0: the system picks one
    alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    os.environ.update({name: str(value) for name, value in alone.items()})
    _set_here.extend(alone)
    dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=timeout)


def _start_given(device: torch.device, timeout: timedelta) -> None:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init_process_group(_backend(device), timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        rank, world_size = os.environ["RANK"], os.environ["WORLD_SIZE"]
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise RendezvousError(
                f"Rank {rank} cannot listen on {address}: the port is in use. Choose another MASTER_PORT, "
                "or end the process that holds it."
            ) from error
        raise RendezvousError(
            f"Rank {rank} of {world_size} did not meet the others at {address} within {timeout.total_seconds():.0f} s: "
            f"{str(error).splitlines()[0]}. Check that every rank has started and can reach that address."
        ) from error


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
