"""The stream of one rank whose steps the data service builds."""

from collections import deque
from collections.abc import Callable, Generator

from onetrain.data.cursor import Cursor
from onetrain.data.service.dispatch import Dispatcher, Request
from onetrain.data.steps import StepBuilder
from onetrain.data.stream import Step


class ServiceStream:
    """A Stream: the steps of LocalStream, bit for bit, whoever builds them; their tensors are not to be written to.

    Never more than stream.prefetch_steps steps are asked for and not handed over. Runs no thread: requests go out, and
    what failed is asked for again, whenever a step is taken.
    """

    def __init__(self, builder: StepBuilder, rank: int, run: str, warn: Callable[[str], None] = print) -> None:
        """`builder` only says where the order ends. `warn` gets one line for every stall."""
        self.builder, self.rank = builder, rank
        self._dispatcher = Dispatcher(run, builder.spec, rank, warn)

    def steps(self, count: int, cursor: Cursor) -> Generator[Step, None, None]:
        """See Stream. DataError when no builder delivers within stream.service.give_up_s."""
        waiting = self.builder.starts(cursor, count)
        ahead: deque[Request] = deque()

        def fill() -> None:
            while len(ahead) < self.builder.spec.stream.prefetch_steps and (start := next(waiting, None)) is not None:
                ahead.append(self._dispatcher.ask(start))

        try:
            fill()
            while ahead:
                built, waited = self._dispatcher.take(ahead[0])
                start = ahead.popleft().cursor
                ready = sum(request.done for request in ahead)
                fill()
                yield Step(built.micro_batches, self.builder.after(start), waited, ready, built.stats)
                del built  # or a batch that training is done with stays in shared memory
        finally:
            self._dispatcher.forget(list(ahead))

    def close(self) -> None:
        """Nothing outlives `steps`: actors finish at most what they have begun, for nobody."""
