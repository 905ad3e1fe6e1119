"""What a run does with its checkpoints: damaged ones, other storage, retention, what state.json tells, failed saves."""

import errno
import json
import shutil
from dataclasses import asdict

import fsspec
import pytest
from safetensors.torch import load_file
from train_cases import changed, checkpoint, records, train_on

from onetrain.launcher.checkpoints import Best, find_checkpoint, load_best, run_store
from onetrain.launcher.config import run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.evaluator import SUBSETS, Evaluator, SubsetMetrics
from onetrain.launcher.train import _step_seed, train
from onetrain.model.options import MoEOptions
from onetrain.parallel import checkpoint_header
from onetrain.parallel.checkpoint_store import FolderStore, RemoteStore
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.param_groups import learning_rate_factor

FILES = ("model.safetensors", "optimizer.safetensors")


@pytest.fixture
def quick(tiny):
    return changed(tiny, train__steps=6, train__checkpoint_every=2, train__keep_last=9, evaluation__max_users=20)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:500])


DAMAGES = [
    (FILES[0], flip_a_bit, "does not match its checksum"),
    (FILES[1], cut, "has 500 bytes instead of"),
    ("state.json", cut, "state.json is damaged"),
    ("state.json", lambda path: path.unlink(), "Cannot read checkpoint"),
]


def test_a_damaged_newest_checkpoint_is_told_and_put_aside(quick, capsys):
    first, straight = (changed(quick, name=name) for name in ("first", "straight"))
    train(changed(first, train__steps=4))
    train(straight)
    for number, (name, damage, problem) in enumerate(DAMAGES):
        config = changed(quick, name=f"damaged{number}")
        shutil.copytree(run_folder(first), run_folder(config))
        damage(checkpoint(config, 4) / name)
        train(config)
        told = capsys.readouterr().err
        assert problem in told
        assert f"{checkpoint(config, 4)}.damaged now; going on from {checkpoint(config, 2)} instead" in told
        names = [path.name for path in sorted(checkpoint(config, 2).parent.iterdir())]
        assert names == ["step_00000002", "step_00000004", "step_00000004.damaged", "step_00000006"]
        for file in FILES:
            assert (checkpoint(straight, 6) / file).read_bytes() == (checkpoint(config, 6) / file).read_bytes()


def test_a_disk_that_cannot_be_read_is_damage_too(quick, monkeypatch, capsys):
    train(changed(quick, train__steps=4, train__evaluate_every=4))
    (run_folder(quick) / "best.json").write_text('{"step": 4, "met')
    hidden = checkpoint(quick, 2).parent / ".step_00000006.writing"
    hidden.mkdir()
    file_hash = checkpoint_header.file_hash

    def unreadable(path):
        if path.parent.name == "step_00000004":
            raise OSError(errno.EIO, "Input/output error")
        return file_hash(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_header, "file_hash", unreadable)
        train(changed(quick, train__steps=5))
    told = capsys.readouterr().err
    assert "Input/output error" in told
    assert f"going on from {checkpoint(quick, 2)} instead" in told
    assert "best.json cannot be read" in told
    assert not hidden.exists()
    assert load_best(run_folder(quick)).step == 5


def test_a_run_goes_on_while_best_json_cannot_be_written(quick, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Best, "save", full)
        train(changed(quick, train__evaluate_every=2))
    assert checkpoint(quick, 6).exists()
    assert "best.json cannot be written" in capsys.readouterr().err
    assert load_best(run_folder(quick)) is None


def test_a_run_never_begins_anew_for_want_of_a_whole_checkpoint(quick):
    train(changed(quick, train__steps=4))
    flip_a_bit(checkpoint(quick, 4) / FILES[0])
    cut(checkpoint(quick, 2) / FILES[1])
    for _ in range(2):
        with pytest.raises(ParallelError, match="No checkpoint of this run is whole") as caught:
            train(quick)
        assert "step_00000004 is damaged: model" in str(caught.value)
        assert "step_00000002 is damaged: optimizer" in str(caught.value)
    for step in (2, 4):  # as an earlier attempt may have left them
        shutil.move(checkpoint(quick, step), f"{checkpoint(quick, step)}.damaged")
    with pytest.raises(ParallelError, match=r"remove step_00000002\.damaged, step_00000004\.damaged"):
        train(quick)
    with pytest.raises(ConfigError, match=r"train\.resume is never"):
        train(changed(quick, train__resume="never"))


def test_another_configuration_is_no_damage(quick):
    train(changed(quick, train__steps=4))
    with pytest.raises(ConfigError, match=r"model\.position was"):
        train(changed(quick, model__position="recency"))
    assert sorted(path.name for path in checkpoint(quick, 2).parent.iterdir()) == ["step_00000002", "step_00000004"]


def test_some_stay_for_good(quick):
    train(changed(quick, train__steps=9, train__checkpoint_every=1, train__keep_last=1, train__keep_every=3))
    found = [path.name for path in sorted(checkpoint(quick, 3).parent.iterdir())]
    assert found == [f"step_{step:08d}" for step in (3, 6, 9)]


@pytest.mark.parametrize("beside", [True, False])
def test_the_best_is_named_once_its_checkpoint_is_there(tiny, beside, monkeypatch):
    values = iter([0.3, 0.1, 0.5, 0.2, 0.4])
    means = [{"recall@10": value} for value in values]
    monkeypatch.setattr(Evaluator, "run", lambda *_: {SUBSETS[0]: SubsetMetrics(1, means.pop(0))})
    commit = FolderStore.commit

    def refused_once(store, name):
        if name == "step_00000003":
            raise OSError(28, "No space left on device")
        commit(store, name)

    monkeypatch.setattr(FolderStore, "commit", refused_once)
    config = changed(tiny, train__steps=5, train__evaluate_every=1, train__async_checkpoints=beside)
    train(config)
    best = load_best(run_folder(config))
    assert (best.step, best.value) == (5, 0.4)  # never 3, which is not on the disk
    found = sorted(path.name for path in checkpoint(config, 1).parent.iterdir())
    assert found == ["step_00000004", "step_00000005"]


def test_a_run_whose_last_save_failed_is_no_success(quick, monkeypatch, capsys):
    commit = FolderStore.commit

    def refused(store, name):
        if name != "step_00000002":
            raise OSError(28, "No space left on device")
        commit(store, name)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "commit", refused)
        with pytest.raises(ParallelError, match=r"Cannot write checkpoint .*step_00000006.*No space left"):
            train(quick)
    assert "step_00000004: [Errno 28] No space left on device" in capsys.readouterr().err
    assert [record["step"] for record in records(quick)][-1] == 6
    assert [path.name for path in checkpoint(quick, 2).parent.iterdir()] == ["step_00000002"]
    train(quick)
    assert checkpoint(quick, 6).exists()


def test_state_json_tells_all_that_a_run_goes_on_from(tiny):
    config = changed(
        tiny, model__moe=MoEOptions(experts=4, bias_rate=0.01), train__steps=3, optimizer__schedule="cosine"
    )
    train(config)
    header = json.loads((checkpoint(config, 3) / "state.json").read_text())
    state, written = header["state"], header["written"]
    assert {"step", "cursor", "data_fingerprint", "sid_fingerprint", "order", "rng", "learning_rate"} <= state.keys()
    assert state["config"] == json.loads(json.dumps(asdict(config)))
    assert (state["step"], state["cursor"]["position"]) == (3, 3 * 32)
    assert state["rng"]["seed"] == config.seed
    assert "xxh3_64 of seed/step/data rank" in state["rng"]["dropout"]
    assert _step_seed(0, 0, 0) == 1158789928709931004
    rate = config.optimizer.learning_rate * learning_rate_factor(3, 3, config.optimizer)
    assert state["learning_rate"] == pytest.approx(rate)
    assert (written["world_size"], written["zero_stage"]) == (1, config.parallel.zero_stage)
    biases = {
        name: value for name, value in load_file(checkpoint(config, 3) / FILES[0]).items() if "correction" in name
    }
    assert len(biases) == 2  # one of each block
    assert all(value.any() for value in biases.values())


@pytest.fixture
def bucket():
    memory = fsspec.filesystem("memory")
    yield "memory://bucket/run"
    memory.store.clear()


def test_a_run_lives_in_other_storage(quick, bucket, tmp_path):
    config = changed(quick, train__evaluate_every=4, train__keep_last=1, stream__cache=str(tmp_path / "cache"))
    straight = changed(config, name="straight")
    train(straight)
    config = changed(config, train__checkpoint_path=bucket)
    train(config, stop_after=4)
    store = run_store(config)
    assert isinstance(store, RemoteStore)
    assert store.names() == ["step_00000004"]
    assert not (run_folder(config) / "checkpoints").exists()
    train(config)
    for name in FILES:
        assert (store.fetch("step_00000006") / name).read_bytes() == (checkpoint(straight, 6) / name).read_bytes()
    for which in ("best", "latest", f"{bucket}/step_00000006"):
        assert (find_checkpoint(run_folder(config), which, store) / FILES[0]).exists()
    tables = [evaluate(run, "latest", "test", max_requests=20).record["results"]["model"] for run in (straight, config)]
    assert tables[0] == tables[1]
    with pytest.raises(ConfigError, match="holds the checkpoints of the run job, and this one is other"):
        train(changed(config, name="other"))
    warm = changed(config, name="warm", train__checkpoint_path=None, train__steps=1)
    train(changed(warm, train__warm_start=f"{bucket}/step_00000006", optimizer__learning_rate=0))
    before, after = load_file(checkpoint(straight, 6) / FILES[0]), load_file(checkpoint(warm, 1) / FILES[0])
    assert all(before[name].equal(after[name]) for name in before)


def test_ranks_share_a_copy_and_fall_back_in_other_storage(quick, tmp_path, two_ranks):
    config = changed(quick, train__checkpoint_path=f"file://{tmp_path}/bucket", parallel__zero_stage=2)
    config = changed(config, stream__cache=str(tmp_path / "cache"))
    train_on(two_ranks, config, stop_after=4)
    flip_a_bit(tmp_path / "bucket" / "step_00000004" / FILES[1])
    train_on(two_ranks, config)
    assert run_store(config).names() == [f"step_{step:08d}" for step in (2, 4, 6)]
    train(changed(quick, name="straight"))
    assert records(config)[-1]["loss"] == pytest.approx(records(changed(quick, name="straight"))[-1]["loss"], rel=1e-5)
