"""Everything that is done to a model from outside before DeepSpeed gets it, in its one order:

whole model -> tensor parallel -> activation checkpointing -> compile -> expert parallel and ZeRO, by DeepSpeed.

Context parallelism will follow tensor parallelism. The model itself knows nothing of any of it.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.moe import routers
from onetrain.model.options import ModelOptions
from onetrain.parallel import activation_checkpointing, expert_parallel, megatron_groups, tensor_parallel
from onetrain.parallel import compile as compilation
from onetrain.parallel.megatron_groups import ModelParallelUnit
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.placement import Placement


@dataclass
class Applied:
    """What became of a model on this rank."""

    placements: dict[str, Placement] = field(default_factory=dict)  # of parameters that are not their canonical ones
    unit: ModelParallelUnit | None = None  # the ranks that share layers
    experts_group: str | None = None  # DeepSpeed's name of the ranks that share experts
    deepspeed: dict[str, Any] = field(default_factory=dict)  # sections of its configuration
    biases: list[Tensor] = field(default_factory=list)  # of the routers, in fp32


def before_deepspeed(model: nn.Module, options: ParallelOptions, mesh: Mesh, timeout_s: float) -> Applied:
    """Changes `model`, in place. Raises ParallelError for what this model cannot have."""
    applied = Applied()
    model_options = getattr(model, "options", None)
    if mesh.tensor_parallel > 1:
        applied.unit = megatron_groups.start(mesh, timeout_s)
        placed = tensor_parallel.apply(model, applied.unit)
        applied.placements = {name: placement for name, placement in placed.items() if placement.dim is not None}
    if options.checkpoint_blocks != "none":
        activation_checkpointing.apply(model, options.checkpoint_blocks)
    if options.compile:
        compilation.apply(model)
    if mesh.expert_parallel > 1:
        assert isinstance(model_options, ModelOptions)  # as above
        expert_parallel.prepare(model, mesh.expert_parallel)
        applied.experts_group = expert_parallel.group_name(mesh.expert_parallel)
        applied.deepspeed["expert_parallel"] = expert_parallel.deepspeed_section(
            model_options.moe, mesh.expert_parallel
        )
    applied.biases = [router.e_score_correction_bias.clone() for router in routers(model)]
    return applied


def after_deepspeed(model: nn.Module, applied: Applied, timeout_s: float) -> None:
    """What can only follow `deepspeed.initialize`, which has replaced the sparse blocks and cast the buffers."""
    from deepspeed.utils import groups

    process_groups = [groups._get_data_parallel_group()]
    if applied.experts_group is not None:
        options = model.options
        assert isinstance(options, ModelOptions)
        expert_parallel.adopt(model, options.moe)
        applied.placements |= expert_parallel.placements(model, options.moe)
        process_groups += [groups._get_expert_parallel_group(applied.experts_group)]
        process_groups += [groups._get_expert_data_parallel_group(applied.experts_group)]
    for process_group in process_groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), process_group)
    for router, bias_E in zip(routers(model), applied.biases, strict=True):
        # fp32 also in a bf16 model, whose steps would swallow the bias's small ones
        experts, device = router.options.experts, router.e_score_correction_bias.device
        router.e_score_correction_bias = bias_E[:experts].to(device)
