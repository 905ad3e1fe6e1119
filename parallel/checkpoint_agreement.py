"""What ranks tell each other about checkpoints, however long one of them works on its disk or waits for storage.

Over a process group of its own (gloo) whose timeout is long: `parallel.collective_timeout_s` bounds the collectives of
training, and rank 0 may verify, download or write for longer. A rank that dies is noticed at once all the same.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.process_group import Ranks

TIMEOUT_S = 24 * 3600.0
T = TypeVar("T")
Told = tuple[type[Exception], str]  # an error, as it travels


class Agreement:
    """Errors of one rank become those of all, of the same type."""

    def __init__(self, ranks: Ranks) -> None:
        """Every rank takes part."""
        self.ranks, self.closed = ranks, False
        self.group: dist.ProcessGroup | None = None
        if ranks.world_size > 1:
            self.group = dist.new_group(
                backend="gloo", timeout=timedelta(seconds=TIMEOUT_S), group_desc="checkpoint_agreement"
            )

    def first_error(self, error: str | None) -> str | None:
        """The text of the lowest rank that brings one, on every rank."""
        return next((text for text in self._all(error) if text is not None), None)

    def raise_together(self, error: Exception | None) -> None:
        """Raises the error of the lowest rank that brings one, on every rank, so that none is left in a collective."""
        first = next((told for told in self._all(None if error is None else _told(error)) if told is not None), None)
        if first is not None:
            kind, text = first
            raise kind(text) from error

    def from_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on rank 0, on every rank; its exceptions too."""
        result: T | None = None
        error: Exception | None = None
        if self.ranks.is_main:
            try:
                result = action()
            except Exception as failure:
                error = failure
        box: list[Any] = [(result, None if error is None else _told(error))]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        value, told = box[0]
        if told is not None:
            kind, text = told
            raise kind(text) from error
        return value

    def close(self) -> None:
        """Leaves the process group."""
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group, self.closed = None, True

    def _all(self, own: Any) -> list[Any]:
        if self.group is None:
            return [own]
        everyone: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(everyone, own, group=self.group)
        return everyone


_of_engines: WeakKeyDictionary[Engine, Agreement] = WeakKeyDictionary()


def agreement_of(engine: Engine) -> Agreement:
    """The engine's own, made at first use, in which every rank takes part; it ends with the engine."""
    if engine not in _of_engines or _of_engines[engine].closed:
        _of_engines[engine] = Agreement(engine.ranks)
        engine.at_close.append(_of_engines[engine].close)
    return _of_engines[engine]


def _told(error: Exception) -> Told:
    """Errors of this room keep their type, so that those that another attempt may mend are known by it."""
    if isinstance(error, ParallelError):
        return type(error), str(error)
    return ParallelError, f"{type(error).__name__}: {error}"
