"""Checks of the `model:` section against the batches that it is to read."""

import difflib
from collections.abc import Iterator

from onetrain.launcher.options import RunConfig


def model_problems(config: RunConfig) -> Iterator[str]:
    """One line for every contradiction between `model` and `batch`."""
    model, batch = config.model, config.batch
    for name in model.query_formers:
        if name not in batch.pathways:
            close = difflib.get_close_matches(name, batch.pathways, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield (
                f"model.query_formers.{name}: there is no such pathway, batch.pathways has "
                f"{', '.join(batch.pathways)}{hint}"
            )
    if batch.share_context != "user":
        return
    reasons = {
        "positions that are the same for every target of a user, and model.position is recency; use model.position "
        "absolute or none": model.position == "recency",
        "a context in which no position has seen a later event, and model.architecture is encoder_decoder, whose "
        "encoder reads in both directions; use another architecture": model.architecture == "encoder_decoder",
        "a context in which no position has seen a later event, and model.query_formers compress all events; leave "
        "them out": bool(model.query_formers),
    }
    for reason, holds in reasons.items():
        if holds:
            yield f"batch.share_context: user needs {reason}, or use batch.share_context request"
