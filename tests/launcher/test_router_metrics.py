"""Expert loads against counts of single choices, and when an alarm sounds."""

import math
import re
from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
import torch
from train_cases import changed, records, train_on

from onetrain.launcher.options import RunConfig
from onetrain.launcher.router_metrics import MOST_LAYERS, RouterMetrics
from onetrain.launcher.train import train
from onetrain.model.moe import Router, route
from onetrain.model.options import ModelOptions, MoEOptions
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions

EXPERTS, LEVELS, LAYERS, TOP_K = 7, 3, 4, 2
MOE = MoEOptions(experts=EXPERTS, top_k=TOP_K, first_dense=1)
MODEL = ModelOptions(d_model=16, n_layers=LAYERS, n_heads=2, moe=MOE)
CONFIG = RunConfig("job", model=MODEL)


def metrics_of(config: RunConfig = CONFIG, world_size: int = 1) -> RouterMetrics:
    mesh = Mesh.plan(world_size, config.parallel, config.model)
    sparse = sum(config.model.is_sparse(block) for block in range(config.model.n_layers))
    return RouterMetrics(config, mesh, [Router(config.model) for _ in range(sparse)])


def loads(tokens: float, dead: list[tuple[int, int]] = []) -> dict[str, torch.Tensor]:  # noqa: B006
    """Statistics of one step in which `tokens` tokens went to all experts alike, but for dead ones (of Z, of E)."""
    load_ZSE = torch.full((LAYERS - 1, LEVELS, EXPERTS), tokens / LEVELS * TOP_K / EXPERTS, dtype=torch.float64)
    for z, expert in dead:
        load_ZSE[z, :, expert] = 0
    return {"expert_load": load_ZSE, "router_entropy": torch.zeros(LAYERS - 1, dtype=torch.float64)}


def test_metrics_equal_counting_single_choices() -> None:
    """Two steps of random routing by the model's own router; choices are then counted one by one."""
    torch.manual_seed(0)
    metrics = metrics_of()
    chosen: list[list[tuple[int, int]]] = [[] for _ in range(LAYERS - 1)]  # (level, expert) of every choice
    entropy = [0.0] * (LAYERS - 1)
    for rows in (5, 8):
        step_loads, step_entropy = [], []
        for z in range(LAYERS - 1):
            logits_RSE = torch.randn(rows, LEVELS, EXPERTS) * 2
            logits_RSE[..., 3] -= 20  # never chosen
            bias_E = metrics.routers[z].e_score_correction_bias.uniform_(-0.1, 0.1)
            routing, record = route(logits_RSE, bias_E, MOE)
            step_loads.append(record.load_SE)
            step_entropy.append(record.entropy)
            for token, experts in enumerate(routing.expert_MK.tolist()):
                chosen[z] += [(token % LEVELS, expert) for expert in experts]
            for scores in logits_RSE.sigmoid().flatten(0, 1).tolist():
                entropy[z] -= sum(s / sum(scores) * math.log(s / sum(scores)) for s in scores)
        load, total = torch.stack(step_loads).double(), torch.stack(step_entropy).double()
        metrics.add({"expert_load": load, "router_entropy": total, "level_loss": torch.zeros(3)})
    report = metrics.report()

    tokens = 13 * LEVELS
    for z in range(LAYERS - 1):
        counts = Counter(expert for _, expert in chosen[z])
        over_ideal = [counts[expert] / (tokens * TOP_K / EXPERTS) for expert in range(EXPERTS)]
        of_layer = {name.split("/")[-1]: v for name, v in report.items() if name.startswith(f"experts/layer_0{z + 1}/")}
        bias = metrics.routers[z].e_score_correction_bias.tolist()
        expected = {
            "load_p50": median(over_ideal),
            "load_max": max(over_ideal),
            "dead": sum(counts[expert] == 0 for expert in range(EXPERTS)) / EXPERTS,
            "entropy": entropy[z] / tokens,
            "entropy_share": entropy[z] / tokens / math.log(EXPERTS),
            "bias_range": max(bias) - min(bias),
        }
        for level in range(LEVELS):
            of_level = Counter(expert for at, expert in chosen[z] if at == level)
            expected[f"load_max_level_{level}"] = max(of_level.values()) / (13 * TOP_K / EXPERTS)
        assert of_layer == pytest.approx(expected, rel=1e-5)
        assert of_layer["dead"] > 0
    assert not [name for name in report if "layer_00" in name]  # dense
    assert report["experts/load_max"] == max(report[f"experts/layer_0{layer}/load_max"] for layer in (1, 2, 3))
    assert "experts/all_to_all_mb_estimate" not in report
    assert metrics.report() == {}  # the next interval is empty


def test_bytes_exchanged_are_those_of_tokens_thrown_on_ranks() -> None:
    """Monte Carlo: tokens on random ranks, each of their choices away from home sent there and back, twice."""
    parallel = ParallelOptions(expert_parallel=3, precision="bf16", zero_stage=1, global_batch_size=6)
    metrics = metrics_of(replace(CONFIG, parallel=parallel), world_size=6)
    load_ZSE = torch.randint(
        0, 2000, (LAYERS - 1, LEVELS, EXPERTS), generator=torch.Generator().manual_seed(1)
    ).double()
    for _ in range(4):
        metrics.add({"expert_load": load_ZSE, "router_entropy": torch.zeros(LAYERS - 1)})
    generator = torch.Generator().manual_seed(2)
    sent = 0
    for load_E in load_ZSE.sum(1):
        expert = torch.repeat_interleave(torch.arange(EXPERTS), load_E.long())
        owner = expert // -(-EXPERTS // 3)  # the last rank holds padding too
        home = torch.randint(0, 3, expert.shape, generator=generator)
        sent += int((owner != home).sum())
    expected = sent * MODEL.d_model * 2 * 4 / 6 / 1e6
    assert metrics.report()["experts/all_to_all_mb_estimate"] == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("blocks", "passes"), [("none", 4), ("all", 6), ((0, 2), 4 + 2 / 3)])
def test_recomputed_blocks_exchange_once_more(blocks: str | tuple[int, ...], passes: float) -> None:
    parallel = ParallelOptions(expert_parallel=2, checkpoint_blocks=blocks, global_batch_size=2)  # type: ignore[arg-type]
    metrics = metrics_of(replace(CONFIG, parallel=parallel), world_size=2)
    metrics.add(loads(4200))
    choices = 4200 * TOP_K * (LAYERS - 1)
    expected = choices / 2 / 2 * MODEL.d_model * 4 * passes / 1e6
    assert metrics.report()["experts/all_to_all_mb_estimate"] == pytest.approx(expected)


def test_experts_that_die_are_named_once() -> None:
    metrics = metrics_of()

    def alarm(dead: list[tuple[int, int]], tokens: float = 3000) -> str | None:
        metrics.add(loads(tokens, dead))
        metrics.report()
        return metrics.alarm

    assert alarm([]) is None
    told = alarm([(0, 5), (2, 1), (2, 6)])
    assert told is not None
    assert "layer 1: 1 of 7 (5); layer 3: 2 of 7 (1, 6)" in told
    assert re.search(r"last 1 step\(s\), in which [\d,]+ tokens", told)
    assert alarm([(0, 5), (2, 1), (2, 6)]) is None  # the same
    assert alarm([(0, 5), (2, 1)]) is None  # one revived
    told = alarm([(0, 5), (1, 0), (2, 1)])
    assert told is not None
    assert "layer 2: 1 of 7 (0)" in told
    assert alarm([]) is None
    assert alarm([(0, 5)]) is not None  # died again


def test_few_tokens_raise_no_alarm() -> None:
    """Random routing of few tokens leaves experts out, which says nothing; a tenth of the ideal load is alive."""
    torch.manual_seed(3)
    metrics = metrics_of()
    left_out = 0
    for rows in (1, 2, 3, 5, 8, 13, 21):
        for _ in range(20):
            records = [route(torch.randn(rows, LEVELS, EXPERTS), torch.zeros(EXPERTS), MOE)[1] for _ in range(3)]
            load_ZSE = torch.stack([record.load_SE for record in records]).double()
            metrics.add({"expert_load": load_ZSE, "router_entropy": torch.zeros(3)})
            left_out += metrics.report()["experts/dead"] > 0
            assert metrics.alarm is None
    assert left_out > 20


def test_a_deep_model_has_metrics_of_some_layers_and_summaries_of_all() -> None:
    model = replace(MODEL, n_layers=61, moe=replace(MOE, first_dense=3))
    metrics = metrics_of(replace(CONFIG, model=model))
    load_ZSE = torch.ones(58, 1, EXPERTS, dtype=torch.float64)
    load_ZSE[29, 0, 2] = 36
    metrics.add({"expert_load": load_ZSE, "router_entropy": torch.ones(58)})
    report = metrics.report()
    layers = {name.split("/")[1] for name in report if "/layer_" in name}
    assert len(layers) == MOST_LAYERS
    assert {"layer_03", "layer_60"} <= layers
    assert report["experts/load_max"] == pytest.approx(36 / (42 / 7))
    assert len(report) < 100
    assert not [name for name in report if "level" in name]  # one position: not split


def test_no_tokens_no_metrics() -> None:
    metrics = metrics_of()
    assert metrics.report() == {}
    metrics.add(loads(0))
    assert metrics.report() == {}
    metrics.add({"level_loss": torch.zeros(3)})
    assert metrics.report() == {}


def test_training_logs_loads_and_warns_of_dead_experts(tiny, capsys, monkeypatch) -> None:
    """A router that a large bias keeps from one expert; the loads of a step count every token of the interval."""
    init = Router.__init__

    def skewed(router: Router, options: ModelOptions) -> None:
        init(router, options)
        router.e_score_correction_bias[2] = -1000

    monkeypatch.setattr(Router, "__init__", skewed)
    moe = MoEOptions(experts=5, first_dense=1, sequence_loss=0.01)
    config = changed(tiny, model__moe=moe, train__steps=20)
    train(config)
    found = records(config)
    assert [record["experts/layer_01/dead"] for record in found] == [0.2] * 4
    assert [record["experts/load_max"] >= 1.25 for record in found] == [True] * 4  # four experts share the load of five
    assert all(record["loss_router"] > 0 for record in found)
    output = capsys.readouterr().err
    assert output.count("experts without a single token") == 1
    assert "layer 1: 1 of 5 (2)" in output
    assert "expert load max" in output


@pytest.mark.slow
def test_two_ranks_log_what_one_does(tiny, two_ranks) -> None:
    """The counts are global: no rank's share, and no micro batch, is missing or counted twice."""
    config = changed(
        tiny, model__moe=MoEOptions(experts=5, first_dense=1), train__steps=10, optimizer__learning_rate=0.0
    )
    alone, both = changed(config, name="alone"), changed(config, name="both", parallel__expert_parallel=2)
    train(alone)
    train_on(two_ranks, both)
    for one, two in zip(records(alone), records(both), strict=True):
        names = [name for name in one if name.startswith("experts/")]
        assert len(names) > 10
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6)
        assert two["experts/all_to_all_mb_estimate"] > 0
