"""Blocks that recompute their activations: nothing changes but the memory."""

import copy
import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from checkpointing_cases import MODELS, SPARSE, loss_fn, new_model, random_batch, step, weight_fn

from onetrain.model.moe import routers
from onetrain.parallel import activation_checkpointing
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.optimizer_state import VALUE, gather
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks, all_reduce_max
from onetrain.parallel.testing import WorkerPool


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool


def calls_of_blocks(model: torch.nn.Module) -> list[int]:
    """Counts how often each block's FFN starts."""
    blocks = activation_checkpointing.model_blocks(model)
    calls = [0] * len(blocks)
    for index, block in enumerate(blocks):

        def count(*_: object, index: int = index) -> None:
            calls[index] += 1

        block.ffn.register_forward_pre_hook(count)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", ["all", (1,), (2, 0)])
@pytest.mark.parametrize("name", MODELS)
def test_loss_statistics_and_gradients_are_the_same_to_the_bit(name, blocks, dtype):
    plain, batch = new_model(MODELS[name], dtype), random_batch(0)
    recomputing = copy.deepcopy(plain)
    activation_checkpointing.apply(recomputing, blocks)
    calls = calls_of_blocks(recomputing)
    expected, expected_gradients = step(plain, batch)
    parts, gradients = step(recomputing, batch)
    wanted = range(len(calls)) if blocks == "all" else blocks
    assert calls == [2 if index in wanted else 1 for index in range(len(calls))]
    assert torch.equal(parts.loss, expected.loss)
    assert parts.stats.keys() == expected.stats.keys()
    assert all(torch.equal(parts.stats[key], stat) for key, stat in expected.stats.items())
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        assert torch.equal(gradients[key], gradient), key


def test_auxiliary_losses_reach_the_router_and_repeated_passes_leave_no_record():
    model, batch = new_model(SPARSE), random_batch(0)
    activation_checkpointing.apply(model, "all")
    parts = loss_fn(model.train(), batch)
    parts.loss.backward()
    assert all(router.record is None for router in routers(model))  # else it would keep a whole block's graph
    tokens = int((batch[1].weight_BT > 0).sum()) * 3
    assert parts.stats["expert_load"].sum((1, 2)).tolist() == [tokens * SPARSE.moe.top_k] * 2
    with_losses = [router.weight.grad.clone() for router in routers(model)]
    model.zero_grad()
    torch.manual_seed(1)
    predictions = model(*batch)
    predictions.routing.loss_R.sum().backward()  # alone: through the records only
    for router, gradient in zip(routers(model), with_losses, strict=True):
        assert router.weight.grad.any()
        assert not torch.equal(router.weight.grad, gradient)


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_activations_are_gone_between_the_passes_and_afterwards(name):
    """What the FFNs compute is alive during their own forward and backward only."""
    model, batch = new_model(MODELS[name]), random_batch(0)
    activation_checkpointing.apply(model, "all")
    alive: list[weakref.ref] = []
    for block in model.blocks:
        block.ffn_norm.register_forward_hook(lambda module, inputs, output: alive.append(weakref.ref(output)))
    loss = loss_fn(model.train(), batch).loss
    gc.collect()
    assert len(alive) == 3
    assert not any(reference() is not None for reference in alive)
    most = []
    for block in model.blocks:
        block.self_norm.register_forward_pre_hook(
            lambda *_: most.append(sum(reference() is not None for reference in alive))
        )
    loss.backward()
    assert len(alive) == 6
    assert max(most) <= 1  # the block before may go only when the next one's gradient is through
    assert not any(reference() is not None for reference in alive)


def test_a_copy_recomputes_with_its_own_weights():
    model, batch = new_model(MODELS["dense"]), random_batch(0)
    activation_checkpointing.apply(model, "all")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    plain = new_model(MODELS["dense"])
    expected, gradients = step(plain, batch)
    parts, own = step(other, batch)
    assert torch.equal(parts.loss, expected.loss)
    assert all(torch.equal(own[name], gradient) for name, gradient in gradients.items())


def test_nothing_is_recomputed_without_gradients():
    model, batch = new_model(MODELS["dense"]).eval(), random_batch(0)
    activation_checkpointing.apply(model, (0,))
    calls = calls_of_blocks(model)
    with torch.no_grad():
        model(*batch)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize(("name", "last"), [("dense", 2), ("encoder_decoder", 4), ("lifelong", 4)])
def test_blocks_that_are_not_there(name, last):
    model = new_model(MODELS[name])
    with pytest.raises(ParallelError, match=rf"names -1, 7; the model's blocks are 0 to {last} "):
        activation_checkpointing.apply(model, (1, -1, 7))
    activation_checkpointing.apply(model, "none")
    assert all("forward" not in vars(block) for block in activation_checkpointing.model_blocks(model))


def train(
    ranks: Ranks, name: str, stage: int, blocks: activation_checkpointing.Blocks, chunk: int | None
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor] | None]:
    """(loss, gradient norm) of three steps, and on rank 0 the final weights. Ranks have unequal numbers of targets."""
    model = new_model(MODELS[name])
    activation_checkpointing.apply(model, blocks)
    options = ParallelOptions(zero_stage=stage, global_batch_size=8, micro_batch_size=2)
    engine = Engine(model, options, OptimizerOptions(learning_rate=1e-2, warmup_steps=0), ranks, 10)
    history = []
    for number in range(3):
        torch.manual_seed(number)  # of dropout
        batches = [random_batch(100 * number + 10 * ranks.rank + part, 2, 3 - ranks.rank) for part in range(2)]
        own = max(int((targets.weight_BT > 0).sum()) for _, targets in batches)
        most = int(all_reduce_max(own, ranks))
        loss = lambda module, batch, most=most: loss_fn(module, batch, chunk, most)  # noqa: E731
        result = engine.train_step(batches, loss, weight_fn)
        history.append((result.loss, result.grad_norm))
    weights = gather(engine).get(VALUE)
    engine.close()
    return history, weights


@pytest.mark.parametrize(("name", "stage"), [("sparse", 1), ("sparse", 3)])
def test_two_ranks_under_zero_train_as_without(pool, name, stage):
    """Also with chunks of two targets: ranks of unequal batches gather the heads equally often."""
    (plain, weights), _ = pool.run(train, name, stage, "none", None)
    (recomputed, recomputed_weights), _ = pool.run(train, name, stage, "all", None)
    assert recomputed == plain
    assert weights is not None
    assert recomputed_weights is not None
    assert all(torch.equal(recomputed_weights[key], weight) for key, weight in weights.items())
    (chunked, _), _ = pool.run(train, name, stage, "all", 2)
    torch.testing.assert_close(torch.tensor(chunked), torch.tensor(plain), rtol=1e-5, atol=1e-7)
