"""What the threads of this process are busy with, for whoever asks why a batch is late."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_DOING: dict[int, list[tuple[str, float]]] = {}  # of each thread: what, and since when; the innermost last


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Say what this thread does inside the block, such as "verifying shard-00003.arrow"."""
    stack = _DOING.setdefault(threading.get_ident(), [])
    stack.append((what, time.monotonic()))
    try:
        yield
    finally:
        stack.pop()


def activity(thread: int) -> tuple[str, float] | None:
    """What a thread does, and for how many seconds; None if it has not said."""
    stack = _DOING.get(thread)
    if not stack:
        return None
    what, since = stack[-1]
    return what, time.monotonic() - since
