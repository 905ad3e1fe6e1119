"""Memory of one rank while training: weights, gradients and optimizer state under ZeRO, activations, logits.

The state's formulas were held against the live tensors of DeepSpeed's engine on 2 and 4 ranks; a test repeats 2.

Legend: W ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from onetrain.launcher.options import RunConfig
from onetrain.model.activations import passing_bytes, saved_bytes
from onetrain.model.options import Vocabulary
from onetrain.model.parameter_counts import (
    expert_parameters,
    largest_parameter,
    parameter_counts,
    tensor_parallel_parameters,
)
from onetrain.parallel.activation_checkpointing import blocks_before_decoder, chosen
from onetrain.parallel.deepspeed_config import deepspeed_config
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.tensor_parallel import MIN_ROWS

FP32 = 4
GIB = 1024**3
MOMENTS = {"adamw": 2, "sgd": 0}
STATE = ("weights", "gradients", "fp32 master weights", "optimizer moments")
Variants = Iterator[tuple[str, RunConfig]]  # in words for --set


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank's device, and in its host's memory with an offloaded optimizer."""

    device: dict[str, float]
    host: float = 0.0

    @property
    def total(self) -> float:
        """Of the device, at the highest point: the end of the last forward pass."""
        return sum(self.device.values())


def element_bytes(options: ParallelOptions) -> int:
    """Of weights and hidden states."""
    return 2 if options.precision == "bf16" else FP32


def state_bytes(
    options: ParallelOptions, optimizer: OptimizerOptions, ranks: float, parameters: float, experts: float = 0
) -> RankMemory:
    """Weights, gradients, fp32 master weights and moments of one rank; without buckets and padding.

    `parameters` are those that the rank computes with, `experts` those of them that only every expert_parallel-th of
    the `ranks` data-parallel ranks has too. Stage 0 (fp32 only) has no masters apart from the weights. Stage 1 cuts
    masters and moments into as many pieces as ranks have the same parameters, stage 2 the gradients as well, stage 3
    everything. In bf16 gradients are accumulated in fp32; stage 1 keeps both whole.
    """
    stage, width = options.zero_stage, element_bytes(options)
    share = (parameters - experts + experts * options.expert_parallel) / ranks
    weights = width * (share if stage == 3 else parameters)
    gradients = FP32 * (share if stage >= 2 else parameters)
    if stage == 1 and options.precision == "bf16":
        gradients += width * parameters
    masters = 0.0 if stage == 0 else FP32 * share
    moments = MOMENTS[optimizer.name] * FP32 * (parameters if stage == 0 else share)
    device = {"weights": weights, "gradients": gradients}
    if options.offload_optimizer:
        return RankMemory(device, host=masters + moments + FP32 * share)  # and the gradients that the update reads
    return RankMemory({**device, "fp32 master weights": masters, "optimizer moments": moments})


def rank_memory(config: RunConfig, vocabulary: Vocabulary, on_cpu: bool = False) -> RankMemory:
    """Everything that a rank holds in one micro batch at full sequence length; `on_cpu` for the CPU's kernels.

    Raises ParallelError for a layout that cannot be.
    """
    options, model, workers = config.parallel, config.model, config.cluster.workers
    mesh, width = Mesh.plan(workers, options, model), element_bytes(options)
    total = parameter_counts(model, vocabulary).total
    experts = expert_parameters(model, options.expert_parallel) if options.expert_parallel > 1 else 0
    parameters: float = total - expert_parameters(model) + experts if experts else total
    if options.tensor_parallel > 1:
        parameters = tensor_parallel_parameters(model, vocabulary, options.tensor_parallel, MIN_ROWS)
    sharing = mesh.data_parallel * mesh.context_parallel  # ZeRO's ranks: those that hold the same parameters
    state = state_bytes(options, config.optimizer, sharing, parameters, experts)
    samples, per_sample = mesh.micro_batch_size, config.plan.targets_per_request
    recomputed = chosen(options.checkpoint_blocks, blocks_before_decoder(model) + model.n_layers)
    saved = saved_bytes(
        model,
        vocabulary,
        per_sample,
        width,
        micro_batch_targets=samples * per_sample,
        on_cpu=on_cpu,
        recomputed=recomputed,
        loss_in_chunks=options.loss_chunk is not None,
        tensor_parallel=options.tensor_parallel,
        context_parallel=options.context_parallel,
    )
    passing = passing_bytes(
        model,
        vocabulary,
        samples,
        per_sample,
        width,
        on_cpu,
        recomputed,
        options.loss_chunk,
        options.tensor_parallel,
        options.context_parallel,
    )
    device = {
        **state.device,
        "communication buckets": _buckets(config, vocabulary, total, parameters),
        "activations": samples * saved.total,
        "logits, gradients and recomputation in passing": passing,
        "reserve": config.plan.reserve_gib * GIB,
    }
    host = state.host
    if options.offload_optimizer and options.zero_stage < 3:  # there gradients are copied parameter by parameter
        largest = width * largest_parameter(model, vocabulary)
        device["communication buckets"] += largest
        host += largest
        if mesh.accumulation_steps > 1:
            host += width * parameters / sharing
    return RankMemory({name: size for name, size in device.items() if size}, host)


def _buckets(config: RunConfig, vocabulary: Vocabulary, total: int, parameters: float) -> float:
    options, width = config.parallel, element_bytes(config.parallel)
    if options.zero_stage == 0:
        return 0.0
    mesh = Mesh.plan(config.cluster.workers, options, config.model)
    zero = deepspeed_config(options, mesh, total)["zero_optimization"]
    if options.zero_stage < 3:
        return width * (zero["reduce_bucket_size"] + zero["allgather_bucket_size"])
    gathered = zero["stage3_prefetch_bucket_size"] + largest_parameter(config.model, vocabulary)
    return width * (zero["reduce_bucket_size"] + min(gathered, parameters))


def suggestions(config: RunConfig, vocabulary: Vocabulary) -> list[tuple[str, RankMemory]]:
    """Changes that fit, in words for --set, with the memory they need.

    The mildest of each kind: a higher ZeRO stage, recomputed blocks, a smaller micro batch, more workers; if no single
    one fits, a stage and a micro batch together. Empty when nothing does.
    """
    kinds = (_stages, _recomputation, _micro_batches, _workers)
    single = [_first_fitting(kind(config), vocabulary) for kind in kinds]
    found = [suggestion for suggestion in single if suggestion is not None]
    if not found:
        both = _first_fitting(_stages_and_micro_batches(config), vocabulary)
        found = [] if both is None else [both]
    return found


def _first_fitting(variants: Variants, vocabulary: Vocabulary) -> tuple[str, RankMemory] | None:
    for words, variant in variants:
        try:
            memory = rank_memory(variant, vocabulary)
        except ParallelError:  # for example an offloaded optimizer at a stage that has none
            continue
        if memory.total <= variant.plan.device_memory_gib * GIB:
            return words, memory
    return None


def _stages(config: RunConfig) -> Variants:
    for stage in (1, 2, 3):
        if stage > config.parallel.zero_stage:
            yield f"parallel.zero_stage={stage}", _with(config, zero_stage=stage)


def _recomputation(config: RunConfig) -> Variants:
    if config.parallel.checkpoint_blocks != "all":
        yield "parallel.checkpoint_blocks=all", _with(config, checkpoint_blocks="all")


def _micro_batches(config: RunConfig) -> Variants:
    mesh = Mesh.plan(config.cluster.workers, config.parallel)
    share = -(-mesh.global_batch_size // mesh.data_parallel)
    for size in range(mesh.micro_batch_size - 1, 0, -1):
        if share % size == 0:
            yield f"parallel.micro_batch_size={size}", _with(config, micro_batch_size=size)


def _stages_and_micro_batches(config: RunConfig) -> Variants:
    for stage_words, variant in _stages(config):
        for micro_words, smaller in _micro_batches(variant):
            yield f"{stage_words} and {micro_words}", smaller


def _workers(config: RunConfig) -> Variants:
    """More ranks at the same global batch, at ZeRO stage 3 if that is needed too."""
    workers = config.cluster.workers
    for stage in sorted({config.parallel.zero_stage, 3}):
        extra = "" if stage == config.parallel.zero_stage else f"parallel.zero_stage={stage} and "
        for count in (workers * 2**power for power in range(1, 11)):
            share = config.parallel.global_batch_size // count
            if share == 0:
                break
            micro = config.parallel.micro_batch_size
            fitting = None if micro is None else min(micro, share)
            variant = _with(config, zero_stage=stage, micro_batch_size=fitting)
            words = f"{extra}cluster.workers={count}"
            if fitting != micro:
                words += f" and parallel.micro_batch_size={fitting}"
            yield words, replace(variant, cluster=replace(config.cluster, workers=count))


def _with(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, **changes))  # type: ignore[arg-type]
