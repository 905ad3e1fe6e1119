"""A model of full attention becomes one of summary attention in three runs: distil, anneal, tune."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_cases import changed, checkpoint, records

from onetrain.data.options import PathwayOptions
from onetrain.launcher.config import check, load_config, run_folder
from onetrain.launcher.debug import debug
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.options import RunConfig
from onetrain.launcher.train import train
from onetrain.model.options import ConversionOptions, KSAOptions
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.process_group import VARIABLES

FULL = KSAOptions(width=16, heads=2, layers=("full", "full"), chunk=2, summaries=0, window=1, d_ff=32)
HYBRID = replace(FULL, layers=("ksa", "full"), summaries=1)
STEPS = 12
CONFIGS = Path(__file__).parents[2] / "configs" / "convert"
ANNEAL = ConversionOptions(stage="anneal", anneal_from=2, anneal_to=9)


@pytest.fixture(scope="module")
def stages(prepared_job, tmp_path_factory) -> Iterator[dict[str, RunConfig]]:
    """All runs of a conversion, done."""
    base = changed(
        prepared_job,
        storage_path=str(tmp_path_factory.mktemp("conversion") / "runs"),
        batch__pathways={"lifelong": PathwayOptions(length=10)},
        model__n_layers=1,
        model__position="none",
        model__init_std=0.1,
        parallel__micro_batch_size=16,
        train__log_every=1,
        train__steps=STEPS,
        evaluation__max_users=16,
    )
    runs = {"full": changed(base, name="full", model__ksa={"lifelong": FULL}, train__steps=8)}
    after = checkpoint(runs["full"], 8)
    for name, changes in {
        "distil": {"conversion": ConversionOptions(stage="distil")},
        "anneal": {"conversion": ANNEAL},
        "tune": {"model__ksa": {"lifelong": replace(HYBRID, blend=0.0)}},
    }.items():
        config = changed(base, name=name, model__ksa={"lifelong": HYBRID}, train__warm_start=str(after))
        runs[name] = changed(config, **changes)
        after = checkpoint(runs[name], STEPS)
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        for config in runs.values():
            check(config)
            train(config)
    return runs


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def weights(config, step=STEPS):
    return load_file(checkpoint(config, step) / "model.safetensors")


def is_of_summaries(name):
    return name.endswith("stack.summary.weight") or ".attention.summary." in name


def test_distillation_changes_the_summaries_alone_and_nears_the_teacher(stages):
    source, after = weights(stages["full"], 8), weights(stages["distil"])
    changed_names = {name for name in source if not torch.equal(source[name], after[name])}
    assert not changed_names
    new = {name for name in after if name not in source}
    assert len([name for name in new if is_of_summaries(name)]) == 1 + 2 * 3
    for name in new:
        if ".attention.summary." in name:
            text = source[name.replace(".summary.", ".text.")]
            assert not torch.equal(after[name], text)
            assert (after[name] - text).abs().max() < 0.1  # it began there
    log = records(stages["distil"])
    for key in ("conversion_kl", "conversion_mse"):
        values = [record[key] for record in log]
        assert min(values) > 0
        assert sum(values[-4:]) < sum(values[:4])
    first = log[0]
    parts = first["conversion_ce"] + 5 * first["conversion_kl"] + 5 * first["conversion_mse"]
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
    assert {record["conversion_blend"] for record in log} == {1.0}


def test_blend_falls_to_zero_and_everything_learns(stages):
    blends = [record["conversion_blend"] for record in records(stages["anneal"])]
    assert blends == pytest.approx([1, 1, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0, 0, 0], abs=1e-6)
    before, after = weights(stages["distil"]), weights(stages["anneal"])
    assert all(not torch.equal(before[name], after[name]) for name in before if not name.endswith(".blend"))
    assert {float(value) for name, value in after.items() if name.endswith(".blend")} == {0.0}


def test_tuning_starts_without_the_projections_where_annealing_ended(stages):
    assert not any(".attention.summary." in name or name.endswith(".blend") for name in weights(stages["tune"]))
    assert "conversion_blend" not in records(stages["tune"])[0]
    annealed = evaluate(stages["anneal"], "latest", "valid", max_requests=30).record["results"]["model"]
    start = changed(stages["tune"], name="start", optimizer__learning_rate=0.0, train__steps=1)
    train(start)
    assert evaluate(start, "latest", "valid", max_requests=30).record["results"]["model"] == annealed


def test_annealing_goes_on_bit_for_bit_and_is_validated_with_its_own_blend(stages, monkeypatch):
    halves = changed(stages["anneal"], name="halves")
    train(halves, stop_after=6)
    state = weights(halves, 6)
    assert [float(value) for name, value in state.items() if name.endswith(".blend")] == pytest.approx([4 / 7] * 2)
    monkeypatch.delenv("RANK", raising=False)
    logged = records(halves, "valid")[-1]
    measured = evaluate(halves, "latest", "valid", max_requests=16).record["results"]["model"]["all"]
    assert measured["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    train(halves)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = ((checkpoint(run, STEPS) / name).read_bytes() for run in (halves, stages["anneal"]))
        assert ours == theirs
    with pytest.raises(ConfigError, match=r"conversion.stage was anneal, now none"):
        train(changed(halves, conversion=ConversionOptions(), train__steps=STEPS + 1))


def test_summary_projections_in_use_are_not_dropped(stages):
    wrong = changed(stages["tune"], name="early", train__warm_start=str(checkpoint(stages["distil"], STEPS)))
    with pytest.raises(ParallelError, match=r"still uses its summary tokens' own projections.*blend is 1\)"):
        train(wrong)


def test_tuning_without_distilling_starts_from_full_attention(stages, capsys):
    direct = changed(
        stages["tune"], name="direct", train__warm_start=str(checkpoint(stages["full"], 8)), train__steps=1
    )
    train(direct)
    assert "summary embedding(s) as initialised" in capsys.readouterr().err
    back = changed(stages["full"], name="back", train__warm_start=str(checkpoint(direct, 1)), train__steps=1)
    with pytest.raises(ParallelError, match=r"stack\.summary\.weight is unexpected"):
        train(back)


def test_a_checkpoint_says_what_the_configuration_says(stages):
    """Projections that were annealed away are not taken up again, and the teacher had full attention."""
    annealed = str(checkpoint(stages["anneal"], STEPS))
    again = changed(stages["anneal"], name="again", train__warm_start=annealed)
    with pytest.raises(ParallelError, match=r"blend 0, and this model starts with 1: set the pathway's blend"):
        train(again)
    taught = changed(stages["distil"], name="taught", train__warm_start=annealed)
    with pytest.raises(ConfigError, match=r"learns from the network with full attention.* has the layers ksa, "):
        train(taught)


def test_debug_checks_the_gradients_of_what_learns(stages, capsys):
    debug(changed(stages["distil"], name="debugged"), steps=1, overfit=False)
    assert "gradient check: all 7 parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("distil", {"train__warm_start": None}, "conversion.stage: distil starts from a trained model"),
        ("distil", {"model__ksa": {}}, "needs a pathway with summary projections of its own"),
        ("distil", {"model__ksa": {"lifelong": FULL}}, "needs a pathway with summary projections of its own"),
        ("distil", {"model__ksa": {"lifelong": replace(HYBRID, blend=0.0)}}, "blend 1"),
        ("anneal", {"model__ksa": {"lifelong": replace(HYBRID, blend=0.5)}}, "given 0.5.*starts at 1"),
        ("distil", {"model__context_dropout": 0.1}, "model.context_dropout: given 0.1.*use 0"),
        ("distil", {"parallel__context_parallel": 2}, "parallel.context_parallel.*use 1"),
        ("distil", {"parallel__tensor_parallel": 2}, "parallel.tensor_parallel.*use 1"),
        ("anneal", {"train__steps": 9}, "conversion.anneal_to: given 9.*at most 8"),
        ("anneal", {"train__warm_start": None}, "conversion.stage: anneal starts from a trained model"),
    ],
)
def test_misuse_is_refused_before_anything_is_read(stages, stage, changes, message):
    config = changed(stages[stage], **changes)
    with pytest.raises(ConfigError, match=message):
        check(config)


def test_the_example_configurations_hold_together():
    for name, stage in {"full": "none", "distil": "distil", "anneal": "anneal", "tune": "none"}.items():
        config = load_config(CONFIGS / f"{name}.yaml")
        assert config.conversion.stage == stage
        before = {"distil": "full", "anneal": "distil", "tune": "anneal"}.get(name)
        if before is not None:
            source = load_config(CONFIGS / f"{before}.yaml")
            assert config.train.warm_start == str(run_folder(source) / "checkpoints" / f"step_{source.train.steps:08d}")
