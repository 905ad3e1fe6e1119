"""torch.compile of every block, from outside: names and parameters stay as they are.

Applied after activation checkpointing, so that what a block recomputes is compiled as well. Blocks with experts are
refused: torch 2.13 cannot trace grouped products of fp32, and the loads of a step are of another size every time.
"""

from torch import nn

from onetrain.model.moe import routers
from onetrain.parallel.activation_checkpointing import model_blocks
from onetrain.parallel.errors import ParallelError


def apply(model: nn.Module) -> None:
    """Compiles each block of `model` at its first forward pass. Raises ParallelError for a model with experts."""
    if routers(model):
        raise ParallelError(
            "parallel.compile works for dense blocks only, and the model has experts: set parallel.compile to false, "
            "or model.moe.experts to 0."
        )
    for block in model_blocks(model):
        block.compile()
