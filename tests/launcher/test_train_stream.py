"""Training on streams that end, grow, and lose shards; what the checkpoint keeps of them, and what the log says."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from train_cases import changed, checkpoint, records

from onetrain.data.append import append
from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest
from onetrain.data.options import DataOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.shards import ShardReader, read_items
from onetrain.launcher.config import run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.tokenize import tokenize
from onetrain.launcher.train import train
from onetrain.parallel.checkpoint import read_state
from onetrain.parallel.engine import Engine

FILES = ("model.safetensors", "optimizer.safetensors")
BATCH = 32


@pytest.fixture
def own(tiny, tmp_path):
    """The tiny job with a copy of its prepared folder, small shards' damage and growth allowed."""
    shutil.copytree(tiny.data.prepared, tmp_path / "prepared")
    return changed(tiny, data__prepared=str(tmp_path / "prepared"), train__evaluate_every=0)


def append_day(prepared: Path, number: int, events: int = 70) -> int:
    """Append new events of users that are known, all later than any; how many training samples they make."""
    manifest, rng = Manifest.load(prepared), np.random.default_rng(number)
    reader, items = ShardReader(prepared, manifest), read_items(prepared).column("item").to_pylist()
    users = [reader.user(int(row)).user for row in rng.integers(0, reader.n_users, events)]
    log = prepared.parent / f"day-{number}.parquet"
    table = {
        "user": users,
        "item": rng.choice(items, events).tolist(),
        "timestamp": manifest.time_range_ms[1] + 1000 * (number * 10_000 + np.arange(events)),
        "behaviour": rng.choice(manifest.behaviours, events).tolist(),
        "scenario": [manifest.scenarios[0]] * events,
    }
    pq.write_table(pa.table(table), log)
    append(DataOptions(prepared=str(prepared), source=SourceOptions(reader="columns", events=str(log))))
    return events


def cursor_of(config, step):
    return read_state(checkpoint(config, step))["cursor"]


def test_the_order_of_time_ends_and_goes_on_when_more_is_appended(own, capsys):
    config = changed(own, stream__order="time", train__steps=1000, train__log_every=20)
    samples = Manifest.load(own.data.prepared).n_train_events - Manifest.load(own.data.prepared).users
    steps = -(-samples // BATCH)
    assert samples % BATCH  # the last global batch is short
    assert train(config)["step"] == steps
    assert cursor_of(config, steps)["position"] == samples
    assert f"the order of time ends after step {steps}" in capsys.readouterr().err
    added = append_day(Path(own.data.prepared), 1)
    result = train(config)
    assert result["step"] == steps + -(-added // BATCH)
    assert cursor_of(config, result["step"])["position"] == samples + added
    assert [update["version"] for update in cursor_of(config, result["step"])["updates"]] == [0, 1]


def test_what_is_appended_during_a_run_is_taken_up_at_a_step_that_the_checkpoint_keeps(own, monkeypatch, capsys):
    config = changed(own, stream__watch_every=2, train__steps=20, train__checkpoint_every=10, train__keep_last=3)
    step = Engine.train_step

    def and_append(engine, *arguments):
        if engine.step == 4:
            append_day(Path(config.data.prepared), 1)
        return step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", and_append)
        train(config)
    updates = cursor_of(config, 10)["updates"]
    assert [(update["position"], update["version"]) for update in updates] == [(0, 0), (6 * BATCH, 1)]
    assert f"from sample {6 * BATCH} on: data.prepared at version 1" in capsys.readouterr().err

    again = changed(config, name="again")  # goes on from the middle, with the version there from the start
    shutil.copytree(run_folder(config), run_folder(again))
    shutil.rmtree(checkpoint(again, 20))
    train(again)
    for name in FILES:
        assert (checkpoint(again, 20) / name).read_bytes() == (checkpoint(config, 20) / name).read_bytes()

    shutil.rmtree(checkpoint(again, 20))
    shutil.rmtree(Path(config.data.prepared) / "versions" / "00001")
    append_day(Path(config.data.prepared), 2)  # another version 1
    with pytest.raises(ConfigError, match=r"contents of data\.prepared was"):
        train(again)


def test_samples_of_a_vanished_shard_are_left_out_and_counted_only_where_that_is_asked_for(tiny, tmp_path):
    own = changed(tiny, data__prepared=str(tmp_path / "prepared"), data__shard_events=200, evaluation__max_users=None)
    manifest = prepare(own.data)
    tokenize(own)
    shard = tmp_path / "prepared" / manifest.shards[len(manifest.shards) // 2].file
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(DataError, match=shard.name):
        train(changed(own, name="stops"))
    config = changed(own, name="skips", train__steps=55, train__log_every=55, stream__damaged="skip")
    train(config)
    (record,) = records(config)
    reader = ShardReader(tmp_path / "prepared", manifest)
    lost = reader.shards(np.arange(reader.n_users)) == len(manifest.shards) // 2
    lengths, valid_start, _ = reader.split_bounds()
    assert records(config, "valid")[0]["requests"] == int((lengths[~lost] >= 3).sum())  # users that are left
    with pytest.raises(DataError, match=shard.name):  # floors of other data are no floors
        evaluate(config, "latest", "test")
    lost_samples = int(np.maximum(valid_start[lost] - 1, 0).sum())
    samples = int(np.maximum(valid_start - 1, 0).sum())
    assert 0 < lost_samples < samples
    assert samples <= 55 * BATCH < samples + BATCH  # one epoch, and a few of the next
    assert lost_samples <= record["data/skipped_samples"] <= lost_samples + 55 * BATCH - samples


def test_the_log_says_how_the_data_flowed(own):
    train(changed(own, train__steps=4, train__log_every=2))
    for record in records(changed(own, train__steps=4)):
        assert record["data/events_per_s"] > 0
        assert record["data/mb_per_s"] > 0
        assert 0 <= record["data/queue"] <= 2
        assert 0 < record["data/latency_p50_ms"] <= record["data/latency_p99_ms"]
        assert record["data/imbalance"] == pytest.approx(0)  # one rank
        assert "data/skipped_samples" not in record
