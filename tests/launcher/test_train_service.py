"""A run whose batches the data service builds, and whose builders are killed all the time, is the undisturbed run."""

import os
import signal
import threading

import pytest
from train_cases import changed, checkpoint, records

from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.worker_group import run_on_workers
from onetrain.data.service.start import data_service, service_status
from onetrain.data.stream_options import ServiceOptions
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.train import train

STEPS, LOGGED = 200, 5
KILLS = 2
MEASURED = ("loss", "grad_norm", "accuracy_level_0", "padding")


def kill_builders(run, ended, killed):
    """Kill -9 whichever builders have built something, again and again."""
    while not ended.wait(0.1) and len(killed) < KILLS:
        status = service_status(run)
        for member in status.members if status else []:
            if member.status.batches and member.status.pid not in killed:
                os.kill(member.status.pid, signal.SIGKILL)
                killed.append(member.status.pid)


@pytest.mark.slow
def test_killed_builders_change_nothing_of_a_run(tiny):
    config = changed(tiny, train__steps=STEPS, train__log_every=LOGGED, evaluation__max_users=20)
    alone = changed(config, name="alone", cluster__workers=1)
    served = changed(alone, name="served", stream__service=ServiceOptions(actors=1, memory_gib=0.2))
    cluster, killed, ended = ClusterOptions(workers=1), [], threading.Event()
    with ray_session(cluster, 1, 0.2):
        run_on_workers(train, (alone,), cluster, 1, lambda line: None)
        with data_service(served.name, served.stream, lambda line: None):
            killer = threading.Thread(target=kill_builders, args=(served.name, ended, killed))
            killer.start()
            try:
                run_on_workers(train, (served,), cluster, 1, lambda line: None)
            finally:
                ended.set()
                killer.join()
    assert len(killed) == KILLS
    curves = [[[record[name] for name in MEASURED] for record in records(of)] for of in (alone, served)]
    assert len(curves[0]) == STEPS // LOGGED
    assert curves[0] == curves[1]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (checkpoint(alone, STEPS) / name).read_bytes() == (checkpoint(served, STEPS) / name).read_bytes()


def test_a_service_without_ray_is_refused_in_words(tiny):
    with pytest.raises(
        ConfigError, match=r"stream\.service\.actors is 1, but this process is no part of a Ray cluster"
    ):
        train(changed(tiny, stream__service=ServiceOptions(actors=1)))
