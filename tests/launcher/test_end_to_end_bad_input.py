"""Bad input through the command line: an exit code, a message that helps, and nothing half-written."""

import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from train_cases import changed, checkpoint, records
from typer.testing import CliRunner

from onetrain.data.options import SourceOptions
from onetrain.data.sids import SidMap
from onetrain.launcher import supervised
from onetrain.launcher.cli import app
from onetrain.launcher.config import run_folder, save_config
from onetrain.launcher.tokenize import tokenize
from onetrain.launcher.train import train
from onetrain.model.options import TokenizerOptions
from onetrain.parallel.process_group import VARIABLES


def onetrain(verb, config, *arguments):
    """Exit code and messages of `onetrain VERB` with this configuration; a traceback fails the test."""
    path = Path(config.storage_path).with_name("job.yaml")
    save_config(config, path)
    done = CliRunner().invoke(app, [verb, str(path), *arguments])
    path.unlink()
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


def everything_in(folder):
    """Every file below `folder` with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def nothing_changes_in(folder):
    before = everything_in(folder)
    yield
    assert everything_in(folder) == before
    assert not any(path.is_dir() and path.name.startswith(".") for path in folder.rglob("*"))


def set_one_rank(monkeypatch, port=0):
    """As torchrun would, for a world of one; port 0 lets the system choose."""
    for name, value in zip(VARIABLES, ("0", "1", "0", "127.0.0.1", str(port)), strict=True):
        monkeypatch.setenv(name, value)


@contextmanager
def small_disk(folder, n_bytes):
    """A file system of this size at `folder`."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("a small disk needs the mount command")
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def copied(tiny, tmp_path):
    """The tiny job with a prepared folder that a test may damage."""
    shutil.copytree(tiny.data.prepared, tmp_path / "prepared")
    return changed(tiny, data__prepared=str(tmp_path / "prepared"))


GOOD = "user,item,timestamp\na,x,1\na,y,2\na,z,3\nb,x,4\n"


@pytest.mark.parametrize(
    ("log", "messages"),
    [
        ("user,item,time\na,x,1\n", ["timestamp", "time", "columns"]),
        ("user,item,timestamp\n", ["log.csv"]),
        ("", ["log.csv"]),
        ("user,item,timestamp\na,x,soon\n", ["'soon'", "timestamp_unit"]),
    ],
)
def test_logs_that_cannot_be_prepared(tiny, tmp_path, log, messages):
    (tmp_path / "log.csv").write_text(log)
    source = SourceOptions(events=str(tmp_path / "log.csv"))
    config = changed(tiny, data__prepared=str(tmp_path / "prepared"), data__source=source)
    with nothing_changes_in(tmp_path):
        code, told = onetrain("prepare", config)
    assert code == 3
    for message in messages:
        assert message in told
    assert not (tmp_path / "prepared").exists()


def test_embeddings_that_are_not_finite(tiny, tmp_path):
    (tmp_path / "log.csv").write_text(GOOD)
    vectors = [[1.0, 2.0], [3.0, 4.0], [float("nan"), 5.0]]
    pq.write_table(pa.table({"id": ["x", "y", "z"], "embedding": vectors}), tmp_path / "items.parquet")
    np.save(tmp_path / "items.npy", np.array(vectors, dtype=np.float32))
    source = SourceOptions(events=str(tmp_path / "log.csv"), items=str(tmp_path / "items.parquet"))
    config = changed(tiny, data__prepared=str(tmp_path / "prepared"), data__source=source)
    with nothing_changes_in(tmp_path):
        code, told = onetrain("prepare", config)
    assert (code, "embedding of item 'z' holds a value that is not finite" in told) == (3, True)

    tokenizer = TokenizerOptions(embedding="array", array=str(tmp_path / "items.npy"), codebook=(2, 2, 2))
    config = changed(config, data__source__items=None, tokenizer=tokenizer)
    assert onetrain("prepare", config)[0] == 0
    with nothing_changes_in(tmp_path):
        code, told = onetrain("tokenize", config)
    assert (code, "holds NaN or infinity for item z" in told) == (3, True)


def test_a_truncated_shard_stops_every_verb_that_reads_it(copied, tmp_path, monkeypatch):
    shard = next(Path(copied.data.prepared).glob("shard-*.arrow"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with nothing_changes_in(tmp_path):
        assert onetrain("debug", copied)[0] == 3
        assert onetrain("evaluate", copied)[0] == 3
        set_one_rank(monkeypatch)
        code, told = onetrain("train", copied)
    assert (code, str(shard) in told) == (3, True)
    assert not run_folder(copied).exists()


def test_the_sid_map_of_other_data(copied, tmp_path, monkeypatch):
    folder = Path(copied.data.prepared) / "sids"
    ours = SidMap.load(folder)
    tokenize(changed(copied, seed=1))
    foreign = SidMap.load(folder)
    tokenize(copied)
    foreign.save(folder)
    set_one_rank(monkeypatch)
    with nothing_changes_in(tmp_path):
        code, told = onetrain("train", copied)
    assert code == 3
    assert ours.fingerprint in told
    assert foreign.fingerprint in told
    assert not run_folder(copied).exists()


def test_a_layout_that_does_not_fit_is_told_before_anything_starts(tiny, tmp_path, monkeypatch):
    def start(config):
        raise AssertionError("workers were started")

    monkeypatch.setattr(supervised, "run_supervised", start)
    nowhere = changed(tiny, data__prepared=str(tmp_path / "prepared"))  # so that reading data would be another error
    with nothing_changes_in(tmp_path):
        code, told = onetrain("train", nowhere, "--workers", "33")
        assert code == 4
        assert "global_batch_size 32 is too small for 33 ranks: set it to 33" in told
        code, told = onetrain("train", changed(nowhere, parallel__precision="bf16"), "--workers", "2")
        assert (code, "parallel.zero_stage" in told) == (4, True)
        empty = changed(nowhere, parallel__micro_batch_size=0)
        code, told = onetrain("debug", empty)
        assert (code, "micro_batch_size 0 holds no sample" in told) == (4, True)
        set_one_rank(monkeypatch)
        code, told = onetrain("train", empty)
        assert (code, "micro_batch_size 0 holds no sample" in told) == (4, True)
        assert onetrain("train", nowhere)[0] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(tiny, tmp_path, monkeypatch):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        set_one_rank(monkeypatch, port)
        with nothing_changes_in(tmp_path):
            code, told = onetrain("train", tiny)
    assert code == 4
    assert f"127.0.0.1:{port}: the port is in use. Choose another MASTER_PORT" in told
    assert list(tmp_path.iterdir()) == []


def test_no_disk_space_to_prepare(tiny, tmp_path):
    folder = tmp_path / "disk"
    source = changed(tiny.data.source, simulator__users=3000, events=str(tmp_path / "logs"))
    config = changed(tiny, data__source=source, data__prepared=str(folder / "prepared"))
    assert onetrain("prepare", changed(config, data__prepared=str(tmp_path / "roomy")))[0] == 0
    size = sum(path.stat().st_size for path in (tmp_path / "logs").iterdir())
    for n_bytes in (size, 2 * size + 200_000):  # refused at once, and full on the way
        with small_disk(folder, n_bytes):
            code, told = onetrain("prepare", config)
            assert list(folder.iterdir()) == []
        folder.rmdir()
        assert code == 3
        assert str(folder) in told
        assert "free some space" in told.lower()


def test_no_disk_space_for_a_checkpoint(tiny, tmp_path):
    folder = tmp_path / "disk"
    config = changed(tiny, train__steps=4, train__checkpoint_every=2, evaluation__max_users=8)
    train(config)
    weight = sum(path.stat().st_size for path in checkpoint(config, 2).iterdir())
    with small_disk(folder, int(1.6 * weight)):  # one checkpoint, and half of another
        config = changed(config, storage_path=str(folder))
        code, told = onetrain("debug", config, "--steps", "4")
        run = changed(config, name="debug", storage_path=str(run_folder(config)))
        assert code == 4
        assert f"Cannot write checkpoint {checkpoint(run, 4)}" in told
        assert "Free space there" in told
        assert sorted(path.name for path in checkpoint(run, 2).parent.iterdir()) == ["step_00000002"]
        assert [record["step"] for record in records(run)] == [1, 2, 3, 4]

        # after making room, the run goes on from its last whole checkpoint
        subprocess.run(["mount", "-o", f"remount,size={8 * weight}", str(folder)], check=True)
        train(changed(run, train__log_every=1))
        assert checkpoint(run, 4).exists()
        assert [record["step"] for record in records(run)] == [1, 2, 3, 4]
