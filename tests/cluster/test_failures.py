"""Which endings are tried again."""

import pytest

from onetrain.cluster.beacon import AttemptEnded
from onetrain.cluster.errors import ClusterError, HangError, LostWorkerError
from onetrain.cluster.failures import ending_of
from onetrain.data.errors import DataError, LateBatchError
from onetrain.parallel.errors import ParallelError, RendezvousError


@pytest.mark.parametrize(
    ("error", "trained", "asked", "kind"),
    [
        (None, True, False, "finished"),
        (KeyboardInterrupt(), True, False, "stopped"),
        (AttemptEnded("drained", "room for more", 7), True, True, "drained"),
        (AttemptEnded("drained", "rank 0 got SIGTERM", 7), True, False, "preempted"),
        (AttemptEnded("rolled_back", "NaN", 7), True, False, "rolled_back"),
        (HangError("rank 1 hangs", 1, "a", "hang_1.txt"), False, False, "hang"),
        (LostWorkerError("died", 1, "a"), False, False, "died"),
        (LostWorkerError("died", 1, "a", node_lost=True), True, False, "node_lost"),
        (LostWorkerError("died", 1, "a", node_lost=True, preempted=True), True, False, "preempted"),
        (ParallelError("the loss is NaN"), True, False, "refused"),
        (DataError("no such column"), False, False, "refused"),
        (RendezvousError("port in use"), False, False, "failed"),
        (LateBatchError("nothing comes"), True, False, "failed"),
        (RuntimeError("connection closed"), True, False, "failed"),
        (RuntimeError("a bug at the start"), False, False, "refused"),
        (ClusterError("not enough room"), False, False, "refused"),
        (ClusterError("not enough room"), True, False, "failed"),
    ],
)
def test_the_kind_of_an_ending(error, trained, asked, kind):
    ending = ending_of(error, 5, 40, trained, asked)
    assert ending.kind == kind
    assert ending.step == (7 if isinstance(error, AttemptEnded) else 5)
    assert ending.fields().keys() == {"kind", "reason", "rank", "node", "step", "position"}
