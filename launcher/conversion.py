"""What a stage of the conversion to summary attention (KSA, section 7.1) does to the model before the first step and
before every step; its loss is in model/ksa/conversion.py.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.model.ksa.conversion import freeze_all_but_summaries, set_blend
from onetrain.model.options import ConversionOptions


def prepare(model: nn.Module, options: ConversionOptions) -> None:
    """Freezes what the stage does not train; before the engine takes the model."""
    if options.stage == "distil":
        freeze_all_but_summaries(model)


def check_source(config: RunConfig, source: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the run that distillation starts from, of this configuration, had full attention."""
    if config.conversion.stage != "distil":
        return
    for name, ksa in config.model.ksa.items():
        layers = source["model"].get("ksa", {}).get(name, {}).get("layers", ())
        if ksa.own_projections and set(layers) != {"full"}:
            raise ConfigError(
                f"conversion.stage: distil learns from the network with full attention, and train.warm_start names one "
                f"whose pathway {name} has the layers {', '.join(layers) or 'of no stack'}: name a checkpoint whose "
                f"model.ksa.{name}.layers are all full, or leave the distillation out."
            )


def blend_of_step(options: ConversionOptions, step: int) -> float | None:
    """Weight of the summary projections in optimizer step `step`, from 0; None where the stage leaves it alone."""
    if options.stage == "none":
        return None
    return options.blend(step) if options.stage == "anneal" else 1.0


def before_step(model: nn.Module, options: ConversionOptions, step: int) -> None:
    """Sets the blend of step `step`: a function of the step alone, so that a resumed run needs no memory of it."""
    blend = blend_of_step(options, step)
    if blend is not None:
        set_blend(model, blend)
