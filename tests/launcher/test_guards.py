"""The spike guard against numpy, and which batches a resumed run still has before it."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from onetrain.data.cursor import Cursor
from onetrain.launcher.guards import Guards, SpikeGuard
from onetrain.launcher.ledger import Ledger
from onetrain.launcher.options import GuardOptions
from onetrain.parallel.engine import StepResult
from onetrain.parallel.errors import ParallelError
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
    assert [guards.leaves_out(Cursor(position)) for position in (0, 32, 64, 96)] == [False, True, False, True]
    assert [guards.ahead(Cursor(position), 32) for position in (0, 32, 64, 128)] == [2, 2, 1, 0]
    assert guards.ahead(Cursor(), 50) == 1


class Steps:
    """Of a StepBuilder what a record of a batch needs."""

    spec = SimpleNamespace(global_batch_size=2)
    sources = SimpleNamespace(names=["shop"])

    def order(self, cursor):
        return SimpleNamespace(sample_ids=lambda position, size: (np.zeros(size), np.arange(position, position + size)))


def test_a_batch_is_left_out_only_in_the_order_in_which_it_was_bad(tmp_path):
    grown = Cursor().updated({"shop": 1}, {"shop": "abc"}).at(20).updated({"shop": 2}, {"shop": "def"})
    later = Cursor().updated({"shop": 1}, {"shop": "abc"}).at(24).updated({"shop": 2}, {"shop": "def"})
    options = GuardOptions(not_finite="skip", max_skips=3)
    bad = StepResult(math.nan, 1.0, 0.0, 0.0, {}, "loss")

    def guards():
        return Guards(options, ALONE, tmp_path, Ledger(), [])

    first = guards()
    first.refuse(bad, 5, grown.at(30), Steps())
    for one in (first, guards()):  # itself, and the next attempt
        assert one.leaves_out(grown.at(30))
        assert not one.leaves_out(later.at(30))  # growth was taken up elsewhere: other samples
        assert not one.leaves_out(Cursor(30))
        assert (one.ahead(grown.at(22), 2), one.ahead(later, 2)) == (1, 0)
    one = guards()
    one.refuse(bad, 5, later.at(30), Steps())
    assert guards().leaves_out(later.at(30))
    assert guards().leaves_out(grown.at(30))
    # what came after the batch does not matter: an attempt that goes back meets it with what was known there
    assert guards().leaves_out(Cursor.from_json(json.loads(json.dumps(grown.at(30).as_json()))))
    one.refuse(bad, 5, Cursor(30), Steps())
    with pytest.raises(ParallelError, match="3 batches are left out"):
        one.refuse(bad, 5, Cursor(32), Steps())
