"""Models cut over 2 and 4 ranks against the same models whole: losses, hits, every gradient, two steps of SGD."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

sys.path.append(str(Path(__file__).parents[1] / "model"))
from decoder_cases import VARIANTS, one_request_per_row, random_context, random_model, random_targets, variant

from onetrain.model.decoder import Criterion
from onetrain.model.loss import training_loss
from onetrain.model.options import MoEOptions
from onetrain.parallel import megatron_groups, tensor_parallel
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.placement import Placement
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

LEARNING_RATE = 0.05
# Everything is in float64 but the cross-entropy, which megatron-core calculates in float32 (epsilon 1.2e-7).
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


class Case(NamedTuple):
    name: str  # of a variant
    changes: dict
    chunk: int | None = None
    weight: bool = True  # whether any target counts


CASES = [Case(name, {"moe": MoEOptions()}) for name in VARIANTS] + [
    Case("gate_and_norm_shared_kv", {"g_kv": 1, "s_kv": 2}),
    Case("gate_and_norm_shared_kv", {"g_kv": 4, "gate_bias": 0.5, "l_kv": 2}),
    Case("onelive", {"g_kv": 1}),
    Case("onelive", {"g_kv": 4}, chunk=2),
    Case("mtp_shared_kv", {"scenario_head_bias": True}, chunk=3),
    Case("encoder_decoder", {"g_kv": 1, "qk_norm": True, "output_gate": True, "gate_bias": 1.0}),
    Case("onelive", {"scenario_head_bias": True}, weight=False),
]
ON_FOUR = [case for case in CASES if case.name in ("onelive", "encoder_decoder", "gate_and_norm_shared_kv")]
HEADS_OF_SIX = [  # three groups over two ranks: a rank's heads read one of them twice and one once
    Case("gate_and_norm_shared_kv", {"g_kv": 3, "n_heads": 6, "d_model": 12}),
    Case("onelive", {"g_kv": 3, "n_heads": 6, "d_model": 12}),
]


class Outcome(NamedTuple):
    loss: float
    stats: dict[str, Tensor]
    gradients: dict[str, Tensor]
    later_losses: list[float]
    weights: dict[str, Tensor]  # after the last step


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    with WorkerPool(4) as pool:
        yield pool


def build(case: Case, seed: int) -> nn.Module:
    options, vocab = variant(case.name, **case.changes)
    return random_model(options, vocab, seed)


def train(model: nn.Module, case: Case) -> Outcome:
    """Three forwards with a step of SGD after each."""
    options, vocab = model.options, model.vocabulary
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses, stats, gradients = [], {}, {}
    for step in range(3):
        targets = random_targets(vocab, 3, 2, step, one_request_per_row(options, vocab))
        if not case.weight:
            targets = replace(targets, weight_BT=torch.zeros_like(targets.weight_BT))
        parts = training_loss(model(random_context(vocab, 3, step), targets), options, case.chunk)
        optimizer.zero_grad()
        (parts.loss / 3).backward()
        if step == 0:
            gradients = {name: zero_if_none(parameter) for name, parameter in model.named_parameters()}
            stats = parts.stats
        optimizer.step()
        losses.append(float(parts.loss.detach()))
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Outcome(losses[0], stats, gradients, losses[1:], weights)


def zero_if_none(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def train_cut(ranks: Ranks, cases: list[Case], degree: int) -> list[tuple[Outcome, dict[str, Placement]]]:
    torch.use_deterministic_algorithms(True)
    mesh = Mesh.plan(ranks.world_size, ParallelOptions(tensor_parallel=degree, global_batch_size=4))
    unit = megatron_groups.start(mesh, timeout_s=60)
    results = []
    for case in cases:
        model = build(case, seed=0)
        placements = tensor_parallel.apply(model, unit, min_rows=4)
        assert placements.keys() == dict(model.named_parameters()).keys()
        outcome = train(model, case)
        results.append((outcome, placements))
    megatron_groups.stop()
    return results


def pasted(parts: list[dict[str, Tensor]], placements: list[dict[str, Placement]], like: Tensor, name: str) -> Tensor:
    """A whole tensor of the parts of all ranks; NaN where none of them has any."""
    full = torch.full_like(like, torch.nan)
    for part, placement in zip(parts, placements, strict=True):
        placement[name].paste(full, part[name])
    return full


def check_equal(
    case: Case, results: list[tuple[Outcome, dict[str, Placement]]], moved: dict[str, bool] | None = None
) -> set[str]:
    """Compares one case's results of a tensor-parallel group with the whole model; returns the names that are cut.

    Notes in `moved` which parameters have a gradient that is not zero.
    """
    outcomes, placements = [outcome for outcome, _ in results], [placement for _, placement in results]
    model = build(case, seed=0)
    assert isinstance(model.tokens.criterion, Criterion)
    expected = train(model, case)
    for outcome in outcomes:
        assert outcome.loss == pytest.approx(expected.loss, rel=1e-6)
        assert outcome.later_losses == pytest.approx(expected.later_losses, rel=1e-5)
        assert outcome.stats.keys() == expected.stats.keys()
        for name, value in expected.stats.items():
            assert_close(outcome.stats[name].double(), value.double(), **TOLERANCE)
    for name, gradient in expected.gradients.items():
        if moved is not None:
            moved[name] = moved.get(name, False) or bool(gradient.any())
        found = pasted([outcome.gradients for outcome in outcomes], placements, gradient, name)
        assert_close(found, gradient, **TOLERANCE, msg=lambda text, name=name: f"gradient of {name}: {text}")
        weight = pasted([outcome.weights for outcome in outcomes], placements, gradient, name)
        assert_close(weight, expected.weights[name], **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")
        if placements[0][name].dim is None:  # all alike, to the last bit, for ever
            assert all(torch.equal(outcome.weights[name], outcomes[0].weights[name]) for outcome in outcomes), name
    return {name for name, placement in placements[0].items() if placement.dim is not None}


@pytest.mark.slow
def test_every_form_equals_the_whole_model(two: WorkerPool) -> None:
    results = two.run(train_cut, CASES, 2)
    cut: set[str] = set()
    moved: dict[str, bool] = {}
    for number, case in enumerate(CASES):
        cut |= check_equal(case, [of_rank[number] for of_rank in results], moved)
    assert [name for name, has_gradient in moved.items() if not has_gradient] == []  # the comparison can fail for each
    kinds = ("qkv", "query", "key", "value", "out", "gate.score", "gate_up", "down", "heads.0", "head_biases.0")
    for kind in (*kinds, "code_embeddings.0", "sid_tables.0", "tables.item", "score.bias", "mtp.1.ffn.down"):
        assert any(kind in name for name in cut), kind


@pytest.mark.slow
def test_four_ranks_of_which_some_hold_no_code_or_share_groups(four: WorkerPool) -> None:
    results = four.run(train_cut, ON_FOUR, 4)
    for number, case in enumerate(ON_FOUR):
        check_equal(case, [of_rank[number] for of_rank in results])


def test_groups_that_do_not_fall_on_ranks(two: WorkerPool) -> None:
    results = two.run(train_cut, HEADS_OF_SIX, 2)
    for number, case in enumerate(HEADS_OF_SIX):
        check_equal(case, [of_rank[number] for of_rank in results])


def test_two_groups_of_two(four: WorkerPool) -> None:
    results = four.run(train_cut, CASES[:2], 2)
    for number, case in enumerate(CASES[:2]):
        for group in (results[:2], results[2:]):
            check_equal(case, [of_rank[number] for of_rank in group])


def ties(ranks: Ranks) -> list[tuple[list[float], list[bool]]]:
    """Losses and hits of the same logits at every dtype, of which this rank has half."""
    mesh = Mesh.plan(ranks.world_size, ParallelOptions(tensor_parallel=2, global_batch_size=2))
    unit = megatron_groups.start(mesh, timeout_s=60)
    from onetrain.parallel.megatron_layers import VocabParallelCriterion

    criterion, found = VocabParallelCriterion(unit.tensor), []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        own_MV = TIED_MV[:, 3 * ranks.rank : 3 * ranks.rank + 3].to(dtype)
        before_MV = own_MV.clone()
        loss_M, hit_M = criterion(own_MV, TIED_CODES_M)
        assert torch.equal(own_MV, before_MV)  # megatron-core's own function overwrites them
        found.append((loss_M.tolist(), hit_M.tolist()))
    megatron_groups.stop()
    return found


# the best logit twice on one rank, on both, on the second alone; of all codes; targets on either rank
TIED_MV = torch.tensor(
    [[2.0, 2, 1, 0, 0, 0], [0, 3, 1, 3, 0, 0], [0, 3, 1, 3, 0, 0], [0, 0, 0, 1, 4, 4], [0, 0, 0, 1, 4, 4], [1] * 6]
)
TIED_CODES_M = torch.tensor([1, 1, 3, 4, 5, 0])


def test_criterion_breaks_ties_as_argmax_does(two: WorkerPool) -> None:
    loss_M, hit_M = Criterion()(TIED_MV, TIED_CODES_M)
    assert hit_M.tolist() == [False, True, False, True, False, True]
    for of_rank in two.run(ties):
        for losses, hits in of_rank:
            assert losses == pytest.approx(loss_M.tolist(), rel=1e-6)
            assert hits == hit_M.tolist()
