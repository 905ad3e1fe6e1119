"""The whole model on one rank, made of the parts that ranks hold: what evaluation runs."""

import copy

import torch
import torch.distributed as dist
from torch import nn

from onetrain.parallel.engine import Engine
from onetrain.parallel.optimizer_state import VALUE, gather


def whole_model(engine: Engine, skeleton: nn.Module) -> nn.Module:
    """The canonical model in the precision that training computes in, on every rank; every rank takes part.

    `skeleton` is the model as it was built, its parameters on the meta device; it stays as it is.
    """
    full = gather(engine, (VALUE,))[VALUE]
    dtype = torch.bfloat16 if engine.options.precision == "bf16" else None
    memo = {id(p): _received(full.get(name), p, dtype, engine) for name, p in skeleton.named_parameters()}
    whole = copy.deepcopy(skeleton, memo)
    trained = dict(engine.module.named_buffers())
    for name, buffer in whole.named_buffers():
        if name in trained:
            buffer.copy_(trained[name])
    return whole.to(engine.ranks.device)


def _received(
    value: torch.Tensor | None, parameter: nn.Parameter, dtype: torch.dtype | None, engine: Engine
) -> nn.Parameter:
    """A parameter that rank 0 knows, on every rank."""
    data = torch.empty(parameter.shape, dtype=torch.float32, device=engine.ranks.device)
    if value is not None:
        data.copy_(value)
    if engine.ranks.world_size > 1:
        dist.broadcast(data, 0)
    return nn.Parameter(data.to(dtype or parameter.dtype), requires_grad=False)
