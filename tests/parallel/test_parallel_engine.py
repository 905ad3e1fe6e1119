"""The engine against a plain single-process torch loop, at every ZeRO stage and on one, two and four ranks."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from parallel_cases import (
    ADAMW,
    PARALLEL,
    SGD,
    TOTAL_STEPS,
    Batch,
    global_batch,
    loss_fn,
    new_model,
    share,
    train_plainly,
    weight_fn,
)

from onetrain.parallel.engine import Engine, LossParts, StepResult
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.optimizer_state import VALUE, gather
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import RankFailedError, WorkerPool, run_distributed

STEPS = 6


@pytest.fixture(scope="module")
def single() -> Iterator[WorkerPool]:
    with WorkerPool(1) as pool:
        yield pool


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def train(
    ranks: Ranks,
    cases: list[tuple[ParallelOptions, OptimizerOptions]],
    steps: int,
    cut: Callable[[Batch, int, int, int], list[Batch]] = share,
) -> list[tuple]:
    """Per case: (loss, gradient norm) of every step, and on rank 0 the final weights."""
    torch.use_deterministic_algorithms(True)
    results = []
    for parallel_options, optimizer_options in cases:
        engine = Engine(new_model(ranks.rank), parallel_options, optimizer_options, ranks, TOTAL_STEPS)
        history = []
        for step in range(steps):
            micro_batches = cut(global_batch(step), ranks.rank, ranks.world_size, engine.mesh.accumulation_steps)
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
def test_every_zero_stage_equals_a_plain_loop(world_size: int, single: WorkerPool, pool: WorkerPool) -> None:
    asked = cases(world_size, micro_batches=2)
    round_robin = {"zero_optimization": {"round_robin_gradients": True}}
    asked.append((replace(PARALLEL, zero_stage=2, micro_batch_size=8 // world_size, deepspeed=round_robin), ADAMW))
    results = (single if world_size == 1 else pool).run(train, asked, STEPS)[0]
    check_equal_to_plain(results, [options for _, options in asked])


def test_offloaded_optimizer_equals_a_plain_loop(pool: WorkerPool) -> None:
    asked = [(replace(case, offload_optimizer=True), options) for case, options in cases(2, 1) if case.zero_stage > 0]
    check_equal_to_plain(pool.run(train, asked, STEPS)[0], [options for _, options in asked])


@pytest.mark.slow
def test_four_ranks_of_which_two_are_empty_equal_a_plain_loop() -> None:
    asked = [case for case in cases(4, micro_batches=2) if case[1] is ADAMW]
    with WorkerPool(4, timeout_s=300) as four:
        check_equal_to_plain(four.run(train, asked, STEPS)[0], [options for _, options in asked])


def test_three_ranks_that_do_not_divide_the_batch_equal_a_plain_loop() -> None:
    """3, 3 and 2 rows; or 4, 2 and 2 in two micro batches each."""
    mixes = [(0, None, SGD), (0, 2, ADAMW), (1, 2, SGD), (2, None, SGD), (3, 2, SGD)]
    asked = [(replace(PARALLEL, zero_stage=stage, micro_batch_size=micro), of_mix) for stage, micro, of_mix in mixes]
    with WorkerPool(3) as three:
        check_equal_to_plain(three.run(train, asked, STEPS)[0], [optimizer for _, optimizer in asked])


def unlike_rows(batch: Batch, rank: int, world_size: int, micro_batches: int) -> list[Batch]:
    """Micro batches of 1 to 8 rows by chance; one that would have none has a row without weight."""
    g = torch.Generator().manual_seed(int(batch[0].sum()))
    cuts = torch.randint(len(batch[1]) + 1, (world_size * micro_batches - 1,), generator=g).sort().values
    parts = list(zip(*(tensor.tensor_split(cuts) for tensor in batch), strict=True))
    empty = (batch[0][:1], batch[1][:1], torch.zeros(1))
    return [part if len(part[1]) else empty for part in parts[rank * micro_batches : (rank + 1) * micro_batches]]


def test_micro_batches_of_unlike_rows_equal_a_plain_loop(pool: WorkerPool) -> None:
    parts = [part for step in range(STEPS) for rank in (0, 1) for part in unlike_rows(global_batch(step), rank, 2, 2)]
    assert len({len(label) for _, label, _ in parts}) > 3
    assert any(len(label) == 1 and not weight.any() for _, label, weight in parts)
    asked = cases(2, micro_batches=2)
    check_equal_to_plain(pool.run(train, asked, STEPS, unlike_rows)[0], [options for _, options in asked])


def test_bf16_stages_agree_and_follow_fp32(pool: WorkerPool) -> None:
    asked = [(replace(PARALLEL, zero_stage=stage, precision="bf16"), ADAMW) for stage in (1, 2, 3)]
    losses = torch.tensor([[loss for loss, _ in history] for history, _ in pool.run(train, asked, 12)[0]])
    expected = torch.tensor([loss for loss, _ in train_plainly(ADAMW, 12, PARALLEL.gradient_clipping)[0]])
    torch.testing.assert_close(losses[1:], losses[:1].expand(2, -1), rtol=5e-3, atol=0)
    torch.testing.assert_close(losses, expected.expand(3, -1), rtol=3e-2, atol=0)
    assert (losses != expected).any()  # it did run in bf16


def statistics(ranks: Ranks) -> list[StepResult]:
    engine = Engine(new_model(0), replace(PARALLEL, micro_batch_size=2), ADAMW, ranks, TOTAL_STEPS)
    steps = [share(global_batch(step), ranks.rank, ranks.world_size, 2) for step in range(2)]
    results = [engine.train_step(micro_batches, loss_fn, weight_fn) for micro_batches in steps]
    engine.close()
    return results


def test_step_result_sums_statistics_over_ranks_and_micro_batches(pool: WorkerPool) -> None:
    results = pool.run(statistics)
    module = new_model(0)
    for step, (first, second) in enumerate(zip(*results, strict=True)):
        assert first.loss == second.loss
        assert first.weight == pytest.approx(weight_fn(global_batch(step)))
        assert first.learning_rate == pytest.approx(ADAMW.learning_rate * (step + 1) / ADAMW.warmup_steps)
        for name, value in first.stats.items():
            torch.testing.assert_close(second.stats[name], value, rtol=0, atol=0)
    _, _, stats = loss_fn(module, global_batch(0))  # before the first update the model is the same
    for name, value in stats.items():
        torch.testing.assert_close(results[0][0].stats[name], value)


def unusual_batches(ranks: Ranks) -> list[tuple]:
    """Per stage: result of an empty global batch, and what a non-finite one does."""
    seen = []
    for stage in (0, 1, 2, 3):
        engine = Engine(new_model(0), replace(PARALLEL, zero_stage=stage), ADAMW, ranks, TOTAL_STEPS)
        words, label, weight = share(global_batch(0), ranks.rank, ranks.world_size, 1)[0]
        empty = engine.train_step([(words, label, torch.zeros_like(weight))], loss_fn, weight_fn)
        before = gather(engine).get(VALUE)
        bad = weight.clone()
        bad[0] = float("inf") if ranks.rank == 1 else bad[0]  # on one rank only

        def infinite_loss(module: torch.nn.Module, batch: Batch) -> LossParts:
            loss_sum, _, stats = loss_fn(module, batch)
            return loss_sum, torch.tensor(1.0), stats

        with pytest.raises(ParallelError, match=r"Step 1: the loss is (inf|nan)"):
            engine.train_step([(words, label, bad)], infinite_loss, lambda batch: 1.0)
        after = gather(engine).get(VALUE)
        unchanged = ranks.rank > 0 or all(torch.equal(before[name], after[name]) for name in before)
        finite = ranks.rank > 0 or all(value.isfinite().all() for value in before.values())
        seen.append((empty.loss, empty.weight, empty.grad_norm, finite, unchanged))
        engine.close()
    return seen


def test_empty_global_batch_is_no_nan_and_a_non_finite_loss_stops_every_rank(pool: WorkerPool) -> None:
    for rank in pool.run(unusual_batches):
        assert rank == [(0.0, 0.0, 0.0, True, True)] * 4


def exploding_gradient(ranks: Ranks) -> None:
    def finite_loss(module: torch.nn.Module, batch: Batch) -> LossParts:
        loss_sum, weight_sum, stats = loss_fn(module, batch)
        loss_sum.register_hook(lambda grad: grad * float("inf"))
        return loss_sum, weight_sum, stats

    for stage in (0, 1, 2, 3):
        engine = Engine(new_model(0), replace(PARALLEL, zero_stage=stage), SGD, ranks, TOTAL_STEPS)
        before = gather(engine).get(VALUE)
        with pytest.raises(ParallelError, match=r"Step 0: the gradient norm is (inf|nan)"):
            engine.train_step(share(global_batch(0), ranks.rank, ranks.world_size, 1), finite_loss, weight_fn)
        after = gather(engine).get(VALUE)
        if ranks.is_main:
            assert all(torch.equal(before[name], after[name]) for name in before)
        engine.close()


def test_non_finite_gradient_stops_every_rank_before_the_update(pool: WorkerPool) -> None:
    pool.run(exploding_gradient)


def wrong_use(ranks: Ranks) -> None:
    engine = Engine(new_model(0), PARALLEL, ADAMW, ranks, TOTAL_STEPS)
    batch = share(global_batch(0), ranks.rank, ranks.world_size, 1)[0]
    with pytest.raises(ParallelError, match="got 2 micro batches; it needs 1"):
        engine.train_step([batch, batch], loss_fn, weight_fn)
    with pytest.raises(ParallelError, match="loss_fn counted weight"):
        engine.train_step([batch], loss_fn, lambda batch: 2 * weight_fn(batch))
    with pytest.raises(ParallelError, match="does not depend on the parameters"):
        engine.train_step([batch], lambda module, batch: (torch.zeros(()), 1.0, {}), weight_fn)


def test_wrong_use_is_named(single: WorkerPool) -> None:
    single.run(wrong_use)


def evaluate_between_steps(ranks: Ranks) -> list[list[float]]:
    """Losses with and without an evaluation, in which ranks run different numbers of forwards, between the steps."""
    histories = []
    for evaluated in (False, True):
        engine = Engine(new_model(0), replace(PARALLEL, zero_stage=3), ADAMW, ranks, TOTAL_STEPS)
        history = []
        for step in range(4):
            micro_batches = share(global_batch(step), ranks.rank, ranks.world_size, 1)
            history.append(engine.train_step(micro_batches, loss_fn, weight_fn).loss)
            if evaluated:
                with engine.gathered() as module, torch.no_grad():
                    module.eval()
                    for _ in range(1 + ranks.rank):
                        logits = module(global_batch(step)[0])
                    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
                assert shapes == [tuple(parameter.shape) for parameter in new_model(0).parameters()]
                assert logits.shape == (8, 7)
        histories.append(history)
        engine.close()
    return histories


def test_gathered_evaluation_changes_no_later_loss(pool: WorkerPool) -> None:
    for without, with_evaluation in pool.run(evaluate_between_steps):
        assert without == with_evaluation


def fail_on_rank_one(ranks: Ranks) -> int:
    if ranks.rank == 1:
        raise KeyError("this rank fails")
    return ranks.rank


def test_pool_shows_the_failing_ranks_traceback_and_recovers(pool: WorkerPool) -> None:
    with pytest.raises(RankFailedError, match=r"(?s)Rank 1 of 2 failed.*fail_on_rank_one.*this rank fails"):
        pool.run(fail_on_rank_one)
    assert pool.run(get_rank) == [0, 1]


def get_rank(ranks: Ranks) -> int:
    return ranks.rank


def hang(ranks: Ranks) -> None:
    time.sleep(60 if ranks.rank == 1 else 0)


def test_pool_names_ranks_that_hang() -> None:
    with pytest.raises(RankFailedError, match=r"Ranks \[1\] of 2 gave no result in 5 s"):
        run_distributed(hang, 2, timeout_s=5)
