"""Our YAML as a DeepSpeed configuration; `parallel.deepspeed` may override what our own options do not own."""

import copy
import difflib
from typing import Any

from onetrain.model.options import ModelOptions
from onetrain.parallel.activation_checkpointing import blocks_before_decoder, chosen
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.support import check_mix

OWNED = {
    "train_batch_size": "parallel.global_batch_size",
    "train_micro_batch_size_per_gpu": "parallel.micro_batch_size",
    "gradient_accumulation_steps": "parallel.micro_batch_size",
    "managed_gradient_accumulation": "parallel.micro_batch_size",
    "gradient_clipping": "parallel.gradient_clipping",
    "gradient_allreduce_op": "nothing: the loss is normalised by the global sum of weights",
    "expert_parallel": "parallel.expert_parallel",
    "tensor_parallel": "parallel.tensor_parallel",
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.schedule",
    "fp16": "parallel.precision",
    "bf16.enabled": "parallel.precision",
    "bf16.check_grad_overflow": "nothing: an update that is not finite is never made",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer.device": "parallel.offload_optimizer",
}
OPEN = (
    "activation_checkpointing",
    "aio",
    "bf16",
    "comms_logger",
    "communication_data_type",
    "compile",
    "data_types",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "keep_in_fp32_modules",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "sparse_gradients",
    "steps_per_print",
    "timers",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)
MAX_BUCKET = 50_000_000  # elements of a reduction bucket; DeepSpeed's default of 5e8 allocates 2 GB for any model


def check_options(options: ParallelOptions, world_size: int, model: ModelOptions | None = None) -> Mesh:
    """The mesh of `world_size` ranks; builds nothing, so that it can come first. With `model` that is checked too.

    Raises ParallelError for options that do not go together, for degrees and a batch that do not fit, and for an
    override that is unknown or that another option owns.
    """
    check_mix(options, model)
    mesh = Mesh.plan(world_size, options, model)
    if model is not None:
        chosen(options.checkpoint_blocks, blocks_before_decoder(model) + model.n_layers)
    _check_overrides(options.deepspeed)
    return mesh


def deepspeed_config(options: ParallelOptions, mesh: Mesh, n_parameters: int) -> dict[str, Any]:
    """The dictionary for `deepspeed.initialize`, of options that `check_options` has found right.

    `n_parameters` bounds the communication buckets. The learning rate schedule and, at ZeRO stage 0, clipping are the
    engine's own.
    """
    bucket = min(MAX_BUCKET, n_parameters + n_parameters % 2)
    zero: dict[str, Any] = {
        "stage": options.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
    }
    config: dict[str, Any] = {
        # DeepSpeed counts steps by these and no samples; their product need not be the global batch
        "train_micro_batch_size_per_gpu": mesh.micro_batch_size,
        "gradient_accumulation_steps": mesh.accumulation_steps,
        "gradient_clipping": options.gradient_clipping if options.zero_stage > 0 else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own optimizers: nothing is compiled
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    if options.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if options.precision == "bf16":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merged(config, options.deepspeed)


def _check_overrides(overrides: dict[str, Any]) -> None:
    for key in overrides:
        if key not in OPEN and key not in OWNED:
            nearest = difflib.get_close_matches(key, [*OPEN, *OWNED], 1)
            hint = f" Did you mean {nearest[0]}?" if nearest else f" Known keys: {', '.join(OPEN)}."
            raise ParallelError(f"parallel.deepspeed.{key} is not a DeepSpeed key that can be set here.{hint}")
    for path, owner in OWNED.items():
        value: Any = overrides
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            raise ParallelError(f"parallel.deepspeed.{path} cannot be overridden: it is set by {owner}.")


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if nested else copy.deepcopy(value)
    return merged
