"""How many workers the cluster has room for, and which world size an attempt gets."""

import time
from collections.abc import Callable, Container

import ray
from ray._private.state import available_resources_per_node  # the only source of free resources by node

from onetrain.cluster.nodes import draining_nodes
from onetrain.cluster.options import ClusterOptions

SETTLE_S = 5.0  # how long fewer free resources than the nodes have are waited for: a dead attempt gives back late
POLL_S = 0.5


def workers_that_fit(options: ClusterOptions, without: Container[str] = ()) -> int:
    """Workers that the nodes hold, by what is free there now.

    Nodes that are dead, about to go, or in `without` (by id) do not count.
    """
    going = draining_nodes()
    free_of = available_resources_per_node()
    count = 0.0
    for node in ray.nodes():
        if not node["Alive"] or node["NodeID"] in without or node["NodeID"] in going:
            continue
        has = free_of.get(node["NodeID"], {})
        fits = (has.get("CPU", 0.0) + 1e-6) // options.cpus_per_worker
        if options.gpus_per_worker:
            fits = min(fits, (has.get("GPU", 0.0) + 1e-6) // options.gpus_per_worker)
        count += fits
    return int(count)


def largest(sizes: tuple[int, ...], room: int) -> int | None:
    """The largest legal world size within `room`."""
    return next((size for size in sizes if size <= room), None)


def wait_for_room(
    options: ClusterOptions,
    sizes: tuple[int, ...],
    timeout_s: float,
    stopped: Callable[[], bool],
    suspects: Callable[[], Container[str]] = tuple,
) -> int | None:
    """The world size for the next attempt, None when there is not enough room in time.

    All workers as soon as there is room for them; fewer once the room has not grown for SETTLE_S. `suspects` are nodes
    that may be dead, which Ray has not found out yet.
    """
    began = grew = time.monotonic()
    most = 0
    while not stopped():
        without = suspects()
        room = workers_that_fit(options, without)
        now = time.monotonic()
        if room > most:
            most, grew = room, now
        size = largest(sizes, room)
        if size == sizes[0] or (size is not None and now - grew >= SETTLE_S and room >= most):
            return size
        most = min(most, room)
        if now - began > timeout_s:
            return size
        time.sleep(POLL_S)
    return None
