"""Training goes on where it stopped: bit for bit, from weights alone, or not at all."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_cases import changed, checkpoint, records, train_on

from onetrain.cluster.beacon import BEACON
from onetrain.data.manifest import Manifest
from onetrain.data.options import PathwayOptions, SplitOptions
from onetrain.data.prepare import prepare
from onetrain.data.sids import SidMap
from onetrain.launcher.checkpoints import find_checkpoint
from onetrain.launcher.config import run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluator import SUBSETS, Evaluator, SubsetMetrics
from onetrain.launcher.resume import check_model
from onetrain.launcher.tokenize import tokenize
from onetrain.launcher.train import _step_seed, train
from onetrain.model.options import MoEOptions
from onetrain.parallel.checkpoint import latest
from onetrain.parallel.engine import Engine

FILES = ("model.safetensors", "optimizer.safetensors")
MEASURED = ("loss", "grad_norm", "learning_rate", "accuracy_level_0", "padding")


@pytest.fixture
def dropping(tiny):
    """40 steps with both kinds of dropout."""
    config = changed(tiny, model__dropout=0.2, model__context_dropout=0.2, train__evaluate_every=20)
    return changed(config, parallel__micro_batch_size=16, evaluation__max_users=40)


def assert_same(straight, resumed):
    for name in FILES:
        assert (checkpoint(straight, 40) / name).read_bytes() == (checkpoint(resumed, 40) / name).read_bytes()
    for kind, steps, names in (("train", range(5, 41, 5), MEASURED), ("valid", (20, 40), ("recall@10", "loss"))):
        curves = [
            [(record["step"], *(record[name] for name in names)) for record in records(config, kind)]
            for config in (straight, resumed)
        ]
        assert curves[0] == curves[1]
        assert [step for step, *_ in curves[0]] == list(steps)


@pytest.mark.parametrize("stage", [0, 2])
def test_one_rank_that_is_stopped_or_interrupted_resumes_bit_for_bit(dropping, stage, monkeypatch):
    straight, halves, interrupted = (
        changed(dropping, name=name, parallel__zero_stage=stage) for name in ("straight", "halves", "interrupted")
    )
    train(straight)
    train(halves, stop_after=20)
    assert latest(checkpoint(halves, 20).parent) == checkpoint(halves, 20)
    train(halves)
    assert_same(straight, halves)

    train_step = Engine.train_step

    def stop_at_27(engine, *arguments):
        if engine.step == 27:
            raise KeyboardInterrupt
        return train_step(engine, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", stop_at_27)
        with pytest.raises(KeyboardInterrupt):
            train(interrupted)
    assert [record["step"] for record in records(interrupted)] == [5, 10, 15, 20, 25]
    train(interrupted)
    assert_same(straight, interrupted)
    assert train(interrupted) == {"step": 40}  # nothing left to do


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_resume_bit_for_bit(dropping, stage, two_ranks):
    straight, halves = (changed(dropping, name=name, parallel__zero_stage=stage) for name in ("straight", "halves"))
    train_on(two_ranks, straight)
    train_on(two_ranks, halves, stop_after=20)
    train_on(two_ranks, halves)
    assert_same(straight, halves)


def test_the_seed_of_a_step_is_the_same_in_every_process_and_version():
    assert _step_seed(0, 0, 0) == 1158789928709931004
    seeds = {_step_seed(seed, step, rank) for seed in (0, 1, 11) for step in (0, 1, 11) for rank in (0, 1, 11)}
    assert len(seeds) == 27


def test_warm_start_takes_the_weights_alone(tiny):
    train(changed(tiny, name="first", train__steps=10, optimizer__warmup_steps=0))
    source = checkpoint(changed(tiny, name="first"), 10)
    # a learning rate of 0 keeps the weights, and the moments of one step show that they began at 0
    warm = changed(tiny, name="warm", seed=5, train__steps=1, train__warm_start=str(source), optimizer__learning_rate=0)
    warm = changed(warm, optimizer__betas=(0.5, 0.75))
    train(warm)
    before, after = (load_file(folder / FILES[0]) for folder in (source, checkpoint(warm, 1)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    moments = load_file(checkpoint(warm, 1) / FILES[1])
    first = {name.removeprefix("exp_avg/"): value for name, value in moments.items() if name.startswith("exp_avg/")}
    assert sum(float(value.norm()) for value in first.values()) > 0
    for name, value in first.items():
        torch.testing.assert_close(moments[f"exp_avg_sq/{name}"], value * value, rtol=1e-4, atol=1e-20)
    state = json.loads((checkpoint(warm, 1) / "state.json").read_text())
    assert (state["step"], state["state"]["cursor"]["position"]) == (1, 32)
    assert [record["step"] for record in records(warm)] == [1]

    # the run has a checkpoint of its own now, which goes before the warm start
    train(changed(warm, train__steps=2, train__warm_start=str(source.parent / "gone")))
    assert latest(source.parent) == source
    assert checkpoint(warm, 2).exists()


@pytest.fixture
def two_steps(tiny):
    config = changed(tiny, train__steps=2)
    train(config)
    return config


def test_another_sid_map_is_refused_by_both_names(two_steps, tmp_path):
    shutil.copytree(two_steps.data.prepared, tmp_path / "other")
    other = changed(two_steps, data__prepared=str(tmp_path / "other"), seed=1)
    tokenize(other)
    maps = [SidMap.load(f"{config.data.prepared}/sids").fingerprint for config in (two_steps, other)]
    assert maps[0] != maps[1]
    warm = changed(other, name="warm", train__warm_start=str(checkpoint(two_steps, 2)))
    for config in (other, warm):
        with pytest.raises(ConfigError) as caught:
            train(config)
        for part in (*maps, str(checkpoint(two_steps, 2)), other.data.prepared):
            assert part in str(caught.value)
    assert not run_folder(warm).exists()
    assert [record["step"] for record in records(two_steps)] == [2]


def test_other_data_are_refused_by_both_names(two_steps, tmp_path):
    other = changed(two_steps, data__prepared=str(tmp_path / "other"), data__split=SplitOptions("global_time"))
    manifest, sids = prepare(other.data), SidMap.load(f"{two_steps.data.prepared}/sids")
    sids.save(f"{other.data.prepared}/sids")
    manifest.with_sid_fingerprint(sids.fingerprint).save(other.data.prepared)
    with pytest.raises(ConfigError) as caught:
        train(other)
    for part in (manifest.fingerprint, Manifest.load(two_steps.data.prepared).fingerprint, "warm_start"):
        assert part in str(caught.value)
    train(changed(other, name="warm", train__warm_start=str(checkpoint(two_steps, 2))))  # the same SIDs mean the same


def test_never_resume_refuses_an_earlier_run(two_steps):
    with pytest.raises(ConfigError, match=r"train\.resume is never"):
        train(changed(two_steps, train__resume="never"))
    assert [record["step"] for record in records(two_steps)] == [2]


def test_never_resume_is_meant_for_the_first_attempt_of_a_start(two_steps, monkeypatch):
    monkeypatch.setattr(BEACON, "first", False)
    assert train(changed(two_steps, train__steps=3, train__resume="never"))["step"] == 3


def test_a_validation_that_was_interrupted_is_made_up_for(tiny, monkeypatch):
    config = changed(tiny, train__steps=6, train__evaluate_every=4, train__log_every=2, evaluation__max_users=40)
    straight, interrupted = changed(config, name="straight"), changed(config, name="interrupted")
    train(straight)

    def interrupt(*_):
        raise KeyboardInterrupt

    for ends_at, expected in ((4, []), (6, [4])):  # one that was due, and the last
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "run", interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(interrupted)
        assert checkpoint(interrupted, ends_at).exists()
        assert [record["step"] for record in records(interrupted, "valid")] == expected
        if ends_at == 4:
            train(interrupted, stop_after=4)
            assert json.loads((run_folder(interrupted) / "best.json").read_text())["step"] == 4
    assert "valid_recall@10" in train(interrupted)  # no step is left to do
    curves = [[(r["step"], r["recall@10"], r["loss"]) for r in records(c, "valid")] for c in (straight, interrupted)]
    assert curves[0] == curves[1]
    assert [step for step, *_ in curves[0]] == [4, 6]
    assert train(interrupted) == {"step": 6}


def test_what_changed_is_told_on_resume(two_steps, capsys):
    train(changed(two_steps, train__steps=3, train__log_every=1))
    told = capsys.readouterr().err
    assert "resumed with train.log_every = 1; it was 5" in told
    assert "resumed with train.steps = 3; it was 2" in told

    # a key that this version no longer has
    path = run_folder(two_steps) / "config.yaml"
    path.write_text(path.read_text().replace("log_every:", "print_every:"))
    train(changed(two_steps, train__steps=4))
    assert "train.print_every: unknown key" in capsys.readouterr().err
    assert checkpoint(two_steps, 4).exists()


def test_the_best_checkpoint_and_the_newest_are_kept(tiny, monkeypatch):
    values = iter([0.1, 0.3, 0.2, 0.3, 0.25, 0.05])

    def scripted(evaluator, ranker, ranks, max_requests):
        value = next(values)
        return {SUBSETS[0]: SubsetMetrics(1, {"recall@10": value, "ndcg@5": value})}

    monkeypatch.setattr(Evaluator, "run", scripted)
    config = changed(tiny, train__steps=8, train__evaluate_every=2, train__checkpoint_every=1, train__keep_last=2)

    def kept():
        best = json.loads((run_folder(config) / "best.json").read_text())
        assert find_checkpoint(run_folder(config), "best") == checkpoint(config, best["step"])
        return best, sorted(path.name for path in checkpoint(config, 1).parent.iterdir())

    train(config)
    best = {"step": 4, "metric": "recall@10", "value": 0.3}
    assert kept() == (best, [f"step_{step:08d}" for step in (4, 7, 8)])
    train(changed(config, train__steps=10))
    assert kept() == (best, [f"step_{step:08d}" for step in (4, 9, 10)])
    assert find_checkpoint(run_folder(config), "latest") == checkpoint(config, 10)
    # values of different metrics do not compare
    train(changed(config, train__steps=12, evaluation__best_metric="ndcg@5"))
    best = {"step": 12, "metric": "ndcg@5", "value": 0.05}
    assert kept() == (best, [f"step_{step:08d}" for step in (11, 12)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__features": ("behaviour", "sid")}, "model.features was"),
        ({"model__position": "recency"}, "model.position was absolute, now recency"),
        ({"batch__pathways": {"history": PathwayOptions(length=5)}}, "batch.pathways was"),
    ],
)
def test_another_network_of_the_same_shapes_does_not_go_on(tiny, change, message):
    train(changed(tiny, train__steps=2))
    with pytest.raises(ConfigError, match=message):
        train(changed(tiny, train__steps=4, **change))
    train(changed(tiny, train__steps=4, model__dropout=0.1, model__init_std=0.5))


def test_how_experts_are_balanced_may_change_and_older_versions_go_on(tiny):
    """What the warning of dead experts advises; other keys of the experts make another network."""
    config = changed(tiny, model__moe=MoEOptions(experts=4))
    saved = json.loads(json.dumps(asdict(config)))
    for key, value in {"bias_rate": 0.1, "sequence_loss": 0.2, "z_loss": 0.3}.items():
        check_model(saved, changed(config, model__moe=MoEOptions(4, **{key: value})), Path("step"))
    for key in ("scale", "groups", "top_groups", "bias_rate", "sequence_loss", "z_loss"):
        del saved["model"]["moe"][key]  # as written before these were known
    check_model(saved, config, Path("step"))
    with pytest.raises(ConfigError, match=r"model.moe was .*'scale': 1.0.*, now .*'scale': 2.0"):
        check_model(saved, changed(config, model__moe=MoEOptions(4, scale=2.0)), Path("step"))
