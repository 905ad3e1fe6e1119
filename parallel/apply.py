"""Everything that is done to a model from outside before DeepSpeed gets it, in its one order:

whole model -> tensor parallel -> context parallel -> activation checkpointing -> compile -> expert parallel and ZeRO,
by DeepSpeed. The model itself knows nothing of any of it.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from onetrain.model.decoder import SidDecoder
from onetrain.model.ksa.attention import attentions
from onetrain.model.moe import routers
from onetrain.parallel import (
    activation_checkpointing,
    context_parallel,
    expert_parallel,
    megatron_groups,
    tensor_parallel,
)
from onetrain.parallel import compile as compilation
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.megatron_groups import ModelParallelUnit
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.placement import Placement


@dataclass
class Applied:
    """What became of a model on this rank."""

    placements: dict[str, Placement] = field(default_factory=dict)  # of parameters that are not their canonical ones
    unit: ModelParallelUnit | None = None  # the ranks that share layers
    context_group: dist.ProcessGroup | None = None  # the ranks that share histories
    experts_group: str | None = None  # DeepSpeed's name of the ranks that share experts
    deepspeed: dict[str, Any] = field(default_factory=dict)  # sections of its configuration
    biases: list[Tensor] = field(default_factory=list)  # of the routers, in fp32
    blends: list[Tensor] = field(default_factory=list)  # of summary projections against the text's, in fp32


def before_deepspeed(model: nn.Module, options: ParallelOptions, mesh: Mesh, timeout_s: float) -> Applied:
    """Changes `model`, in place. Raises ParallelError for what this model cannot have."""
    applied = Applied()
    if mesh.context_parallel > 1:
        context_parallel.check(model)
    if mesh.tensor_parallel > 1 or mesh.expert_parallel > 1:
        _check_whole(decoder_of(model))
        _broadcast(model)
    if mesh.tensor_parallel > 1:
        applied.unit = megatron_groups.start(mesh, timeout_s)
        placed = tensor_parallel.apply(decoder_of(model), applied.unit)
        applied.placements = {name: placement for name, placement in placed.items() if placement.dim is not None}
    if mesh.context_parallel > 1:
        applied.context_group = context_parallel.start(mesh, timeout_s)
        context_parallel.apply(model, applied.context_group)
    if options.checkpoint_blocks != "none":
        activation_checkpointing.apply(model, options.checkpoint_blocks)
    if options.compile:
        compilation.apply(model)
    if mesh.expert_parallel > 1:
        expert_parallel.prepare(model, mesh.expert_parallel)
        applied.experts_group = expert_parallel.group_name(mesh.expert_parallel)
        section = expert_parallel.deepspeed_section(decoder_of(model).options.moe, mesh.expert_parallel)
        applied.deepspeed["expert_parallel"] = section
    applied.blends = [attention.blend.clone() for attention in attentions(model)]
    applied.biases = [router.e_score_correction_bias.clone() for router in routers(model)]
    return applied


def after_deepspeed(model: nn.Module, applied: Applied, timeout_s: float) -> None:
    """What can only follow `deepspeed.initialize`, which has replaced the sparse blocks and cast the buffers."""
    from deepspeed.utils import groups

    process_groups = [groups._get_data_parallel_group()]
    if applied.experts_group is not None:
        options = decoder_of(model).options.moe
        expert_parallel.adopt(model, options)
        applied.placements |= expert_parallel.placements(model, options)
        process_groups += [groups._get_expert_parallel_group(applied.experts_group)]
        process_groups += [groups._get_expert_data_parallel_group(applied.experts_group)]
    for process_group in process_groups:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), process_group)
    # what DeepSpeed rounds to bf16 with the weights, in fp32 again: a bias takes small steps, a blend is as configured
    for attention, blend in zip(attentions(model), applied.blends, strict=True):
        attention.blend = blend.to(attention.blend.device)
    for router, bias_E in zip(routers(model), applied.biases, strict=True):
        experts, device = router.options.experts, router.e_score_correction_bias.device
        router.e_score_correction_bias = bias_E[:experts].to(device)


def decoder_of(model: nn.Module) -> SidDecoder:
    """The model by its type. Raises ParallelError for one whose layers nobody knows how to share."""
    if not isinstance(model, SidDecoder):
        raise ParallelError(
            f"{type(model).__name__} is not one of onetrain's decoders, whose layers and experts ranks can share: set "
            "parallel.tensor_parallel and parallel.expert_parallel to 1."
        )
    return model


def _check_whole(model: SidDecoder) -> None:
    if not all(parameter.requires_grad for parameter in model.parameters()):
        raise ParallelError(
            "Frozen parameters cannot be shared over ranks: set parallel.expert_parallel and parallel.tensor_parallel "
            "to 1, or leave requires_grad on."
        )


def _broadcast(model: nn.Module) -> None:
    """Rank 0's weights and buffers on every rank, before they are cut; NCCL sends from a GPU only."""
    on_gpu = dist.get_backend() == "nccl"
    for tensor in (*model.parameters(), *model.buffers()):
        value = tensor.data.cuda() if on_gpu and not tensor.is_cuda else tensor.data.contiguous()
        dist.broadcast(value, 0)
        tensor.data.copy_(value)
