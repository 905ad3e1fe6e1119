"""Lifelong pathways in the launcher: aligned histories, lines of the log, the meter, and the configurations."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from train_cases import changed, records

from onetrain.data.cursor import Cursor
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.data.samples import SampleIndex
from onetrain.data.steps import BuildStats
from onetrain.data.stream import Step
from onetrain.launcher.config import load_config
from onetrain.launcher.debug import check_gradients
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.job import PreparedData, build_model, model_inputs
from onetrain.launcher.lifelong import aligned, check_kernels, events_per_chunk, stack_lines
from onetrain.launcher.meter import Meter
from onetrain.launcher.plan import make_plan
from onetrain.launcher.plan_tables import plan_tables
from onetrain.launcher.train import train
from onetrain.model.ksa.sizes import stack_work, total
from onetrain.model.options import KSAOptions, ModelOptions, Vocabulary
from onetrain.model.pathway import ALWAYS, NEVER
from onetrain.model.presets import STACKS
from onetrain.parallel.engine import StepResult
from onetrain.parallel.process_group import Ranks

LIFELONG = Path(__file__).parents[2] / "configs" / "lifelong"
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = KSAOptions(width=16, heads=2, layers=("ksa", "full"), chunk=3, window=1, d_ff=16)
ONE = Ranks(0, 1, 0, CPU, 60.0)


@pytest.fixture
def lifelong(tiny):
    """Two pathways, the long one of which is cut for most users."""
    pathways = {"recent": PathwayOptions(length=3), "long": PathwayOptions(length=8, skip=1)}
    return changed(tiny, batch__pathways=pathways, model__ksa={"long": SMALL}, train__steps=3, train__log_every=1)


def batch_of(config, count):
    data = PreparedData.open(config)
    index = SampleIndex(data.reader, "train", config.batch)
    return data, data.builder(config).build(index.rows(range(count)))


def test_histories_begin_at_whole_chunks_unless_told_otherwise(lifelong):
    def begins(config):
        data = PreparedData.open(config)
        index, pathway = SampleIndex(data.reader, "train", config.batch), data.builder(config).pathways["long"]
        rows = index.rows(range(len(index)))
        events = pathway.events(rows, rows.histories())
        begins = np.cumsum(events.length_B) - events.length_B
        return set(events.place_E[begins[events.length_B > 0]].tolist())

    assert {event % 3 for event in begins(lifelong)} == {0}
    assert len(begins(lifelong)) > 2
    told = changed(lifelong, batch__pathways={**lifelong.batch.pathways, "long": PathwayOptions(length=8, align=1)})
    assert {event % 3 for event in begins(told)} == {0, 1, 2}


@pytest.mark.parametrize(
    ("chunk", "flatten", "expected"), [(8, False, 8), (6, True, 2), (8, True, 8), (9, True, 3), (60, False, None)]
)
def test_the_align_of_a_pathway(chunk, flatten, expected):
    """Whole events of three codes where they are flattened; None where no chunk fits."""
    shape = {"architecture": "encoder_decoder", "encoder_layers": 1, "cross_attention": "projected_kv"}
    model = ModelOptions(**shape, flatten_codes=flatten, ksa={"history": KSAOptions(chunk=chunk)})
    batch = BatchOptions(max_context=50, pathways={"history": PathwayOptions(), "other": PathwayOptions()})
    assert aligned(batch, model, 3).pathways == {"history": PathwayOptions(align=expected), "other": PathwayOptions()}
    if expected is not None:
        assert events_per_chunk(model, "history", 3) == expected
        told = replace(batch, pathways={"history": PathwayOptions(align=2 * expected)})
        assert aligned(told, model, 3) == told


def test_a_run_says_what_reads_its_histories():
    vocabulary = Vocabulary((5, 5), {}, {"short": 9, "long": 1000})
    model = ModelOptions(ksa={"long": KSAOptions(window=10)})
    (line,) = stack_lines(model, vocabulary, CPU)
    assert "pathway long: 4 layers of summary attention over up to 1,000 events" in line
    assert "read as 88 states and 114 summaries; kernel: blocked PyTorch, for the device is cpu" in line
    assert "model.ksa.long.kernel auto" in line
    (line,) = stack_lines(model, vocabulary, GPU)
    assert "kernel: FlexAttention, for the device is cuda" in line
    named = replace(model, ksa={"long": KSAOptions(kernel="flex")}, features=("sid", "age"))
    first, second = stack_lines(named, vocabulary, CPU)
    assert "FlexAttention, which model.ksa.long.kernel names" in first
    assert "the feature age" in second
    assert list(stack_lines(ModelOptions(), vocabulary, CPU)) == []


@pytest.mark.parametrize("flatten", [False, True])
def test_the_meter_counts_what_the_decoder_reads_and_the_stack_does(lifelong, flatten):
    shape = {"architecture": "encoder_decoder", "encoder_layers": 1, "cross_attention": "projected_kv"}
    config = changed(lifelong, model=replace(lifelong.model, **shape, flatten_codes=True)) if flatten else lifelong
    data, batch = batch_of(config, 40)
    model = build_model(config, data).eval()
    context, targets = model_inputs(batch, CPU)
    index_BP = model.context(context).index_BP
    assert {ALWAYS, NEVER} <= set(index_BP.flatten().tolist())
    seen_BTP = (index_BP[:, None] < targets.end_BT[..., None]) & (targets.weight_BT > 0)[..., None]

    engine = SimpleNamespace(ranks=ONE, mesh=SimpleNamespace(replica_ranks=1), module=model)
    meter, counted = Meter(config, data.vocabulary(config), engine, lambda: 0.0), {}
    meter.flops = SimpleNamespace(training=lambda **counts: counted.update(counts) or 1.0)
    stats = BuildStats(batch.rows, sum(batch.n_events.values()), batch.n_bytes, 0.1, 0.0, 1.0, 0)
    meter.add(Step([batch, batch], Cursor(), 0.0, 0, stats), StepResult(1.0, 1.0, 1.0, 1.0, {}))
    meter.report()
    assert counted["target_positions"] == 2 * int(seen_BTP.sum())
    tokens = batch.sequences["long"].length_B * (3 if flatten else 1)
    assert counted["histories"] == {"long": total([stack_work(int(length), SMALL) for length in tokens]).times(2)}
    assert counted["events"] == {name: 2 * count for name, count in batch.n_events.items()}


def test_a_small_one_trains_and_goes_on_with_another_kernel(tiny, capfd):
    overrides = [
        f"storage_path={tiny.storage_path}",
        f"data.prepared={tiny.data.prepared}",
        "batch.target_behaviours=[]",
        "batch.pathways={recent: {length: 3}, lifelong: {length: 9, skip: 1}}",
        "model.ksa.lifelong={preset: 10k, width: 16, heads: 2, chunk: 2, window: 1}",
        "train.steps=3",
        "train.log_every=1",
        "evaluation.max_users=8",
        "tracking.wandb=disabled",
    ]
    config = load_config(LIFELONG / "10k.yaml", overrides)
    check_gradients(config)
    train(config, stop_after=2)
    said = "".join(capfd.readouterr())
    assert (
        "pathway lifelong: 4 layers of summary attention over up to 9 events, read as 3 states and 3 summaries" in said
    )
    ksa = replace(config.model.ksa["lifelong"], preset=None, kernel="blocked")
    assert train(changed(config, model__ksa={"lifelong": ksa}))["step"] == 3
    assert [record["step"] for record in records(config)] == [1, 2, 3]
    assert records(config)[-1]["model_gflops_per_s"] > 0


@pytest.mark.parametrize("name", STACKS)
def test_the_configuration_of_every_preset_has_a_plan(name):
    config = load_config(LIFELONG / f"{name}.yaml")
    assert config.model.ksa == {"lifelong": STACKS[name]}
    plan = make_plan(config)
    assert not plan.problems
    history = plan.histories["lifelong"]
    length = int(name.removesuffix("k")) * 1000
    assert history.events == plan.vocabulary.pathways["lifelong"] == length
    assert history.text_read + history.summaries_read == plan.positions - 51
    assert history.full_pairs == 4 * length * (length + 1) // 2
    assert plan.as_dict()["histories"]["lifelong"]["pairs"] == history.pairs
    table = next(table for table in plan_tables(plan) if "lifelong pathway" in table[0])
    assert table[1] == ["", "lifelong"]
    assert ["events", length] in table[2]


def test_a_window_that_holds_the_whole_history_is_told():
    plan = make_plan(load_config(LIFELONG / "2k.yaml", ["model.ksa.lifelong.window=250"]))
    notes = next(notes for title, _, _, notes in plan_tables(plan) if "lifelong pathway" in title)
    assert "lifelong: its window holds the whole history, so that no summary is ever read" in notes


def test_the_flops_of_full_histories_scale_nearly_with_their_length():
    ksa = {name: make_plan(load_config(LIFELONG / f"{name}.yaml")).flops_by_part["ksa"] for name in STACKS}
    assert 5 < ksa["10k"] / ksa["2k"] < 12
    assert 9 < ksa["100k"] / ksa["10k"] < 12


def test_a_kernel_that_cannot_train_here_is_refused_first():
    model = ModelOptions(ksa={"long": KSAOptions(kernel="flex")})
    check_kernels(model, GPU)
    with pytest.raises(ConfigError, match=r"model.ksa.long.kernel is flex, .* set it to auto"):
        check_kernels(model, CPU)


def test_histories_within_their_window_are_no_failed_gradient_check(lifelong, capfd):
    """Summary tokens that no history needs get no gradient, and the check says so."""
    wide = changed(lifelong, model__ksa={"long": replace(SMALL, window=100)})
    check_gradients(wide)
    assert "no history was longer than its window" in "".join(capfd.readouterr())
    check_gradients(lifelong)
    assert "no history was longer" not in "".join(capfd.readouterr())
