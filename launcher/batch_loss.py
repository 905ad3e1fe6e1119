"""The loss of one micro batch, as the engine wants it."""

import torch
from torch import nn

from onetrain.data.batch import Batch
from onetrain.launcher.job import model_inputs
from onetrain.model.decoder import SidDecoder
from onetrain.model.ksa.conversion import distillation_loss
from onetrain.model.loss import LossParts, training_loss
from onetrain.model.options import ConversionOptions


def loss_of_batch(
    module: nn.Module,
    batch: Batch,
    device: torch.device,
    chunk: int | None = None,
    most_targets: int = 0,
    distil: ConversionOptions | None = None,
) -> LossParts:
    """Weighted loss sum, weight sum and weighted sums of statistics of one micro batch."""
    context, targets = model_inputs(batch, device)
    if distil is not None:
        return distillation_loss(as_decoder(module), context, targets, distil, chunk, most_targets)
    return training_loss(module(context, targets), as_decoder(module).options, chunk, most_targets)


def as_decoder(module: nn.Module) -> SidDecoder:
    """The engine's module by its type."""
    assert isinstance(module, SidDecoder)
    return module
