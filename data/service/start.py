"""Starts, scales and ends the data service of a run, from the process that starts the run."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from onetrain.data.errors import DataError
from onetrain.data.service.groups import Groups, end_actors, find_actor, shortage
from onetrain.data.service.messages import NAMESPACE, PoolStatus, pool_name
from onetrain.data.service.pool import Pool
from onetrain.data.stream_options import StreamOptions

POLL_S = 0.2
MESSAGES_S = 1.0
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
_POOLS: dict[str, Any] = {}  # Ray ends an actor that nobody holds


@contextlib.contextmanager
def data_service(
    run: str,
    options: StreamOptions,
    on_message: Callable[[str], None] = print,
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str | None]:
    """Hold the builders of a run; yields `run` for ServiceStream, or None where options.service.actors is 0.

    Ray is initialised already. `on_message` gets lines from a thread: builders that died or hang, growth, and stalls of
    other data ranks than 0.

    Raises:
        DataError: no resources within `timeout_s`, or a run of this name has a service on the cluster already.
    """
    if not options.service.actors:
        yield None
        return
    start_service(run, options, timeout_s)
    ended = threading.Event()
    thread = threading.Thread(target=_pass_messages, args=(run, on_message, ended), daemon=True)
    thread.start()
    try:
        yield run
    finally:
        ended.set()
        thread.join(timeout=5)
        end_service(run)


def start_service(run: str, options: StreamOptions, timeout_s: float = START_TIMEOUT_S) -> None:
    """Start pool and builders, and wait until they have their resources; see `data_service`."""
    name, service = pool_name(run), options.service
    if find_actor(name) is not None:
        raise DataError(
            f"a run named {run!r} has a data service on this Ray cluster already. Give this run another name, or end "
            "the other one first."
        )
    pool = ray.remote(Pool).options(name=name, namespace=NAMESPACE, num_cpus=0, max_restarts=-1, max_concurrency=16)
    _POOLS[run] = pool.remote(run, service, options.builder_threads, os.getcwd())
    try:
        _wait(run, service.actors, lambda status: status.placed, timeout_s)
    except BaseException:
        end_service(run)
        raise


def end_service(run: str) -> None:
    """End pool and builders, and give all resources back; safe to call at any time."""
    if (pool := find_actor(pool_name(run))) is not None:
        with contextlib.suppress(RayError, GetTimeoutError):
            ray.get(pool.stop.remote(), timeout=STOP_TIMEOUT_S)
    _POOLS.pop(run, None)
    end_actors([pool_name(run)])
    Groups(run, cpus_per_actor=1.0, threads=1, folder="").resize(0)


def scale_service(run: str, actors: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Have so many builders from now on; returns when they answer. DataError where there are no resources for them."""
    pool = find_actor(pool_name(run))
    if pool is None:
        raise DataError(f"there is no data service for the run {run!r} on this Ray cluster")
    ray.get(pool.scale.remote(actors))
    _wait(run, actors, lambda status: status.placed and len(status.members) == actors, timeout_s)


def service_status(run: str) -> PoolStatus | None:
    """Builders of a run and what they do; None where it has no data service that answers."""
    pool = find_actor(pool_name(run))
    with contextlib.suppress(RayError, GetTimeoutError):
        return None if pool is None else ray.get(pool.status.remote(), timeout=5)
    return None


def _wait(run: str, actors: int, reached: Callable[[PoolStatus], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while (status := service_status(run)) is None or not reached(status):
        if time.monotonic() > deadline:
            if status is not None and status.placed and status.wanted == actors:
                raise DataError(
                    f"{actors} builders of the data service were placed, but only {len(status.members)} of them answer "
                    f"after {timeout_s:g} s. Is onetrain installed on every node? See Ray's worker logs."
                )
            raise DataError(
                f"not enough resources for the data service after {timeout_s:g} s:\n"
                f"{shortage(actors, 1.0 if status is None else status.cpus_per_actor)}\n"
                "Lower stream.service.actors or cpus_per_actor, free or add nodes, or set stream.service.actors to 0: "
                "then every rank builds its own batches. One node must hold a builder."
            )
        time.sleep(POLL_S)


def _pass_messages(run: str, on_message: Callable[[str], None], ended: threading.Event) -> None:
    """Hand over what the pool has to say, until the end."""
    while not ended.wait(MESSAGES_S):
        if (pool := find_actor(pool_name(run))) is not None:
            with contextlib.suppress(RayError, GetTimeoutError):
                for line in ray.get(pool.take_messages.remote(), timeout=5):
                    on_message(line)
