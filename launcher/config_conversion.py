"""Checks of the `conversion:` section against the model and the run that it is to convert."""

from collections.abc import Iterator

from onetrain.launcher.options import RunConfig


def conversion_problems(config: RunConfig) -> Iterator[str]:
    """One line for every contradiction between `conversion` and other sections."""
    options, model, train = config.conversion, config.model, config.train
    if options.stage == "none":
        return
    stage = f"conversion.stage: {options.stage}"
    if train.warm_start is None:
        yield f"{stage} starts from a trained model; name its checkpoint folder in train.warm_start"
    converted = {name: ksa for name, ksa in model.ksa.items() if ksa.own_projections}
    if not converted:
        yield (
            f"{stage} needs a pathway with summary projections of its own: model.ksa with ksa among its layers, "
            "summaries of at least 1 and blend 1"
        )
    for name, ksa in converted.items():
        if ksa.blend != 1:
            yield f"model.ksa.{name}.blend: given {ksa.blend}, but {stage} starts at 1 and changes it by itself; use 1"
    if options.stage == "anneal":
        assert options.anneal_to is not None
        if options.anneal_to >= train.steps:
            yield (
                f"conversion.anneal_to: given {options.anneal_to}, but training ends with step {train.steps - 1}, "
                f"counted from 0, before the blend is 0; use at most {train.steps - 1}"
            )
        return
    for name in ("dropout", "context_dropout"):
        if getattr(model, name) > 0:
            yield (
                f"model.{name}: given {getattr(model, name)}, but {stage} compares two readings of the same input; use "
                "0 for this stage"
            )
    for name in ("tensor_parallel", "context_parallel", "expert_parallel"):
        if getattr(config.parallel, name) > 1:
            yield f"parallel.{name}: {stage} freezes most parameters, which ranks cannot share; use 1 for this stage"
