"""Five faults of `make chaos`, which has all kinds, 20 of them, and changes of size."""

import pytest
from chaos import run_faults

FAULTS = ["kill_builder", "truncate_newest", "kill_driver", "stop_rank", "kill_node"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_nothing_comes_of_five_faults(tmp_path):
    recoveries = run_faults(tmp_path, FAULTS, seed=3)
    assert [recovery.fault for recovery in recoveries] == FAULTS
    assert [recovery.detected_s is not None for recovery in recoveries] == [False, True, False, True, True]
