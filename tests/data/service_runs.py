"""What tests of the data service share: a small prepared folder, a local Ray, and comparing steps bit for bit."""

import contextlib
import os
import signal
import time

import numpy as np
import ray
import torch
from prepared_folder import random_block, write_folder

from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.options import ClusterOptions
from onetrain.data.cursor import Cursor
from onetrain.data.features import FeatureNames
from onetrain.data.options import BatchOptions
from onetrain.data.service.start import service_status
from onetrain.data.steps import StepBuilder, StreamSpec
from onetrain.data.stream import LocalStream
from onetrain.data.stream_options import ServiceOptions, StreamOptions

CPUS = 4
CURSOR = Cursor().updated({"": 0})


def local_ray():
    """A local Ray with CPUs for four builders."""
    return ray_session(ClusterOptions(workers=CPUS), object_store_gib=0.05)


def write_users(folder, seed=1, users=40):
    rng = np.random.default_rng(seed)
    write_folder(folder, random_block(rng, rng.integers(2, 30, users)), shard_events=100)
    return folder


def stream_spec(folder, ranks=1, prefetch=2, service=None, micro_batches=2, order="shuffled"):
    """Steps of 12 samples."""
    options = StreamOptions(
        order=order,
        prefetch_steps=prefetch,
        cache=str(folder.parent / "cache"),
        service=ServiceOptions(**{"actors": 1, "cpus_per_actor": 1.0, **(service or {})}),
    )
    features = FeatureNames(events=("item", "gap", "behaviour"), request=("hour",))
    return StreamSpec(str(folder), options, BatchOptions(max_context=8), features, 3, 12, micro_batches, ranks)


def local_steps(spec, rank, count, cursor):
    """What the process builds itself."""
    return list(LocalStream(StepBuilder(spec), rank).steps(count, cursor))


def content(value):
    """A batch, or anything in it, with its tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: content(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [content(inner) for inner in value]
    return {name: content(inner) for name, inner in vars(value).items()} if hasattr(value, "__dict__") else value


def contents(steps):
    """Of every step all that training may depend on."""
    stats = ("samples", "events", "bytes", "padding", "cost", "skipped", "sources")
    return [(content(step.micro_batches), step.cursor, [getattr(step.stats, name) for name in stats]) for step in steps]


def members(run, count=1, timeout_s=30):
    """The pool's builders, once there are at least so many."""
    deadline = time.monotonic() + timeout_s
    while (status := service_status(run)) is None or len(status.members) < count:
        assert time.monotonic() < deadline, f"no {count} builders of {run}: {status}"
        time.sleep(0.1)
    return status.members


def actor_names():
    return sorted(entry["name"] for entry in ray.util.list_named_actors(all_namespaces=True))


@contextlib.contextmanager
def stopped(pid):
    """A process that stands still inside the block, but is there."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
