"""Checks of the `model:` section against the batches that it is to read."""

from collections.abc import Iterable, Iterator

from onetrain.data.features import AGE, SID
from onetrain.data.schema import REQUEST_FEATURES, nearest
from onetrain.launcher.features import all_features
from onetrain.launcher.lifelong import events_per_chunk
from onetrain.launcher.options import RunConfig
from onetrain.model.presets import STACKS


def model_problems(config: RunConfig) -> Iterator[str]:
    """One line for every contradiction between `model` and `batch`."""
    model, batch = config.model, config.batch
    yield from _unknown("model.query_formers", model.query_formers, batch.pathways, "batch.pathways has")
    yield from _unknown("model.ksa", model.ksa, batch.pathways, "batch.pathways has")
    yield from _stack_problems(config)
    used = all_features(model)
    yield from _unknown("model.feature_widths", model.feature_widths, {*used, SID}, "the model reads")
    yield from _unknown("model.hashed", model.hashed, used, "the model reads")
    if model.time_aware:
        yield from _unknown("model.time_features", model.time_features, REQUEST_FEATURES, "a request has")
    if (model.scenario_bos or model.scenario_head_bias) and batch.request_by == "timestamp":
        yield (
            "batch.request_by: timestamp can put events of two scenarios into one request, which model.scenario_bos "
            "and model.scenario_head_bias could not tell apart; use batch.request_by event, or leave those out"
        )
    if batch.share_context == "user":
        yield from _unshareable(config)


def _unknown(key: str, names: Iterable[str], known: Iterable[str], has: str) -> Iterator[str]:
    known = sorted(known)
    for name in names:
        if name not in known:
            yield f"{key}: there is no {name!r}; {has} {', '.join(known) or 'none'}.{nearest(name, known)}"


def _stack_problems(config: RunConfig) -> Iterator[str]:
    """Of the lifelong pathways: unknown presets, and an align that would move chunks nevertheless."""
    levels = len(config.tokenizer.codebook) + (config.tokenizer.collisions == "extra_level")
    for name, ksa in config.model.ksa.items():
        if ksa.preset is not None and ksa.preset not in STACKS:
            yield f"model.ksa.{name}.preset: there is no {ksa.preset!r}; there are {', '.join(STACKS)}"
        align = config.batch.pathways[name].align if name in config.batch.pathways else None
        step = events_per_chunk(config.model, name, levels)
        if align is not None and align > 1 and align % step:
            yield (
                f"batch.pathways.{name}.align: given {align}, but with model.ksa.{name}.chunk {ksa.chunk} chunks only "
                f"stay in place for a multiple of {step}; leave it out, which means {step}, or use 1 and let them move"
            )


def _unshareable(config: RunConfig) -> Iterator[str]:
    """What differs between the requests of a user, or has seen a later one's events."""
    model = config.model
    reasons = {
        "positions that are the same for every target of a user, and model.position is recency; use model.position "
        "absolute or none": model.position == "recency",
        f"features that are the same for every target of a user, and model.features has {AGE}; leave it out": AGE
        in model.features,
        "a context in which no position has seen a later event, and model.architecture is encoder_decoder, whose "
        "encoder reads in both directions; use another architecture": model.architecture == "encoder_decoder",
        "a context in which no position has seen a later event, and model.query_formers compress all events; leave "
        "them out": bool(model.query_formers),
        "a context in which no position has seen a later event, and model.ksa reads all of a history; leave it "
        "out": bool(model.ksa),
    }
    for reason, holds in reasons.items():
        if holds:
            yield f"batch.share_context: user needs {reason}, or use batch.share_context request"
