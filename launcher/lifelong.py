"""What a job adds to the lifelong pathways of its model: where their histories begin, and what is said of them."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from onetrain.data.features import AGE
from onetrain.data.options import BatchOptions, PathwayOptions
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.features import feature_names
from onetrain.model.ksa.kernels import kernel_for
from onetrain.model.lifelong import read_counts
from onetrain.model.options import KSAOptions, ModelOptions, Vocabulary
from onetrain.model.parameter_counts import stacks

KERNELS = {"blocked": "blocked PyTorch", "flex": "FlexAttention"}


def aligned(batch: BatchOptions, model: ModelOptions, levels: int) -> BatchOptions:
    """Lifelong pathways that name no `align` begin at whole chunks: a history that is longer than its pathway keeps its
    chunks while it grows.
    """
    return replace(batch, pathways={name: _aligned(name, batch, model, levels) for name in batch.pathways})


def events_per_chunk(model: ModelOptions, pathway: str, levels: int) -> int:
    """The fewest events that whole chunks hold: a chunk is one of codes where they are flattened."""
    chunk = model.ksa[pathway].chunk
    return chunk // math.gcd(chunk, levels) if model.flatten_codes else chunk


def stack_lines(model: ModelOptions, vocabulary: Vocabulary, device: torch.device) -> Iterator[str]:
    """One line for every lifelong pathway: what it reads, and which kernel computes it and why."""
    per_event = vocabulary.levels if model.flatten_codes else 1
    for name, ksa in stacks(model, vocabulary).items():
        text, summaries = read_counts(vocabulary.pathways[name] * per_event, ksa)
        yield (
            f"pathway {name}: {len(ksa.layers)} layers of summary attention over up to {vocabulary.pathways[name]:,} "
            f"events, read as {text:,} states and {summaries:,} summaries; kernel: {_kernel(name, ksa, device)}"
        )
        if AGE in feature_names(model).events:
            yield (
                f"pathway {name}: the feature {AGE} of its events differs from request to request, so that a history "
                "cannot be kept and appended to; leave it out of model.features where that is wanted"
            )


def check_kernels(model: ModelOptions, device: torch.device) -> None:
    """Raises ConfigError for a kernel that cannot train on this device."""
    for name, ksa in model.ksa.items():
        if kernel_for(ksa.kernel, device) == "flex" and device.type != "cuda":
            raise ConfigError(
                f"model.ksa.{name}.kernel is flex, and FlexAttention has no backward pass on a {device.type}: set it "
                "to auto, or to blocked."
            )


def _aligned(name: str, batch: BatchOptions, model: ModelOptions, levels: int) -> PathwayOptions:
    options = batch.pathways[name]
    if options.align is not None or name not in model.ksa:
        return options
    step = events_per_chunk(model, name, levels)
    return replace(options, align=step) if step <= batch.pathway_lengths[name] else options


def _kernel(name: str, ksa: KSAOptions, device: torch.device) -> str:
    chosen = kernel_for(ksa.kernel, device)
    if ksa.kernel == "auto":
        return f"{KERNELS[chosen]}, for the device is {device.type} (model.ksa.{name}.kernel auto)"
    return f"{KERNELS[chosen]}, which model.ksa.{name}.kernel names"
