"""The formulas of a rank's optimizer state against what DeepSpeed's engine holds on two ranks."""

import pytest
from plan_memory_cases import bytes_per_parameter

from onetrain.launcher.plan_memory import state_bytes
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
    planned = state_bytes(options, OptimizerOptions(), world_size=2, parameters=1).device
    kept = planned["weights"] + planned["fp32 master weights"] + planned["optimizer moments"]
    assert kept - 0.01 <= between <= sum(planned.values()) * 1.01
    # fp32 stage 1: whole gradients while they are accumulated, of which the last backward pass leaves the rank's share
    lowest = kept + 2 if (stage, precision) == (1, "fp32") else 0.99 * sum(planned.values())
    assert lowest <= after_backward <= 1.01 * sum(planned.values()) + 0.7  # 0.7: the last bucket's large parameter


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
    assert state_bytes(ParallelOptions(zero_stage=2, offload_optimizer=True), adamw, 8, 800).host == 100 * 12
    sgd = state_bytes(ParallelOptions(zero_stage=1, precision="bf16"), OptimizerOptions(name="sgd"), 8, 800)
    assert sgd.total == 800 * (2 + 4 + 2) + 100 * 4
