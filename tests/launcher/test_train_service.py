"""Runs whose batches the data service builds; tests/chaos kills its builders, and compares with an undisturbed run."""

import pytest
from train_cases import changed

from onetrain.data.stream_options import ServiceOptions
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.train import train


def test_a_service_without_ray_is_refused_in_words(tiny):
    with pytest.raises(
        ConfigError, match=r"stream\.service\.actors is 1, but this process is no part of a Ray cluster"
    ):
        train(changed(tiny, stream__service=ServiceOptions(actors=1)))
