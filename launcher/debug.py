"""`onetrain debug`: the training function in this process, after a check that every parameter learns.

Legend: T target slots.
"""

import dataclasses

import torch

from onetrain.data.samples import SampleIndex
from onetrain.launcher.console import print_message
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.job import PreparedData, build_model, set_numerics
from onetrain.launcher.options import RunConfig
from onetrain.launcher.train import loss_of_batch, train

CHECKED_SAMPLES = 32


def debug(config: RunConfig, steps: int, overfit: bool) -> None:
    """Check gradients on one batch, then train `steps` steps of the configured schedule under the name <name>-debug.

    Nothing is sent to wandb, every step is logged, and no earlier run is resumed or overwritten. Raises ConfigError for
    a parameter without a finite gradient.
    """
    name = f"{config.name}-debug"
    config = dataclasses.replace(
        config,
        name=name,
        train=dataclasses.replace(config.train, log_every=1),
        tracking=dataclasses.replace(config.tracking, wandb="disabled"),
    )
    set_numerics(config)
    check_gradients(config)
    result = train(config, stop_after=steps, overfit=overfit)
    if overfit:
        print_message(f"one batch, {steps} steps: loss {result['loss']:.4f}")


def check_gradients(config: RunConfig) -> None:
    """One backward pass over a few samples in fp32; every parameter must get a finite gradient that is not all zero."""
    data = PreparedData.open(config)
    model = build_model(config, data).train()
    index = SampleIndex(data.reader, "train", config.batch)
    batch = data.builder(config).build([index[number] for number in range(min(CHECKED_SAMPLES, len(index)))])
    loss_sum, weight, _ = loss_of_batch(model, batch, torch.device("cpu"))
    (loss_sum / weight).backward()
    problems = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or not bool(parameter.grad.any()):
            problems.append(f"{name} receives no gradient")
        elif not bool(parameter.grad.isfinite().all()):
            problems.append(f"{name} receives a gradient that is not finite")
    if problems:
        raise ConfigError(f"Gradient check of {config.name} failed: {'; '.join(problems)}.")
    count = sum(1 for _ in model.parameters())
    print_message(f"gradient check: all {count} parameters receive finite gradients, loss {loss_sum / weight:.4f}")
