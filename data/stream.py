"""The stream of one rank, built in its own process: steps in their order, a few of them ahead."""

import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from onetrain.data.batch import Batch
from onetrain.data.cursor import Cursor
from onetrain.data.steps import BuildStats, BuiltStep, StepBuilder


@dataclass(frozen=True)
class Step:
    """What one rank trains on in one optimizer step."""

    micro_batches: list[Batch]
    cursor: Cursor  # once this step is done
    waited_s: float  # time that training stood still for it
    ready: int  # later steps that were built when it was handed over
    stats: BuildStats


class Stream(Protocol):
    """Where the training loop takes its steps from."""

    def steps(self, count: int, cursor: Cursor) -> Generator[Step, None, None]:
        """The next `count` steps from the cursor on, or fewer where the order ends; raises what building raised."""

    def close(self) -> None:
        """End everything that builds ahead."""


class LocalStream:
    """Builds in threads of this process. What is built ahead counts as nothing."""

    def __init__(self, builder: StepBuilder, rank: int) -> None:
        self.builder, self.rank = builder, rank

    def steps(self, count: int, cursor: Cursor) -> Generator[Step, None, None]:
        """See Stream."""
        options, waiting = self.builder.spec.stream, self.builder.starts(cursor, count)
        with ThreadPoolExecutor(options.builder_threads, "onetrain-stream") as threads:
            ahead: deque[tuple[Cursor, Future[BuiltStep]]] = deque()

            def fill() -> None:
                while len(ahead) <= options.prefetch_steps and (start := next(waiting, None)) is not None:
                    ahead.append((start, threads.submit(self.builder.build, start, self.rank)))

            try:
                fill()
                while ahead:
                    start, future = ahead.popleft()
                    begun = time.perf_counter()
                    built = future.result()
                    waited = time.perf_counter() - begun
                    fill()
                    ready = sum(future.done() for _, future in ahead)
                    yield Step(built.micro_batches, self.builder.after(start), waited, ready, built.stats)
            finally:
                for _, future in ahead:
                    future.cancel()

    def close(self) -> None:
        """Nothing outlives `steps`."""
