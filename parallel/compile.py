"""torch.compile of the blocks of decoder and encoder, from outside: names and parameters stay as they are.

Applied after activation checkpointing, so that what a block recomputes is compiled as well. Blocks with experts are
refused (support.py): torch 2.13 cannot trace grouped products of fp32, and loads are of another size at every step.
Blocks of summary attention run as they are: their lengths and work lists change with every batch.
"""

import torch._functorch.config
from torch import nn

from onetrain.parallel.activation_checkpointing import dense_and_sparse_blocks


def apply(model: nn.Module) -> None:
    """Compiles each of these blocks at its first forward pass."""
    # Keys and values leave a block as views; replaying how they were made reads freed sizes in torch 2.13 on CPU.
    torch._functorch.config.view_replay_for_aliased_outputs = False
    for block in dense_and_sparse_blocks(model):
        block.compile()
