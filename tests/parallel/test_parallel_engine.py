"""The engine against a plain single-process torch loop, at every ZeRO stage and on one, two and four ranks."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from parallel_cases import (
    ADAMW,
    PARALLEL,
    SGD,
    TOTAL_STEPS,
    global_batch,
    loss_fn,
    new_model,
    share,
    train_plainly,
    weight_fn,
)

from onetrain.parallel.checkpoint import load_weights
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.optimizer_state import VALUE, gather
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

STEPS = 6
_ = load_weights


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def train(ranks: Ranks, cases: list[tuple[ParallelOptions, OptimizerOptions]], steps: int) -> list[tuple]:
    """Per case: (loss, gradient norm) of every step, and on rank 0 the final weights."""
    torch.use_deterministic_algorithms(True)
    results = []
    for parallel_options, optimizer_options in cases:
        engine = Engine(new_model(ranks.rank), parallel_options, optimizer_options, ranks, TOTAL_STEPS)
        history = []
        for step in range(steps):
            micro_batches = share(global_batch(step), ranks.rank, ranks.world_size, engine.mesh.accumulation_steps)
            result = engine.train_step(micro_batches, loss_fn, weight_fn)
            history.append((result.loss, result.grad_norm))
        results.append((history, gather(engine).get(VALUE)))
        engine.close()
    return results


def cases(world_size: int, micro_batches: int) -> list[tuple[ParallelOptions, OptimizerOptions]]:
    micro = 8 // world_size // micro_batches
    return [
        (replace(PARALLEL, zero_stage=stage, micro_batch_size=micro), options)
        for stage in (0, 1, 2, 3)
        for options in (ADAMW, SGD)
    ]


def check_equal_to_plain(results: list[tuple], expected_of: list[OptimizerOptions]) -> None:
    for (history, weights), options in zip(results, expected_of, strict=True):
        expected, expected_weights = train_plainly(options, STEPS, PARALLEL.gradient_clipping)
        assert all(norm > 1.5 * PARALLEL.gradient_clipping for _, norm in expected)  # clipping is active
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=1e-7)
        for name, weight in expected_weights.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_zero_stage_equals_a_plain_loop(world_size: int, pool: WorkerPool) -> None:
    asked = cases(world_size, micro_batches=2)
    if world_size == 2:
        results = pool.run(train, asked, STEPS)[0]
    else:
        with WorkerPool(1) as single:
            results = single.run(train, asked, STEPS)[0]
    check_equal_to_plain(results, [options for _, options in asked])
