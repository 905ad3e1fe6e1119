"""A batch that is discarded leaves everything as if it had never been, whatever keeps the optimizer's state."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import golden
import pytest
import torch
from torch import Tensor, nn

from onetrain.model.moe import routers
from onetrain.parallel.engine import Engine, LossParts
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.optimizer_state import gather
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks, collectives
from onetrain.parallel.testing import WorkerPool

ONE = replace(golden.ONE, micro_batch_size=2)  # two micro batches a step on two ranks
MIXES = {
    **{f"ZeRO {stage}": replace(ONE, zero_stage=stage) for stage in range(4)},
    "ZeRO 3, small ones whole": replace(ONE, zero_stage=3, deepspeed={}),
    "ZeRO 1, bf16": replace(ONE, zero_stage=1, precision="bf16"),
    "ZeRO 1, bf16, experts": replace(ONE, zero_stage=1, precision="bf16", expert_parallel=2),
    "ZeRO 2, bf16": replace(ONE, zero_stage=2, precision="bf16"),
    "ZeRO 2, offload": replace(ONE, zero_stage=2, offload_optimizer=True),
    "ZeRO 1, experts": replace(ONE, zero_stage=1, expert_parallel=2),
    "ZeRO 0, experts": replace(ONE, zero_stage=0, expert_parallel=2),
}
STEPS = [0, 1, 2, 3]


def good(value: float) -> bool:
    return value < 1e6


def never(value: float) -> bool:
    return False


def bad_loss(module: nn.Module, batch: Any, ranks: Ranks, kind: str) -> LossParts:
    """On rank 0 alone the loss, or its gradient, is no number."""
    loss, weight, stats = golden.loss_fn(module, batch)
    if ranks.rank == 0 and kind == "loss":
        loss = loss * math.nan
    elif ranks.rank == 0 and kind == "gradient":
        loss.register_hook(lambda gradient: gradient * math.inf)
    return loss, weight, stats


def run(ranks: Ranks, parallel: ParallelOptions, troubles: dict[int, str]) -> dict[str, Tensor | list[Any]]:
    """All state on rank 0 after STEPS; before step n a batch is discarded for the reason troubles[n]."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    engine = Engine(golden.new_model(golden.MODELS["sparse"]), parallel, golden.OPTIMIZERS["AdamW"], ranks, len(STEPS))
    history: list[Any] = []
    for step in STEPS:
        if kind := troubles.get(step):
            batches = golden.share(golden.global_batch(100 + step), engine)
            loss = partial(bad_loss, ranks=ranks, kind=kind)
            accepts = never if kind == "refused" else good
            result = engine.train_step(batches, loss, golden.weight_fn, accepts, lambda: ranks.rank == 1)
            assert result.discarded == {"gradient": "gradient norm"}.get(kind, kind)
            assert result.flagged  # rank 1's, on both
            assert not math.isfinite(result.grad_norm)
        result = engine.train_step(golden.share(golden.global_batch(step), engine), golden.loss_fn, golden.weight_fn)
        assert (result.done, result.flagged) == (True, False)
        history.append((result.loss, result.grad_norm))
    assert engine.step == len(STEPS)
    state = {f"{kind} {name}": tensor for kind, tensors in gather(engine).items() for name, tensor in tensors.items()}
    biases = [router.e_score_correction_bias.clone() for router in routers(engine.module)]
    engine.close()
    return {**state, "biases": torch.stack(biases), "history": history}


def run_both(ranks: Ranks, parallel: ParallelOptions) -> list[dict[str, Tensor | list[Any]]]:
    return [run(ranks, parallel, troubles) for troubles in ({0: "loss", 1: "gradient", 3: "refused"}, {})]


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


@pytest.mark.parametrize("mix", MIXES)
def test_a_run_goes_on_as_if_a_discarded_batch_had_not_been(pool: WorkerPool, mix: str) -> None:
    (disturbed, straight), _ = pool.run(run_both, MIXES[mix])
    assert disturbed.keys() == straight.keys()
    assert sum(name.startswith("exp_avg ") for name in straight) > 5
    assert torch.any(straight["biases"] != 0)
    for name, value in straight.items():
        if isinstance(value, Tensor):
            assert torch.equal(disturbed[name], value), name
        else:
            assert disturbed[name] == value


def count(ranks: Ranks) -> tuple[dict[str, int], dict[str, int]]:
    before = collectives()
    torch.distributed.all_reduce(torch.ones(1))
    torch.distributed.all_reduce(torch.ones(1))
    return before, collectives()


def test_collectives_are_counted_by_process_group(pool: WorkerPool) -> None:
    for before, after in pool.run(count):
        assert {name: n - before[name] for name, n in after.items()} == {**dict.fromkeys(before, 0), "world": 2}


def test_the_check_for_numbers_cannot_be_switched_off() -> None:
    from onetrain.parallel.deepspeed_config import check_options

    options = replace(ONE, zero_stage=2, precision="bf16", deepspeed={"bf16": {"check_grad_overflow": False}})
    with pytest.raises(ParallelError, match=r"parallel\.deepspeed\.bf16\.check_grad_overflow cannot be overridden"):
        check_options(options, 1)
