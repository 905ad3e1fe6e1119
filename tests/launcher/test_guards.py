"""The spike guard against numpy, and which batches a resumed run still has before it."""

import math

import numpy as np
import pytest

from onetrain.launcher.guards import Guards, SpikeGuard
from onetrain.launcher.ledger import Ledger
from onetrain.launcher.options import GuardOptions
from onetrain.parallel.process_group import Ranks

ALONE = Ranks(0, 1, 0, None, 1.0)


@pytest.mark.parametrize("window", [4, 7, 50])
def test_the_limit_is_the_median_and_a_robust_deviation(window):
    rng = np.random.default_rng(window)
    guard, losses = SpikeGuard(3.0, window), []
    for _ in range(3 * window):
        losses.append(float(rng.normal(2.0, 0.1)))
        guard.add(losses[-1])
        last = np.array(losses[-window:])
        if len(losses) < window // 2:
            assert guard.limit() == math.inf
        elif len(last) > 1:
            middle = np.median(last)
            distance = max(1.4826 * np.median(np.abs(last - middle)), 1e-3 * middle)
            assert guard.limit() == pytest.approx(middle + 3 * distance, rel=1e-12)
    # a guard that goes on from a checkpoint decides alike
    assert SpikeGuard(3.0, window, list(guard.losses)).limit() == guard.limit()


def test_equal_losses_make_no_spike_of_rounding():
    guard = SpikeGuard(3.0, 4, [2.0] * 4)
    assert 2.0 * (1 + 1e-6) < guard.limit() < 2.1


def test_batches_left_out_are_counted_where_batches_begin(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"position": 32}\n{"position": 96}\n{"position": 96}\n{"position": 100}\n')
    guards = Guards(GuardOptions(), ALONE, tmp_path, Ledger(), [])
    assert guards.left_out == {32, 96, 100}
    assert [guards.ahead(position, 32) for position in (0, 32, 64, 128)] == [2, 2, 1, 0]
    assert guards.ahead(0, 50) == 1
