"""megatron-core's process groups for a mesh whose ranks share layers, and the `mpu` by which DeepSpeed learns of them.

megatron-core is imported when the groups start: that takes seconds, and a run without tensor parallelism needs none.
"""

import sys
import warnings
from typing import Any

import torch.distributed as dist

from onetrain.parallel.mesh import Mesh


class ModelParallelUnit:
    """The `mpu` of `deepspeed.initialize`: which ranks hold parts of one model, and which hold the same part.

    DeepSpeed averages gradients and partitions its state over `data`, and adds the squares of partial gradients up over
    `tensor`. Ranks that share a history hold the same part of the model, so they count as data-parallel here.
    """

    def __init__(self, tensor: dist.ProcessGroup, data: dist.ProcessGroup) -> None:
        self.tensor, self.data = tensor, data
        self.get_tensor_model_parallel_group = self.get_model_parallel_group = lambda: tensor
        self.get_tensor_model_parallel_rank = self.get_model_parallel_rank = tensor.rank
        self.get_tensor_model_parallel_world_size = self.get_model_parallel_world_size = tensor.size
        self.get_tensor_model_parallel_src_rank = lambda: dist.get_global_rank(tensor, 0)
        self.get_data_parallel_group = lambda: data
        self.get_data_parallel_group_ranks = lambda: dist.get_process_group_ranks(data)
        self.get_data_parallel_rank = data.rank
        self.get_data_parallel_world_size = data.size


def start(mesh: Mesh, timeout_s: float) -> ModelParallelUnit:
    """Makes the groups of `mesh`; every rank takes part. Groups of an earlier mesh are left first.

    `timeout_s` bounds each of their collectives.
    """
    with warnings.catch_warnings():  # of GPU libraries that it can do without
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state

    stop()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor_parallel,
        context_parallel_size=mesh.context_parallel,
        distributed_timeout_minutes=timeout_s / 60,  # goes into a timedelta
        order="tp-cp-ep-dp-pp",  # tensor ranks are neighbours, as in Mesh
        create_gloo_process_groups=False,
    )
    return ModelParallelUnit(
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )


def stop() -> None:
    """Leaves the groups, if there are any, so that DeepSpeed knows of none and others can start."""
    parallel_state: Any = sys.modules.get("megatron.core.parallel_state")
    if parallel_state is not None:
        known = dist.distributed_c10d._world.pg_map
        for group in parallel_state._global_process_group_list or []:
            if group in known:  # None is the world, which is not ours
                dist.destroy_process_group(group)
        parallel_state.destroy_model_parallel()
    deepspeed_groups: Any = sys.modules.get("deepspeed.utils.groups")
    if deepspeed_groups is not None:
        deepspeed_groups.mpu = None
