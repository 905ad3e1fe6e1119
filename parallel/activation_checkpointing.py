"""Activation checkpointing: chosen blocks keep only their inputs, and compute the rest again in the backward pass.

Applied from outside, and non-reentrant, so that collectives, hooks and gradients of tensors that leave a block by
another way than its result (the routers' auxiliary losses) stay right. Loss and gradients do not change by a bit.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from onetrain.model.ksa.stack import KSABlock
from onetrain.model.moe import routers
from onetrain.model.options import ModelOptions
from onetrain.parallel.errors import ParallelError

Blocks = Literal["none", "all"] | tuple[int, ...]


def apply(model: nn.Module, blocks: Blocks) -> None:
    """Makes the chosen blocks of `model` recompute their activations, dropout masks included.

    Raises ParallelError for a block that the model does not have.
    """
    everything = model_blocks(model)
    for index in chosen(blocks, len(everything)):
        block = everything[index]
        block.forward = MethodType(_forward, block)  # bound, so that a copy of the model has a copy of it


def chosen(blocks: Blocks, count: int) -> Sequence[int]:
    """Indices of the blocks that recompute, of `count`, in the order of `model_blocks`.

    Raises ParallelError for a block that is not there.
    """
    if isinstance(blocks, str):
        return range(count) if blocks == "all" else ()
    wrong = [index for index in blocks if not 0 <= index < count]
    if wrong:
        raise ParallelError(
            f"parallel.checkpoint_blocks names {', '.join(map(str, wrong))}; the model's blocks are 0 to {count - 1} "
            "(those of long-context pathways first, then the encoder's, then the decoder's)."
        )
    return sorted(set(blocks))


def blocks_before_decoder(options: ModelOptions) -> int:
    """The number of the decoder's first block, in the order of `model_blocks`."""
    return sum(len(ksa.layers) for ksa in options.ksa.values()) + options.encoder_layers


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model as its forward pass runs them: of summary attention, the encoder's, then the decoder's."""
    return [*(module for module in model.modules() if isinstance(module, KSABlock)), *dense_and_sparse_blocks(model)]


def dense_and_sparse_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the encoder, if there is one, then the decoder's."""
    encoder = getattr(model, "encoder", None)
    found = [*(encoder.blocks if isinstance(encoder, nn.Module) else ()), *model.blocks]  # type: ignore[misc]
    return [block for block in found if isinstance(block, nn.Module)]


def _forward(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    forward: Callable[..., Any] = partial(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    if routers(block):
        named["context_fn"] = partial(_contexts, block)  # torch.compile, which has dense blocks only, knows none
    return checkpoint(forward, *inputs, use_reentrant=False, **named)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward pass, and around the one that repeats it."""
    return nullcontext(), _unrecorded(block)


@contextmanager
def _unrecorded(block: nn.Module) -> Iterator[None]:
    """Routers keep the record of the forward pass: the repeated one's would hold the block's activations alive."""
    records = [(router, router.record) for router in routers(block)]
    try:
        yield
    finally:
        for router, record in records:
            router.record = record
