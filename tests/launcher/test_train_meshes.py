"""A run goes on under another mesh: ranks share experts, histories or layers, then one holds all; nothing shows."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file
from train_cases import changed, checkpoint, records, train_on

from onetrain.launcher.evaluate import evaluate
from onetrain.launcher.train import train
from onetrain.model.options import KSAOptions, MoEOptions

STEPS = 15
SPARSE = MoEOptions(experts=5, top_k=2, shared=1, d_expert=32, first_dense=1, bias_rate=0.01, z_loss=0.01)
MESHES = {
    "experts": ({"moe": SPARSE}, {"parallel__expert_parallel": 2, "parallel__zero_stage": 2}),
    "histories": (
        {"ksa": {"history": KSAOptions(width=16, heads=2, layers=("ksa", "full"), chunk=2, window=1)}},
        {"parallel__context_parallel": 2, "parallel__zero_stage": 1},
    ),
    "layers": ({}, {"parallel__tensor_parallel": 2, "parallel__zero_stage": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_run_that_changes_its_mesh_is_the_same_run(tiny, name, two_ranks):
    """Losses and validations to 1e-5 and weights to 2e-4, as of any two orders of sums under AdamW.

    Two ranks with dropout off from step 0, one rank from step 5, two again from step 10; validated under each mesh.
    """
    model, mesh = MESHES[name]
    config = changed(tiny, model=replace(tiny.model, **model), train__steps=STEPS, train__evaluate_every=5)
    config = changed(config, parallel__micro_batch_size=16, evaluation__max_users=60)
    alone, moving = (changed(config, name=run) for run in ("alone", "moving"))
    train(alone)
    train_on(two_ranks, changed(moving, **mesh), stop_after=5)
    train(moving, stop_after=10)
    train_on(two_ranks, changed(moving, **mesh))
    for kind, keys in (("train", ("loss", "accuracy_level_0")), ("valid", ("loss", "recall@10"))):
        expected, found = records(alone, kind), records(moving, kind)
        assert [record["step"] for record in found] == [record["step"] for record in expected]
        for key in keys:
            assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], rel=1e-5)
    samples = {round(record["samples_per_s"] * record["step_s"], 3) for record in records(moving)}
    assert samples == {config.parallel.global_batch_size}  # counted once, however many ranks read them
    one, two = (load_file(checkpoint(run, STEPS) / "model.safetensors") for run in (alone, moving))
    assert {key: value.shape for key, value in one.items()} == {key: value.shape for key, value in two.items()}
    assert max(float((two[key] - value).abs().max()) for key, value in one.items()) < 2e-4
    tables = [evaluate(run, "latest", "test").record["results"]["model"]["all"] for run in (alone, moving)]
    assert tables[1]["loss"] == pytest.approx(tables[0]["loss"], rel=1e-4)
