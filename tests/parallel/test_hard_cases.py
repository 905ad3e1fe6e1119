"""Batches and routers that starve a rank or an expert, under every ZeRO stage on 2 and 4 ranks, against one process.

The pools' timeout ends a hang. Two steps of SGD with active clipping: losses, gradient norms, routing, and the weights
after both updates, which hold every gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from golden import (
    MODELS,
    ONE,
    OPTIMIZERS,
    ROWS,
    Batch,
    Trained,
    cut,
    global_batch,
    new_model,
    train,
)
from torch import Tensor

from onetrain.model.moe import routers
from onetrain.model.options import ModelOptions
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

AUXILIARY = MODELS["sparse + auxiliary"]
STEPS = 2
TIMEOUT_S = 240

# Biases of the 8 experts, which the routers start with. EP2: rank 0 holds experts 0 to 3, rank 1 the others.
ELSEWHERE = [-9.0] * 4 + [0.0] * 4  # rank 0's tokens all go to rank 1, and rank 0 gets none
STARVED = [-9.0, 0, 0, 0, 0, 0, -9, -9]  # experts without a token on both ranks
ONE_EXPERT = [0.0, 0, 0, 0, 0, 9, 0, 0]
BIASES: dict[str, list[float]] = {"elsewhere": ELSEWHERE, "starved": STARVED, "one expert": ONE_EXPERT}
# Rows (of 8) that keep their targets
TARGETS: dict[str, list[int]] = {
    "one rank without targets": [0, 1, 2, 3],
    "the first rank without targets": [4, 6],
    "one target in all": [7],
    "no target at all": [],
}
CASES = [*BIASES, *TARGETS, "uneven shapes"]


def options_of(case: str) -> ModelOptions:
    one = replace(AUXILIARY.moe, top_k=1, renormalise=False)  # else the router of one expert has no gradient
    return replace(AUXILIARY, moe=one) if case == "one expert" else AUXILIARY


def batch_of(case: str, step: int) -> Batch:
    context, targets = global_batch(0)
    weight_BT = 0.5 + torch.rand(targets.weight_BT.shape, generator=torch.Generator().manual_seed(step))
    if case in TARGETS:
        empty = [row for row in range(ROWS) if row not in TARGETS[case]]
        weight_BT[empty] = 0
    elif case == "uneven shapes":  # one rank has a single target and short histories, the other is full
        weight_BT[: ROWS // 2] = 0
        weight_BT[0, 0] = 1
        context.sequences["history"].length_B[: ROWS // 2] = torch.tensor([1, 0, 2, 0])
    return context, replace(targets, weight_BT=weight_BT)


def train_cases(ranks: Ranks, asked: list[tuple[str, ParallelOptions]]) -> list[Trained | None]:
    results = []
    for case, parallel in asked:
        model = new_model(options_of(case))
        for router in routers(model):
            router.e_score_correction_bias.copy_(torch.tensor(BIASES.get(case, [0.0] * 8)))
        results.append(train(ranks, model, parallel, OPTIMIZERS["SGD"], partial(batch_of, case), STEPS))
    return results


@pytest.fixture(scope="module")
def expected() -> Iterator[dict[str, Trained]]:
    """Of one process."""
    with WorkerPool(1) as pool:
        yield dict(zip(CASES, pool.run(train_cases, [(case, ONE) for case in CASES])[0], strict=True))


@pytest.fixture(scope="module")
def two() -> Iterator[WorkerPool]:
    with WorkerPool(2, timeout_s=TIMEOUT_S) as pool:
        yield pool


@pytest.fixture(scope="module")
def four() -> Iterator[WorkerPool]:
    with WorkerPool(4, timeout_s=TIMEOUT_S) as pool:
        yield pool


def check(pool: WorkerPool, expected: dict[str, Trained], asked: list[tuple[str, ParallelOptions]]) -> None:
    for (case, parallel), ours in zip(asked, pool.run(train_cases, asked)[0], strict=True):
        one = expected[case]
        told = f"{case}, ZeRO {parallel.zero_stage}: "
        close(torch.tensor(ours.history), torch.tensor(one.history), told, rtol=2e-6, atol=1e-9)
        assert ours.weights.keys() == one.weights.keys()
        for name, value in one.weights.items():
            close(ours.weights[name], value, f"{told}{name} ", rtol=0, atol=5e-7)
        for mine, theirs in zip(ours.expert_ZMK, one.expert_ZMK, strict=True):
            assert mine.equal(theirs), told


def close(ours: Tensor, theirs: Tensor, told: str, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text: told + text)


def test_the_cases_are_what_they_say(expected: dict[str, Trained]) -> None:
    """Of one process: where the tokens go, and that clipping is active wherever there is a gradient."""
    allowed: dict[str, Callable[[set[int]], bool]] = {
        "elsewhere": lambda experts: experts <= {4, 5, 6, 7},
        "starved": lambda experts: not experts & {0, 6, 7},
        "one expert": lambda experts: experts == {5},
        "no target at all": lambda experts: not experts,
    }
    for case, one in expected.items():
        for expert_ZMK in one.expert_ZMK:
            assert len(expert_ZMK) == 2
            for chosen in expert_ZMK:
                assert allowed.get(case, lambda experts: len(experts) > 2)(set(chosen.flatten().tolist())), case
        losses, norms = zip(*one.history, strict=True)
        if case == "no target at all":
            assert not any(losses + norms)
        else:
            assert min(norms) > 1.2 * ONE.gradient_clipping, case
    first, second = (cut(batch_of("uneven shapes", 0), slice(4 * n, 4 * n + 4)) for n in range(2))
    assert (first[1].weight_BT > 0).sum() == 1
    assert (second[1].weight_BT > 0).all()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks(stage: int, two: WorkerPool, expected: dict[str, Trained]) -> None:
    parallel = replace(ONE, expert_parallel=2, zero_stage=stage)
    check(two, expected, [(case, parallel) for case in CASES])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_four_ranks(stage: int, four: WorkerPool, expected: dict[str, Trained]) -> None:
    """Two pairs, and four ranks of two experts each."""
    degrees = (2, 4) if stage in (0, 3) else (2,)
    asked = [(case, replace(ONE, expert_parallel=degree, zero_stage=stage)) for degree in degrees for case in CASES]
    check(four, expected, asked)
