"""`onetrain debug`: the training function in this process, after a check that every parameter learns.

Legend: T target slots.
"""

import dataclasses
import shutil

import torch

from onetrain.data.cursor import Cursor
from onetrain.data.steps import StepBuilder
from onetrain.data.stream_options import ServiceOptions
from onetrain.launcher import conversion
from onetrain.launcher.batch_loss import loss_of_batch
from onetrain.launcher.config import run_folder
from onetrain.launcher.console import print_message
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.job import PreparedData, build_model, set_numerics
from onetrain.launcher.options import RunConfig
from onetrain.launcher.stream import stream_spec
from onetrain.launcher.train import train
from onetrain.model.features import module_key
from onetrain.model.lifelong import read_counts
from onetrain.parallel.deepspeed_config import check_options
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.support import check_mix

CHECKED_SAMPLES = 128
VALIDATED_USERS = 256


def debug(config: RunConfig, steps: int, overfit: bool) -> None:
    """Check gradients on one batch, then train `steps` steps of the configured schedule, always from the start.

    Validation ranks for a few users only. Writes into the folder "debug" of the run's folder, replacing what an earlier
    call left there. Nothing is sent to wandb, and every step is logged. Raises ConfigError for a parameter without a
    finite gradient.
    """
    config = dataclasses.replace(
        config,
        name="debug",
        parallel=_for_one_rank(config),
        storage_path=str(run_folder(config)),
        train=dataclasses.replace(
            config.train, log_every=1, steps=max(config.train.steps, steps), checkpoint_path=None
        ),
        evaluation=dataclasses.replace(config.evaluation, max_users=VALIDATED_USERS),
        tracking=dataclasses.replace(config.tracking, wandb="disabled"),
        stream=dataclasses.replace(config.stream, service=ServiceOptions()),
    )
    check_options(config.parallel, 1, config.model)
    set_numerics(config)
    check_gradients(config)
    shutil.rmtree(run_folder(config), ignore_errors=True)
    result = train(config, stop_after=steps, overfit=overfit)
    if overfit:
        print_message(f"one batch, {result['step']} steps: loss {result['loss']:.4f}")


def _for_one_rank(config: RunConfig) -> ParallelOptions:
    """The options of a world of one. Raises ParallelError, as training would, for options that do not go together."""
    check_mix(config.parallel, config.model)
    degrees = ("tensor_parallel", "context_parallel", "expert_parallel")
    shared = [
        f"parallel.{name} {getattr(config.parallel, name)}" for name in degrees if getattr(config.parallel, name) > 1
    ]
    if shared:
        print_message(f"debug runs one rank, which holds the whole model: {', '.join(shared)} play no part")
    return dataclasses.replace(config.parallel, tensor_parallel=1, context_parallel=1, expert_parallel=1)


def check_gradients(config: RunConfig) -> None:
    """Backward passes over a few samples in fp32; every parameter must get a finite gradient that is not all zero.

    Micro batches of the run's own size, as memory may not hold more, until every parameter has one.
    """
    data = PreparedData.open(config)
    model = build_model(config, data).train()
    conversion.prepare(model, config.conversion)
    distil = config.conversion if config.conversion.stage == "distil" else None
    steps = StepBuilder(stream_spec(config, data, Mesh.plan(1, config.parallel, config.model)))
    cursor = Cursor().updated(steps.sources.newest())
    rows = steps.sources.rows(*steps.order(cursor).sample_ids(0, CHECKED_SAMPLES))
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    size = config.parallel.micro_batch_size or CHECKED_SAMPLES
    problems, longest, loss, weight = [], dict[str, int](), 0.0, 0.0
    for start in range(0, len(rows), size):
        batch = steps.builder.build(rows[start : start + size])
        loss_sum, batch_weight, _ = loss_of_batch(model, batch, torch.device("cpu"), distil=distil)
        (loss_sum / batch_weight).backward()
        loss, weight = loss + float(loss_sum.detach()), weight + float(batch_weight)
        for name, events in batch.sequences.items():
            longest[name] = max(longest.get(name, 0), int(events.length_B.max()))
        if all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in learning.values()):
            break
    beyond = _summaries_out_of_reach(config, data, longest)
    for name, parameter in learning.items():
        if parameter.grad is None or not bool(parameter.grad.any()):
            if name.startswith(beyond) and ".summary." in name:
                continue
            problems.append(f"{name} receives no gradient")
        elif not bool(parameter.grad.isfinite().all()):
            problems.append(f"{name} receives a gradient that is not finite")
    if problems:
        raise ConfigError(f"Gradient check failed: {'; '.join(problems)}.")
    but = "; no history was longer than its window, so that its summary tokens were not tried" if beyond else ""
    print_message(
        f"gradient check: all {len(learning)} parameters receive finite gradients, loss {loss / weight:.4f}{but}"
    )


def _summaries_out_of_reach(config: RunConfig, data: PreparedData, longest: dict[str, int]) -> tuple[str, ...]:
    """Names, as parameters begin with them, of lifelong pathways whose histories never left their windows."""
    per_event = data.vocabulary(config).levels if config.model.flatten_codes else 1
    return tuple(
        f"context.pathways.{module_key(name)}."
        for name, ksa in config.model.ksa.items()
        if read_counts(longest[name] * per_event, ksa)[1] == 0
    )
