"""Which parameters decay, which learning rate each has, and its schedule as a pure function of the step."""

import math
from typing import Any

from torch import nn

from onetrain.model.moe import Experts
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.options import OptimizerOptions


def parameter_groups(
    model: nn.Module, options: OptimizerOptions, experts_group: str | None = None
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: every trainable parameter in exactly one, in the order of `named_parameters`.

    Weight decay is only for `matrices`. `vectors` are norms, biases and other parameters of one dimension; `embeddings`
    are those of nn.Embedding and parameters flagged as such (`parameter.is_embedding = True`); the latter have
    their own learning rate. Routed experts are `matrices` in a group of their own where ranks share them: DeepSpeed's
    process group `experts_group`. Each group keeps its peak learning rate as `peak_lr`.
    Raises ParallelError when nothing is trainable.
    """
    embedding_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for parameter in module.parameters(recurse=False)
    }
    expert_ids = {
        id(parameter) for module in model.modules() if isinstance(module, Experts) for parameter in module.parameters()
    }
    members: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "embeddings": [], "experts": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in expert_ids and experts_group is not None:
            members["experts"].append(parameter)
        elif id(parameter) in embedding_ids or getattr(parameter, "is_embedding", False):
            members["embeddings"].append(parameter)
        elif parameter.ndim <= 1 or name.endswith("bias"):
            members["vectors"].append(parameter)
        else:
            members["matrices"].append(parameter)
    peak_lr = dict.fromkeys(members, options.learning_rate)
    if options.embedding_learning_rate is not None:
        peak_lr["embeddings"] = options.embedding_learning_rate
    groups = [
        {
            "kind": kind,
            "params": parameters,
            "lr": peak_lr[kind],
            "peak_lr": peak_lr[kind],
            "weight_decay": options.weight_decay if kind in ("matrices", "experts") else 0.0,
            **({"moe": True, "name": experts_group} if kind == "experts" else {}),  # DeepSpeed's words
        }
        for kind, parameters in members.items()
        if parameters
    ]
    if not groups:
        raise ParallelError("The model has no trainable parameter: leave requires_grad on for at least one.")
    return groups


def learning_rate_factor(step: int, total_steps: int, options: OptimizerOptions) -> float:
    """Learning rate of `step` (counted from 0) over its peak.

    Rises linearly over `warmup_steps` (the last of them has the peak), then follows the schedule down to `final_ratio`
    at step `total_steps - 1`.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return 1.0
    progress = min(1.0, (step + 1 - options.warmup_steps) / max(1, total_steps - options.warmup_steps))
    remaining = 1.0 - progress if options.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return options.final_ratio + (1.0 - options.final_ratio) * remaining
