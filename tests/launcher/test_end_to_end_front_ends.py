"""In this process, on Ray workers and under torchrun, training is the same."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from train_cases import changed, checkpoint, records
from typer.testing import CliRunner

from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.options import ClusterOptions
from onetrain.launcher.cli import app
from onetrain.launcher.config import run_folder, save_config
from onetrain.launcher.train import train
from onetrain.parallel.testing import free_port

STEPS = 50


@pytest.fixture(scope="module")
def local_ray():
    with ray_session(ClusterOptions(workers=2)):
        yield


@pytest.mark.slow
def test_three_front_ends_give_one_loss_curve(tiny, tmp_path, local_ray):
    config = changed(tiny, train__steps=STEPS, train__log_every=1, parallel__zero_stage=2, cluster__workers=2)
    runs = {name: changed(config, name=name) for name in ("alone", "ray", "torchrun")}
    files = {name: str(tmp_path / f"{name}.yaml") for name in runs}
    for name, run in runs.items():
        save_config(run, files[name])

    train(runs["alone"])
    done = CliRunner().invoke(app, ["train", files["ray"]])
    assert done.exit_code == 0, done.output
    torchrun = Path(sys.executable).with_name("torchrun")
    command = [torchrun, "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "onetrain.launcher.cli"]
    done = subprocess.run(
        [*command, "train", files["torchrun"]], capture_output=True, text=True, timeout=500, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained torchrun") == 1  # one rank prints

    curves = {name: {record["step"]: record for record in records(run)} for name, run in runs.items()}
    validations = {name: records(run, "valid") for name, run in runs.items()}
    for name in ("ray", "torchrun"):
        assert list(curves[name]) == list(curves["alone"]) == list(range(1, STEPS + 1))
        for step, expected in curves["alone"].items():
            for metric in ("loss", "loss_level_0", "loss_level_1", "loss_level_2", "learning_rate"):
                assert curves[name][step][metric] == pytest.approx(expected[metric], rel=1e-5), (name, step, metric)
        assert [record["loss"] for record in validations[name]] == pytest.approx(
            [record["loss"] for record in validations["alone"]], rel=1e-5
        )
    assert curves["alone"][STEPS]["loss"] < 0.95 * curves["alone"][1]["loss"]
    # and the two ways to run two ranks are one computation
    weights = [load_file(checkpoint(runs[name], STEPS) / "model.safetensors") for name in ("ray", "torchrun")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert "RANK" not in os.environ


def test_a_master_port_in_use_stops_the_workers(tiny, tmp_path, local_ray):
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        port = holder.getsockname()[1]
        save_config(changed(tiny, cluster__master_port=port, cluster__workers=2), tmp_path / "job.yaml")
        done = CliRunner().invoke(app, ["train", str(tmp_path / "job.yaml")])
    assert done.exit_code == 5
    assert f"port {port} is in use" in done.stderr
    assert "cluster.master_port" in done.stderr
    assert {path.name for path in run_folder(tiny).iterdir()} == {"events.jsonl", "heartbeats.json"}  # what was tried
