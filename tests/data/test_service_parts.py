"""Parts of the data service that need no Ray: growth, parcels, what a builder says of itself."""

import pickle
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from service_runs import CURSOR, content, contents, local_steps, stream_spec, write_users

from onetrain.data import activity
from onetrain.data.cursor import Cursor
from onetrain.data.service.builder_actor import Builder
from onetrain.data.service.growth import PATIENCE_S, WINDOW_S, Growth
from onetrain.data.service.parcel import Parcel
from onetrain.data.steps import StepBuilder
from onetrain.data.store import LocalStore
from onetrain.data.stream import Step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_users(tmp_path_factory.mktemp("service") / "prepared")


def through_ray(parcel):
    """As Ray carries it: buffers apart, read-only at the other end."""
    buffers = []
    message = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    return message, pickle.loads(message, buffers=[memoryview(buffer.raw()).toreadonly() for buffer in buffers])


def test_a_parcel_carries_every_tensor_unchanged_and_apart_from_the_message(folder):
    step = StepBuilder(stream_spec(folder)).build(CURSOR, 0)
    message, parcel = through_ray(Parcel.pack(step))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that cannot be written to
        opened = parcel.open()
    assert content(opened.micro_batches) == content(step.micro_batches)
    assert opened.stats == step.stats
    big = Parcel.pack({"deep": [(torch.zeros(100_000),)]})
    message, parcel = through_ray(big)
    assert len(message) < 2000
    (tensor,) = parcel.open()["deep"][0]
    assert tensor.data_ptr() == parcel.open()["deep"][0][0].data_ptr()  # where it lies, not a copy of it


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.int32])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (4, 5)])
def test_tensors_of_any_type_and_shape(dtype, shape):
    value = torch.from_numpy(np.random.default_rng(0).integers(0, 2, shape)).to(dtype)
    opened = through_ray(Parcel.pack(value))[1].open()
    assert opened.dtype == dtype
    assert opened.shape == value.shape
    assert torch.equal(opened, value)


def windows(growth, share, count, builders, now, settled=True):
    """So many windows in which rank 0 waits this share of the time, and rank 1 does not wait."""
    for _ in range(count):
        growth.add(0, WINDOW_S, share * WINDOW_S)
        growth.add(1, WINDOW_S, 0.0)
        now[0] += WINDOW_S
        builders = growth.decide(now[0], builders, settled)
    return builders


def test_growth_while_trainers_wait_and_no_further_than_allowed():
    growth, now = Growth(least=1, most=3), [100.0]
    assert growth.decide(now[0], 1, True) == 1
    assert windows(growth, 0.04, 20, 1, now) == 1
    assert windows(growth, 0.5, 1, 1, now) == 2
    assert growth.share == pytest.approx(0.5)
    assert windows(growth, 0.5, 1, 2, now, settled=False) == 2  # the new one has built nothing yet
    assert growth.decide(now[0], 2, True) == 2
    assert windows(growth, 0.5, 10, 2, now) == 3


def test_shrinking_takes_patience_which_grows_when_shrinking_was_wrong():
    growth, now = Growth(least=1, most=4), [0.0]
    growth.decide(now[0], 3, True)
    quiet = int(PATIENCE_S / WINDOW_S)
    assert windows(growth, 0.0, quiet, 3, now) == 3
    assert windows(growth, 0.0, 1, 3, now) == 2
    assert windows(growth, 0.02, 5 * quiet, 2, now) == 2  # neither waiting much nor quiet
    assert windows(growth, 0.2, 1, 2, now) == 3
    assert growth.patience_s == 2 * PATIENCE_S
    assert windows(growth, 0.0, 2 * quiet, 3, now) == 3
    assert windows(growth, 0.0, 1, 3, now) == 2
    assert windows(growth, 0.0, 20 * quiet, 2, now) == 1  # and no further


def test_a_builder_names_the_shard_it_waits_for_while_it_builds(folder, monkeypatch):
    waiting, go, path = threading.Event(), threading.Event(), LocalStore.path

    def slow(self, stored):
        if stored.file.startswith("shard"):
            waiting.set()
            assert go.wait(30)
        return path(self, stored)

    builder = Builder("")
    spec = stream_spec(folder, ranks=2)
    builder.build(spec, CURSOR, 0)
    assert [builder.status().batches, builder.status().tasks] == [1, []]
    monkeypatch.setattr(LocalStore, "path", slow)
    built = []
    other = stream_spec(folder, ranks=2, micro_batches=1)  # another stream is opened anew
    thread = threading.Thread(target=lambda: built.append(builder.build(other, Cursor(24, CURSOR.updates), 1)))
    thread.start()
    try:
        assert waiting.wait(30)
        time.sleep(0.05)
        (task,) = builder.status().tasks
        assert (task.position, task.rank) == (24, 1)
        assert task.doing.startswith("fetching shard-")
        assert 0.05 <= task.doing_s <= task.seconds < 30
    finally:
        go.set()
        thread.join(30)
    status = builder.status()
    step = built[0].open()
    assert (status.batches, status.tasks, len(status.latencies)) == (2, [], 2)
    assert status.bytes > step.stats.bytes > 0
    expected = local_steps(other, 1, 3, CURSOR)[2:]
    assert contents([Step(step.micro_batches, expected[0].cursor, 0.0, 0, step.stats)]) == contents(expected)


def test_activity_is_the_innermost_one_of_a_thread():
    me = threading.get_ident()
    assert activity.activity(me) is None
    with activity.doing("building"):
        with activity.doing("verifying"):
            assert activity.activity(me)[0] == "verifying"
        assert activity.activity(me)[0] == "building"
        assert activity.activity(-1) is None
    assert activity.activity(me) is None
