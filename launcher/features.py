"""Which features a model reads: what batches must hold, and what a plan must know the size of."""

from onetrain.data.features import SID, FeatureNames
from onetrain.model.options import ModelOptions


def feature_names(options: ModelOptions) -> FeatureNames:
    """The features that the model reads of events, users, requests and target items; the SID is always there."""
    time = options.time_features if options.time_aware else ()
    scenario = ("scenario",) if options.scenario_bos or options.scenario_head_bias else ()
    items = options.contrastive.features if options.contrastive.weight > 0 else ()
    return FeatureNames(
        events=_distinct((*options.features, *time)),
        user=options.user_features,
        request=_distinct((*time, *scenario)),
        items=_distinct(items),
    )


def all_features(options: ModelOptions) -> set[str]:
    """Names of all features that the model has tables for, but the SID."""
    names = feature_names(options)
    return {*names.events, *names.user, *names.request, *names.items}


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name in names if name != SID))
