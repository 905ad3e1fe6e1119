"""`onetrain plan` on the papers' configurations, on prepared data, and on what does not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from onetrain.launcher.cli import app
from onetrain.launcher.config import load_config, save_config
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.job import PreparedData, build_model
from onetrain.launcher.plan import make_plan
from onetrain.launcher.plan_memory import GIB
from onetrain.model.presets import PRESETS

PAPERS = Path(__file__).parents[2] / "configs" / "paper"


def plan_of(name, *overrides):
    return make_plan(load_config(PAPERS / f"{name}.yaml", overrides, needs_data=False))


def onetrain(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


# OneRec-V2's Tables 2 (lazy rows), 3 and 4: overrides and printed GFLOPs
ROWS = [
    (["model.preset=onerec_v2_0.1b"], 1.98),
    (["model.preset=onerec_v2_0.5b"], 9.545),  # printed as 9.55
    ([], 18.89),
    (["model.s_kv=2"], 19.19),
    (["model.l_kv=3"], 19.49),
    (["model.l_kv=9"], 21.27),
    (["model.l_kv=18"], 23.95),
    (["model.g_kv=7"], 18.74),
    (["model.g_kv=2"], 18.64),
    (["model.g_kv=1"], 18.62),
]


@pytest.mark.parametrize(("overrides", "gflops"), ROWS)
def test_the_published_figure_stands_beside_the_honest_one(overrides, gflops):
    plan = plan_of("onerec_v2", *overrides)
    assert plan.positions == 512
    assert plan.paper.gflops == pytest.approx(gflops, abs=0.005)
    assert plan.training_flops / 1e9 == pytest.approx(
        gflops, rel=0.18
    )  # heads, and blocks that are not the nominal size
    assert plan.kv_elements * 512 / 5 == pytest.approx(plan.paper.kv_elements)
    assert not plan.problems


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan(name):
    plan = plan_of(name.split("_")[0] + ("_v2" if "v2" in name else ""), f"model.preset={name}")
    published = PRESETS[name]
    assert plan.preset == name
    assert plan.vocabulary.codes == published.codes
    assert plan.vocabulary.pathways == published.pathways
    assert plan.nominal_parameters == (published.active_parameters or published.nominal_parameters)
    assert sum(plan.flops_by_part.values()) == plan.forward_flops > 0
    assert plan.memory.total > 0


def test_onemall_table_6_with_its_assumptions():
    """Published 9.2 with Query-Formers and 34.4 without; ours by convention, as docs/plan.md says."""
    with_formers, without = [], []
    for targets in (1, 2):
        share = f"plan.targets_per_request={targets}"
        with_formers.append(plan_of("onemall", share))
        without.append(plan_of("onemall", share, "model.query_formers={}"))
    assert [plan.positions for plan in with_formers + without] == [160, 160, 1205, 1205]
    assert with_formers[0].forward_flops / 1e9 == pytest.approx(4.20, abs=0.005)
    assert without[0].forward_flops / 1e9 == pytest.approx(21.81, abs=0.005)
    assert with_formers[0].training_flops / 1e9 == pytest.approx(12.61, abs=0.005)
    assert without[0].training_flops / 1e9 == pytest.approx(65.42, abs=0.005)
    assert with_formers[1].training_flops / 1e9 == pytest.approx(7.88, abs=0.005)
    assert without[1].training_flops / 1e9 == pytest.approx(34.39, abs=0.005)


def test_changed_blocks_have_no_nominal_size():
    assert plan_of("onerec_v2", "model.n_layers=3").paper is None
    assert plan_of("onerec_v2", "model.preset_scale=0.1").paper is None
    assert plan_of("onerec_v2", "model.n_layers=3", "plan.nominal_parameters=1e8").paper.gflops < 3
    assert plan_of("onelive").paper is None  # the convention describes no projected keys


def test_a_context_that_is_half_full_costs_less():
    full, half = plan_of("onemall"), plan_of("onemall", "plan.context_fill=0.5")
    assert half.flops_by_part["context"] < full.flops_by_part["context"]
    assert half.flops_by_part["ffn"] == full.flops_by_part["ffn"]
    assert half.memory.total == full.memory.total  # padding takes memory


def test_prepared_data_give_the_real_sizes(tiny):
    plan = make_plan(tiny)
    data = PreparedData.open(tiny)
    model = build_model(tiny, data)
    assert plan.parameters.total == sum(parameter.numel() for parameter in model.parameters())
    assert plan.vocabulary.codes == data.sids.sizes
    assert plan.train_events == data.manifest.n_train_events
    assert plan.source.startswith("prepared data")


def test_without_prepared_data_the_configuration_gives_them(tiny, tmp_path):
    config = replace(tiny, data=replace(tiny.data, prepared=str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"plan.sizes: behaviour missing .*nowhere"):
        make_plan(config)
    plan = make_plan(replace(config, plan=replace(config.plan, sizes={"behaviour": 3})))
    assert plan.vocabulary.codes == config.tokenizer.codebook
    assert "tokenizer.codebook and plan.sizes" in plan.source
    assert plan.train_events is None


def test_planning_builds_no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a plan built a module")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    assert plan_of("onerec_v2", "model.preset=onerec_v2_8b").parameters.total > 8e9


def test_what_does_not_fit_comes_with_what_would():
    plan = plan_of("onerec_v2", "model.preset=onerec_v2_8b", "plan.device_memory_gib=40", "parallel.micro_batch_size=8")
    assert "a rank needs 74.0 GiB and has 40" in plan.problems[0]
    state = 8_018_823_655 * (2 + 2 + 4 + 12 / 8)  # bf16 weights and gradients, fp32 gradients; the rest in 8 pieces
    buckets = 2 * 50e6 * 2
    assert plan.memory.total == pytest.approx(state + buckets + 8 * plan.saved_bytes + 2 * GIB, rel=1e-3)
    kinds = [suggestion.partition("=")[0] for suggestion in plan.suggestions]
    assert kinds == ["parallel.zero_stage", "parallel.zero_stage"]  # alone, and with more workers
    for suggestion in plan.suggestions:
        words = suggestion.partition(":")[0].split(" and ")
        better = plan_of("onerec_v2", "model.preset=onerec_v2_8b", "plan.device_memory_gib=40", *_on_top(words))
        assert not better.problems
        assert f"{better.memory.total / GIB:.1f} GiB" in suggestion


def _on_top(words):
    named = any(word.startswith("parallel.micro_batch_size") for word in words)
    return words if named else ["parallel.micro_batch_size=8", *words]


def test_validations_that_do_not_fit_are_told():
    """Ranks that hold parts of the model make it whole to validate."""
    sparse = ("model.preset=onerec_v2_4b_a0.5b", "cluster.workers=8", "parallel.expert_parallel=8")
    sparse = (*sparse, "parallel.zero_stage=1", "parallel.precision=bf16", "parallel.micro_batch_size=8")
    plan = plan_of("onerec_v2", *sparse, "plan.device_memory_gib=16")
    assert plan.memory.total < 16 * GIB
    (problem,) = plan.problems
    assert "every rank makes the whole model beside its training state" in problem
    assert not plan_of("onerec_v2", *sparse, "plan.device_memory_gib=40").problems


def test_nothing_fits_on_a_tiny_device():
    plan = plan_of("onerec_v2", "model.preset=onerec_v2_8b", "plan.device_memory_gib=2.1")
    assert plan.suggestions == ()
    assert "no ZeRO stage, micro batch or number of workers" in plan.problems[0]


def test_a_layout_that_cannot_be_is_a_problem_and_the_rest_is_still_told():
    plan = plan_of("onerec_v2", "cluster.workers=1024")
    assert plan.mesh is None
    assert plan.memory is None
    assert "512 is too small for 1024 ranks" in plan.problems[0]
    assert plan.parameters.total > 1e9


def test_batches_add_up():
    plan = plan_of("onerec_v2", "cluster.workers=4", "parallel.micro_batch_size=32")
    assert (plan.mesh.global_batch_size, plan.mesh.accumulation_steps) == (512, 4)
    uneven = plan_of("onerec_v2", "cluster.workers=3", "parallel.micro_batch_size=32").mesh
    assert (uneven.micro_batch_size, uneven.accumulation_steps) == (29, 6)


def test_the_command_prints_tables_and_writes_json(tmp_path):
    file = tmp_path / "new" / "plan.json"
    result = onetrain(PAPERS / "onerec_v2.yaml", "--set", "model.preset=onerec_v2_8b", "--json", file)
    assert result.exit_code == 0, result.output
    for text in ("parameters of onerec_v2", "as built, and in OneRec-V2's convention", "147.4285", "does not fit"):
        assert text in result.output
    assert "warning: a rank needs" in result.output
    assert "this would fit: parallel.zero_stage=2" in result.output
    saved = json.loads(file.read_text())
    assert saved["parameters"]["total"] == 8_018_823_655
    assert saved["fits"] is False
    assert math.isclose(saved["memory"]["total"], sum(saved["memory"]["device"].values()))
    assert saved["paper"]["gflops"] == pytest.approx(147.43, abs=0.01)


def test_the_command_on_prepared_data_says_the_steps_of_a_pass(tiny, tmp_path):
    path = tmp_path / "job.yaml"
    save_config(tiny, path)
    result = onetrain(path)
    assert result.exit_code == 0, result.output
    assert "steps per pass over the training events" in result.output


def test_a_missing_size_ends_with_the_configuration_error(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("name: job\nmodel: {features: [sid, shop]}\n")
    result = onetrain(path)
    assert result.exit_code == 2
    assert "plan.sizes: shop missing (no prepared data named)" in result.output
    assert onetrain(path, "--set", "plan.sizes.shop=10").exit_code == 0
