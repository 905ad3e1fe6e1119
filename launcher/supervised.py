"""A training run under supervision: what the cluster must know of a configuration, and where the supervisor runs."""

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import xxhash

from onetrain.cluster.detached import stop_run, supervise
from onetrain.cluster.job import Job, Say
from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.node_agent import NodeAgents
from onetrain.cluster.supervisor import Supervisor
from onetrain.launcher.checkpoints import run_store
from onetrain.launcher.config import run_folder
from onetrain.launcher.options import RunConfig
from onetrain.launcher.preflight import legal_world_sizes, preflight, problems
from onetrain.launcher.train import train
from onetrain.parallel.checkpoint_store import step_of


def run_supervised(config: RunConfig) -> dict[str, float]:
    """Train, attempt after attempt; the last metrics.

    The supervisor lives in this process with a local Ray, which ends with it; on a given cluster it is an actor that
    outlives this process. Raises what the training function raises for the user, or ClusterError; KeyboardInterrupt
    also for SIGTERM.
    """
    service = config.stream.service
    cpus = service.cpus_per_actor * (service.max_actors or service.actors)
    job = job_of(config)
    memory_gib = service.memory_gib if cpus else 0.0
    with (
        ray_session(config.cluster, cpus, memory_gib),
        _stopped_by_sigterm(),
    ):  # in this order: Ray sets its own handler
        if has_address(config):
            return supervise(job, _print)
        return Supervisor(job, _print).run()


def stop_supervised(config: RunConfig) -> bool:
    """Stop a run that goes on under supervision on the cluster; whether there is one."""
    with ray_session(config.cluster):
        return stop_run(config.name, run_folder(config).absolute())


def job_of(config: RunConfig) -> Job:
    """The job that a configuration describes. Raises ConfigError or ParallelError for an impossible mesh."""
    return Job(
        name=config.name,
        folder=run_folder(config).absolute(),
        function=train,
        arguments=(config,),
        cluster=config.cluster,
        recovery=config.recovery,
        threads_per_worker=config.train.threads_per_worker,
        sizes=legal_world_sizes(config),
        checkpointed=partial(_newest_step, config),
        preflight=partial(_problems, config),
        services=partial(_services, config),
        digest=_digest(config),
    )


def has_address(config: RunConfig) -> bool:
    """Whether the run is to be on a given cluster."""
    return bool(config.cluster.address or os.environ.get("RAY_ADDRESS"))


def _newest_step(config: RunConfig) -> int:
    newest = run_store(config).latest()
    return 0 if newest is None else step_of(newest)


def _problems(config: RunConfig, agents: NodeAgents, say: Say) -> Sequence[str]:
    """What forbids a start; says what only may go wrong."""
    found = preflight(config, agents)
    for check in found:
        if check.state == "warn":
            say(f"warning: {check.name}: {check.detail}")
    return problems(found)


@contextlib.contextmanager
def _services(config: RunConfig, say: Say) -> Iterator[None]:
    """The data service, if the configuration has one."""
    if not config.stream.service.actors:
        yield
        return
    from onetrain.data.service.start import data_service, end_service

    end_service(config.name)  # of a supervisor that was lost
    with data_service(config.name, config.stream, say, config.cluster.start_timeout_s):
        yield


def _digest(config: RunConfig) -> str:
    config = dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, address=None))  # of one cluster
    return xxhash.xxh3_64_hexdigest(json.dumps(dataclasses.asdict(config), sort_keys=True, default=str).encode())


def _print(line: str) -> None:
    print(line, flush=True)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM (a stopped Ray job, a pod that ends) stops the run as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
