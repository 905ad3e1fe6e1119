"""`onetrain checkpoint`: what it prints of a run's checkpoints, its exit codes, and copies elsewhere."""

import json

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from train_cases import changed, checkpoint
from typer.testing import CliRunner

from onetrain.launcher.checkpoint_tools import format_bytes, list_rows, open_run, state_rows
from onetrain.launcher.cli import app
from onetrain.launcher.config import run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.train import train
from onetrain.parallel.checkpoint import verify

FILES = ("model.safetensors", "optimizer.safetensors")


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def trained(tiny):
    config = changed(tiny, train__steps=4, train__checkpoint_every=2, train__evaluate_every=4, evaluation__max_users=20)
    train(config)
    return config


def test_list_and_verify(trained):
    folder = run_folder(trained)
    store, best = open_run(str(folder))
    rows = list_rows(store, best)
    size = sum((checkpoint(trained, 4) / name).stat().st_size for name in FILES)
    assert [row[:3] for row in rows] == [[f"step_0000000{n}", n, format_bytes(size)] for n in (2, 4)]
    assert [row[4].split(" ")[0] for row in rows] == ["", "recall@10"]
    assert [row[5] for row in rows] == ["yes", "yes"]
    assert "step_00000004" in run("list", folder / "config.yaml")
    assert run("verify", folder).count("whole") == 2
    path = checkpoint(trained, 2) / FILES[0]
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "model.safetensors does not match its checksum" in run("verify", folder, code=4)
    assert "whole" in run("verify", checkpoint(trained, 4))
    path.write_bytes(content[:-1])
    assert f"{FILES[0]} has {len(content) - 1} bytes instead of {len(content)}" in run("list", folder)
    with pytest.raises(ConfigError, match="is not there"):
        open_run(str(folder / "nothing"))
    run("verify", folder / "checkpoints" / "step_00000009", code=2)


def test_show(trained):
    folder = checkpoint(trained, 4)
    told = run("show", folder, "--tensors")
    header = json.loads((folder / "state.json").read_text())
    state = dict(state_rows(header))
    assert state["cursor.position"] == "128"
    assert state["data_fingerprint"] in told
    assert "train.checkpoint_every" in told
    assert "train.log_every" in told
    assert "parallel.precision" not in told  # the default
    model, moments = (load_file(folder / name) for name in FILES)
    name, tensor = max(model.items(), key=lambda item: item[1].numel())
    row = next(line for line in told.splitlines() if name in line)
    assert "x".join(map(str, tensor.shape)) in row
    assert f"{float(tensor.norm()):.4f}"[:-1] in row
    assert f"{float(moments[f'exp_avg/{name}'].norm()):.4f}"[:-1] in row
    run("show", folder.parent, code=2)


def test_convert(trained, tmp_path):
    source = checkpoint(trained, 4)
    memory = fsspec.filesystem("memory")
    try:
        run("convert", source, "memory://bucket/run/step_00000004")
        run("convert", "memory://bucket/run/step_00000004", tmp_path / "back" / "step_00000004")
        run("convert", source, "memory://bucket/run/step_00000004", code=2)  # is there already
    finally:
        memory.store.clear()
    for name in FILES:
        assert (tmp_path / "back" / "step_00000004" / name).read_bytes() == (source / name).read_bytes()
    assert verify(tmp_path / "back" / "step_00000004") is None
    small = tmp_path / "small"
    run("convert", source, small, "--dtype", "bf16", code=2)
    run("convert", source, small, "--dtype", "bf16", "--weights-only")
    assert sorted(path.name for path in small.iterdir()) == ["model.safetensors", "state.json"]
    before, after = load_file(source / FILES[0]), load_file(small / FILES[0])
    assert all(
        torch.equal(value.bfloat16(), after[name]) for name, value in before.items() if value.is_floating_point()
    )
    losses = [evaluate(trained, str(folder), "test", max_requests=50) for folder in (source, small)]
    means = [table.record["results"]["model"]["all"]["loss"] for table in losses]
    assert means[0] == pytest.approx(means[1], rel=1e-2)
    warm = changed(trained, name="warm", train__warm_start=str(small), train__steps=1, optimizer__learning_rate=0)
    train(warm)
    started = load_file(checkpoint(warm, 1) / FILES[0])
    assert all(torch.equal(started[name], value.to(started[name].dtype)) for name, value in after.items())
    before = sorted(run_folder(trained).rglob("*"))
    assert "would be replaced" in run("convert", source, run_folder(trained), code=2)
    assert sorted(run_folder(trained).rglob("*")) == before
    damaged = source / FILES[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run("convert", source, tmp_path / "never", code=4)
    assert not (tmp_path / "never").exists()


def test_sizes_as_people_write_them():
    assert [format_bytes(number) for number in (0, 999, 1000, 123_456, 7.89e8, 2e10, 5e15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "123.5 kB",
        "789.0 MB",
        "20.0 GB",
        "5,000.0 TB",
    ]
