"""Ctrl-C in a real process: exit code 130, nothing half-written, no process left, and training goes on afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb
import psutil
import pytest
from train_cases import changed, checkpoint, records

from onetrain.data.options import SourceOptions
from onetrain.launcher.config import run_folder, save_config
from onetrain.launcher.train import train
from onetrain.parallel.checkpoint import latest
from onetrain.parallel.process_group import VARIABLES

STARTED_S = 240  # on a busy machine


@contextmanager
def onetrain(verb, config, environment=None):
    """The command in a session of its own, as a terminal would hold it; whatever is left of it at the end is killed."""
    path = Path(config.storage_path).with_name("job.yaml")
    save_config(config, path)
    command = [sys.executable, "-m", "onetrain.launcher.cli", verb, str(path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {})},
    )
    family = []
    try:
        yield process, family
    finally:
        if process.poll() is None:
            process.kill()
        for member in family:
            with suppress(psutil.NoSuchProcess):  # which psutil tells from a later process of the same id
                member.kill()
        path.unlink()


def wait_for(condition, process):
    deadline = time.monotonic() + STARTED_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)


def interrupt(process, family):
    """Ctrl-C reaches the whole foreground group; returns what was printed."""
    family += psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert output.count("stopped by Ctrl-C") == 1
    assert "Traceback" not in output
    assert psutil.wait_procs(family, timeout=20)[1] == []
    return output


def test_during_prepare(tiny, tmp_path):
    log = tmp_path / "log.parquet"
    columns = "'u' || hash(i) % 40000 AS user, hash(i + 11) % 5000 AS item, hash(i + 7) % 100000000 AS timestamp"
    duckdb.sql(f"COPY (SELECT {columns} FROM range(2000000) r(i)) TO '{log}' (FORMAT parquet)")
    source = SourceOptions(events=str(log))
    config = changed(tiny, data__prepared=str(tmp_path / "prepared"), data__source=source)
    with onetrain("prepare", config) as (process, family):
        wait_for(lambda: list(tmp_path.glob(".prepared.preparing-*/scratch/*")), process)
        interrupt(process, family)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["alone", "ray"])
def test_during_training(tiny, front_end):
    config = changed(tiny, train__steps=100_000, train__checkpoint_every=5, train__log_every=1, cluster__workers=2)
    one_rank = dict(zip(VARIABLES, ("0", "1", "0", "127.0.0.1", "0"), strict=True))
    with onetrain("train", config, one_rank if front_end == "alone" else None) as (process, family):
        wait_for(checkpoint(config, 10).exists, process)
        interrupt(process, family)
        assert len(family) >= (5 if front_end == "ray" else 0)

    folder = checkpoint(config, 10).parent
    kept = sorted(path.name for path in folder.iterdir())
    assert all(name.startswith("step_") for name in kept)
    newest = latest(folder)
    step = json.loads((newest / "state.json").read_text())["step"]
    ours = {"checkpoints", "config.yaml", "environment.json", "ledger.jsonl", "metrics.jsonl"}
    of_supervisor = {"events.jsonl", "heartbeats.json"} if front_end == "ray" else set()
    assert {path.name for path in run_folder(config).iterdir()} == ours | of_supervisor
    # every file of the newest checkpoint is verified as it is loaded
    result = train(changed(config, train__steps=step + 2, train__checkpoint_every=0))
    assert result["step"] == step + 2
    assert [record["step"] for record in records(config)] == list(range(1, step + 3))
