"""The training stream: each step's micro batches of one rank, built ahead by one background thread.

Which samples form a global batch depends on the order alone. Rank r of W takes every W-th of them; inside a step they
are sorted by length before they are cut into micro batches, so that little padding is computed.
"""

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from onetrain.data.batch import Batch, BatchBuilder
from onetrain.data.order import GlobalOrder
from onetrain.data.samples import SampleIndex

PREFETCH_STEPS = 2


@dataclass(frozen=True)
class Step:
    """What one rank trains on in one optimizer step."""

    micro_batches: list[Batch]
    cursor: int  # samples consumed, over all ranks, once this step is done
    waited_s: float  # time that training stood still for it
    padding: float  # share of context positions that are padding


@dataclass(frozen=True)
class TrainingStream:
    """Samples in their global order, cut into global batches and shared out to ranks.

    The cursor is the number of samples consumed, a position of the global order. What is built ahead counts as nothing.
    """

    index: SampleIndex
    order: GlobalOrder
    builder: BatchBuilder
    global_batch_size: int
    micro_batches: int
    rank: int
    world_size: int

    def sample_ids(self, cursor: int) -> list[int]:
        """This rank's samples of the global batch that starts at `cursor`, in global order."""
        ids = self.order.sample_ids(cursor, self.global_batch_size)
        return ids[self.rank :: self.world_size].tolist()

    def build(self, cursor: int) -> list[Batch]:
        """This rank's micro batches of the global batch that starts at `cursor`, shortest contexts first."""
        samples = [self.index[sample_id] for sample_id in self.sample_ids(cursor)]
        samples.sort(key=self.index.reach)
        size = len(samples) // self.micro_batches
        return [self.builder.build(samples[i : i + size]) for i in range(0, len(samples), size)]

    def steps(self, count: int, cursor: int) -> Iterator[Step]:
        """The next `count` steps from `cursor` on; an error of the building thread is raised here."""
        starts = range(cursor, cursor + count * self.global_batch_size, self.global_batch_size)
        ready: queue.Queue[list[Batch] | BaseException] = queue.Queue(PREFETCH_STEPS)
        stop = threading.Event()

        def fill() -> None:
            for start in starts:
                try:
                    item: list[Batch] | BaseException = self.build(start)
                except BaseException as error:
                    item = error
                while not stop.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stop.is_set() or isinstance(item, BaseException):
                    return

        threading.Thread(target=fill, name="training-stream", daemon=True).start()
        try:
            for start in starts:
                started = time.perf_counter()
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield Step(item, start + self.global_batch_size, time.perf_counter() - started, _padding(item))
        finally:
            stop.set()


def _padding(batches: list[Batch]) -> float:
    positions = sum(columns.index_BN.numel() for batch in batches for columns in batch.sequences.values())
    events = sum(sum(batch.n_events.values()) for batch in batches)
    return 1 - events / positions if positions else 0.0
