"""The formulas of a rank's optimizer state against what DeepSpeed's engine holds on two ranks."""

from dataclasses import replace

import pytest
from plan_memory_cases import bytes_per_parameter, saved_of_a_shared_history

from onetrain.launcher.options import RunConfig
from onetrain.launcher.plan_memory import rank_memory, state_bytes
from onetrain.model.activations import saved_bytes
from onetrain.model.options import KSAOptions, ModelOptions, MoEOptions, Vocabulary
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.testing import WorkerPool

SMALL_BUCKETS = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 1000,
        "allgather_bucket_size": 1000,
        "stage3_prefetch_bucket_size": 1000,
    }
}


@pytest.fixture(scope="module")
def pool():
    with WorkerPool(2, timeout_s=300) as pool:
        yield pool


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_two_ranks_hold_what_is_planned(pool, stage, precision):
    options = ParallelOptions(
        zero_stage=stage, precision=precision, global_batch_size=8, micro_batch_size=2, deepspeed=SMALL_BUCKETS
    )
    between, after_backward = pool.run(bytes_per_parameter, options, OptimizerOptions())[0]
    planned = state_bytes(options, OptimizerOptions(), ranks=2, parameters=1).device
    kept = planned["weights"] + planned["fp32 master weights"] + planned["optimizer moments"]
    assert kept - 0.01 <= between <= sum(planned.values()) * 1.01
    # fp32 stage 1: whole gradients while they are accumulated, of which the last backward pass leaves the rank's share
    lowest = kept + 2 if (stage, precision) == (1, "fp32") else 0.99 * sum(planned.values())
    assert lowest <= after_backward <= 1.01 * sum(planned.values()) + 0.7  # 0.7: the last bucket's large parameter


@pytest.mark.parametrize("layers", [("ksa", "ksa"), ("ksa", "full")])
def test_the_last_of_two_ranks_that_share_a_history_saves_what_is_planned(pool, layers):
    ksa = KSAOptions(width=32, heads=2, layers=layers, chunk=4, window=8)
    options = ModelOptions(d_model=8, n_heads=1, n_layers=1, embed_dim=4, ksa={"history": ksa})
    vocabulary = Vocabulary(codes=(9,), features={}, pathways={"history": 600})
    whole, shared = (
        saved_bytes(options, vocabulary, 0, 4, 1, on_cpu=True, context_parallel=ranks).parts for ranks in (1, 2)
    )
    found = pool.run(saved_of_a_shared_history, options, 600)
    assert max(found) == found[1]
    assert shared["ksa"] + shared["context"] == pytest.approx(found[1], rel=0.03)
    assert shared["ksa"] < 0.62 * whole["ksa"]


def test_eight_ranks_by_hand():
    """16 bytes a parameter in all: bf16 weight 2, fp32 gradient 4, master and two moments 12; stage 1 also 2 + 4."""
    adamw = OptimizerOptions()

    def total(stage, precision="bf16", **options):
        return sum(
            state_bytes(
                ParallelOptions(zero_stage=stage, precision=precision, **options), adamw, 8, 800
            ).device.values()
        )

    assert total(1) == 800 * (2 + 4 + 2) + 100 * 12
    assert total(2) == 800 * 2 + 100 * (4 + 12)
    assert total(3) == 100 * (2 + 4 + 12)
    assert total(0, "fp32") == 800 * 16
    assert total(2, offload_optimizer=True) == 800 * 2 + 100 * 4
    assert state_bytes(ParallelOptions(zero_stage=2, offload_optimizer=True), adamw, 8, 800).host == 100 * 16
    sgd = state_bytes(ParallelOptions(zero_stage=1, precision="bf16"), OptimizerOptions(name="sgd"), 8, 800)
    assert sgd.total == 800 * (2 + 4 + 2) + 100 * 4


def test_experts_are_cut_over_the_ranks_that_share_them():
    """4 ranks, 2 of which share 600 of 1000 parameters' worth of experts: a rank computes with 400 + 300."""
    adamw = OptimizerOptions()

    def total(stage):
        options = ParallelOptions(zero_stage=stage, expert_parallel=2)
        return state_bytes(options, adamw, 4, 700, experts=300).total

    assert total(0) == 700 * 16
    assert total(1) == 700 * 8 + (400 / 4 + 300 / 2) * 12
    assert total(2) == 700 * 4 + (400 / 4 + 300 / 2) * 16
    assert total(3) == (400 / 4 + 300 / 2) * 20


def test_rank_memory_follows_the_degrees_and_what_is_recomputed():
    moe = MoEOptions(experts=5, top_k=2, d_expert=64, first_dense=1)
    sparse = ModelOptions(d_model=64, n_layers=3, moe=moe)
    dense = ModelOptions(d_model=64, n_layers=3)
    vocabulary = Vocabulary(codes=(2048,) * 3, features={}, pathways={"history": 50})

    def memory(model, **parallel):
        config = RunConfig(name="x", model=model, parallel=ParallelOptions(global_batch_size=64, **parallel))
        return rank_memory(replace(config, cluster=replace(config.cluster, workers=4)), vocabulary).device

    of_experts = 2 * 5 * 3 * 64 * 64  # of which a rank of two holds 3 in 5, one of the six is padding
    saved = memory(sparse)["weights"] - memory(sparse, expert_parallel=2)["weights"]
    assert saved == 4 * of_experts * 2 / 5
    assert memory(dense, tensor_parallel=2)["weights"] < 0.6 * memory(dense)["weights"]
    plain = memory(dense)["activations"]
    one, every = (memory(dense, checkpoint_blocks=blocks)["activations"] for blocks in ((1,), "all"))
    assert plain - one == pytest.approx((plain - every) / 3)
    probabilities = 16 * 5 * 3 * 2048 * 4  # of 16 samples on a rank with 5 targets each
    chunked = memory(dense, loss_chunk=8)
    assert plain - chunked["activations"] == pytest.approx(probabilities, rel=0.05)
    long = ModelOptions(d_model=64, n_layers=1, ksa={"history": KSAOptions(width=64, chunk=4, window=2)})
    plain, shared, every = (
        memory(long, **parallel)["activations"]
        for parallel in ({}, {"context_parallel": 2}, {"checkpoint_blocks": "all"})
    )
    assert 0.5 * 2 * plain < shared < 0.75 * 2 * plain  # of twice the samples
    assert every < 0.3 * plain
    state = [memory(long, zero_stage=3, context_parallel=ranks)["optimizer moments"] for ranks in (1, 2)]
    assert state[0] == state[1]
    with pytest.raises(ParallelError, match="the model's blocks are 0 to 2"):
        memory(dense, checkpoint_blocks=(3,))
