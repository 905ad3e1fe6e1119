"""Batch plans, DeepSpeed configurations, parameter groups and learning rates: what needs no second rank."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import ADAMW, SmallModel
from torch import nn

from onetrain.parallel.deepspeed_config import check_options, deepspeed_config
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.param_groups import learning_rate_factor, parameter_groups


@given(world_size=st.integers(1, 64), micro=st.integers(1, 16), accumulation=st.integers(1, 8))
def test_plan_spreads_exactly_the_global_batch(world_size: int, micro: int, accumulation: int) -> None:
    options = ParallelOptions(global_batch_size=world_size * micro * accumulation, micro_batch_size=micro)
    mesh = Mesh.plan(world_size, options)
    assert (mesh.data_parallel, mesh.micro_batch_size, mesh.accumulation_steps) == (world_size, micro, accumulation)


@pytest.mark.parametrize(
    ("world_size", "batch", "micro", "expected"),
    [(4, 20, None, (5, 1)), (3, 256, None, (86, 1)), (3, 256, 32, (29, 3)), (2, 24, 5, (4, 3)), (2, 24, 99, (12, 1))],
)
def test_rows_of_a_micro_batch(world_size: int, batch: int, micro: int | None, expected: tuple[int, int]) -> None:
    mesh = Mesh.plan(world_size, ParallelOptions(global_batch_size=batch, micro_batch_size=micro))
    assert (mesh.micro_batch_size, mesh.accumulation_steps) == expected


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (8, {"global_batch_size": 4}, r"4 is too small for 8 ranks: set it to 8, or run with 4 ranks"),
        (2, {"global_batch_size": 24, "micro_batch_size": 0}, r"0 holds no sample: set it to 1"),
    ],
)
def test_plan_names_the_nearest_numbers_that_work(world_size: int, changes: dict, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        Mesh.plan(world_size, replace(ParallelOptions(), **changes))


def test_config_follows_our_options() -> None:
    options = ParallelOptions(
        zero_stage=2,
        precision="bf16",
        global_batch_size=24,
        micro_batch_size=3,
        gradient_clipping=0.5,
        offload_optimizer=True,
        deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "prescale_gradients": True},
    )
    config = deepspeed_config(options, check_options(options, world_size=2), n_parameters=101)
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 2 == 24
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"] == {"enabled": True}
    assert config["prescale_gradients"] is True
    zero = config["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"], zero["reduce_bucket_size"]) == (2, {"device": "cpu"}, 7)
    assert zero["allgather_bucket_size"] == 102
    assert options.deepspeed == {"zero_optimization": {"reduce_bucket_size": 7}, "prescale_gradients": True}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train_batch_size": 8}, r"train_batch_size cannot be overridden: it is set by parallel\.global_batch_size"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage cannot .* parallel\.zero_stage"),
        ({"bf16": {"enabled": True}}, r"bf16\.enabled cannot .* parallel\.precision"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"parallel\.offload_optimizer"),
        ({"optimizer": {"type": "Adam"}}, "it is set by the optimizer section"),
        ({"zero_optimisation": {}}, r"zero_optimisation is not a DeepSpeed key .* Did you mean zero_optimization\?"),
    ],
)
def test_overrides_that_we_own_or_nobody_knows_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(ParallelError, match=message):
        check_options(ParallelOptions(deepspeed=overrides), 1)


def test_offload_needs_partitioned_state() -> None:
    with pytest.raises(ParallelError, match=r"offload_optimizer needs .* set parallel\.zero_stage to 1"):
        check_options(ParallelOptions(offload_optimizer=True), 1)


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = SmallModel()
    model.tied = nn.Linear(10, 23, bias=False)
    model.tied.weight = model.words.weight
    model.experts_bias = nn.Parameter(torch.zeros(4, 5))
    model.out.weight.requires_grad_(False)
    groups = {group["kind"]: group for group in parameter_groups(model, ADAMW)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = {kind: [names[id(p)] for p in group["params"]] for kind, group in groups.items()}
    assert members == {
        "embeddings": ["position", "words.weight"],
        "vectors": ["experts_bias", "norm.weight", "norm.bias", "hidden.bias", "out.bias"],
        "matrices": ["hidden.weight"],
    }
    assert {kind: group["weight_decay"] for kind, group in groups.items()} == {
        "embeddings": 0.0,
        "vectors": 0.0,
        "matrices": ADAMW.weight_decay,
    }
    assert groups["embeddings"]["peak_lr"] == ADAMW.embedding_learning_rate
    assert groups["matrices"]["peak_lr"] == groups["vectors"]["peak_lr"] == ADAMW.learning_rate


def test_embeddings_share_the_learning_rate_unless_they_have_their_own() -> None:
    groups = parameter_groups(SmallModel(), replace(ADAMW, embedding_learning_rate=None))
    assert {group["peak_lr"] for group in groups} == {ADAMW.learning_rate}
    groups = parameter_groups(SmallModel(), replace(ADAMW, embedding_learning_rate=0.0))
    assert next(group for group in groups if group["kind"] == "embeddings")["peak_lr"] == 0.0


def test_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ParallelError, match="no trainable parameter"):
        parameter_groups(SmallModel().requires_grad_(False), ADAMW)


@given(
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 50),
    final=st.floats(0, 1),
)
def test_schedule_rises_to_its_peak_then_falls_to_its_final_ratio(
    schedule: str, total: int, warmup: int, final: float
) -> None:
    options = OptimizerOptions(schedule=schedule, warmup_steps=warmup, final_ratio=final)  # type: ignore[arg-type]
    factors = [learning_rate_factor(step, total, options) for step in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    rising, falling = factors[:warmup], factors[max(warmup - 1, 0) :]
    assert rising == [pytest.approx((step + 1) / warmup) for step in range(len(rising))]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(falling))
    if total > warmup:
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else final)
        assert learning_rate_factor(total + 10, total, options) == pytest.approx(factors[-1])
    if 0 < warmup <= total:
        assert factors[warmup - 1] == 1.0
