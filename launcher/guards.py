"""Guards look at a batch's loss and gradient before the weights change: stop, leave the batch out, or roll back.

What was left out stands in <run>/skipped.jsonl, so that every later attempt leaves it out too.

Legend: G samples of the global batch.
"""

import json
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import xxhash

from onetrain.cluster.beacon import AttemptEnded
from onetrain.cluster.event_log import SKIPPED, EventLog, read_log
from onetrain.data.cursor import Cursor
from onetrain.data.steps import StepBuilder
from onetrain.launcher.ledger import Ledger
from onetrain.launcher.options import GuardOptions
from onetrain.parallel.engine import StepResult
from onetrain.parallel.errors import ParallelError
from onetrain.parallel.process_group import Ranks, broadcast_object, raise_together

MAD_TO_DEVIATION = 1.4826  # of normally distributed values
LEAST_DISTANCE = 1e-3  # of the median: losses that hardly differ say nothing about what is usual


class Trouble(NamedTuple):
    """Why a batch was discarded."""

    reason: str  # "not_finite" or "spike"
    name: str  # of the value
    value: float


class SpikeGuard:
    """Whether a loss stands out from those before it; equal losses give equal answers on every rank and attempt."""

    def __init__(self, factor: float, window: int, losses: Sequence[float] = ()) -> None:
        """`losses`: the last ones that were accepted, oldest first."""
        self.factor = factor
        self.losses = deque[float](losses, maxlen=window)
        self._window = window

    def add(self, loss: float) -> None:
        """A loss that was accepted."""
        self.losses.append(loss)

    def limit(self) -> float:
        """The highest loss that is no spike: infinite until half the window is there."""
        if len(self.losses) < self._window // 2:
            return math.inf
        middle = median(self.losses)
        distance = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in self.losses)
        return middle + self.factor * max(distance, LEAST_DISTANCE * abs(middle))


class Guards:
    """The guards of a run, alike on every rank."""

    def __init__(self, options: GuardOptions, ranks: Ranks, run: Path, ledger: Ledger, losses: Sequence[float]) -> None:
        """`losses`: of the checkpoint that the run goes on from."""
        self.options, self.ranks, self.run, self.ledger = options, ranks, run, ledger
        self.spike = SpikeGuard(options.spike_factor, options.spike_window, losses)
        own = [(r["position"], r.get("updates")) for r in read_log(run / SKIPPED)] if ranks.is_main else None
        # Where a batch begins, and in which order (None: any): after other updates a position has other samples.
        self.left_out = set[tuple[int, str | None]](broadcast_object(own, ranks))

    def accepts(self, loss: float) -> bool:
        """Whether a loss, which is finite, may change the weights."""
        return self.options.spike == "ignore" or loss <= self.spike.limit()

    def add(self, loss: float) -> None:
        """The loss of a step that was done."""
        if self.options.spike != "ignore":
            self.spike.add(loss)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"losses": list(self.spike.losses)}

    def leaves_out(self, cursor: Cursor) -> bool:
        """Whether an earlier attempt left out the batch at the cursor."""
        return self._in_order(cursor, {other for other in self.left_out if other[0] == cursor.position}) > 0

    def ahead(self, cursor: Cursor, size: int) -> int:
        """Of the batches of `size` samples from here on, how many are left out, if no source grows any more."""
        ahead = {(at, updates) for at, updates in self.left_out if (at - cursor.position) % size == 0}
        return self._in_order(cursor, {other for other in ahead if other[0] >= cursor.position})

    def _in_order(self, cursor: Cursor, left_out: set[tuple[int, str | None]]) -> int:
        """How many positions of these belong to the cursor's order."""
        own = _updates(cursor) if left_out else ""
        return len({position for position, updates in left_out if updates in (None, own)})

    def refuse(self, result: StepResult, step: int, cursor: Cursor, steps: StepBuilder) -> str:
        """Does what the policy wants about the discarded batch at the cursor; returns why, where it is left out.

        Raises ParallelError to stop the run, AttemptEnded to roll back; on every rank.
        """
        trouble = _trouble(result)
        policy = self.options.not_finite if trouble.reason == "not_finite" else self.options.spike
        where = f"Step {step}, samples {cursor.position} on: the {trouble.name} is {trouble.value:g}"
        if trouble.reason == "spike":
            where += f", above the limit of guards.spike, {self.spike.limit():g}"
        if policy == "stop":
            raise ParallelError(
                f"{where}; the weights were not updated. Look at this batch, or lower optimizer.learning_rate, and go "
                f"on from the last checkpoint; guards.{trouble.reason}: skip or roll_back leaves such batches out."
            )
        bad = (cursor.position, _updates(cursor))
        if len(self.left_out | {bad}) > self.options.max_skips:
            raise ParallelError(
                f"{where}, and guards.max_skips is {self.options.max_skips}: {len(self.left_out)} batches are left out "
                f"already ({self.run / SKIPPED}). Look at them, lower optimizer.learning_rate, or allow more."
            )
        self._write(policy, step, cursor, trouble, steps)
        self.left_out.add(bad)
        kind = "skip" if policy == "skip" else "rollback"
        self.ledger.record(kind, step=step, position=cursor.position, reason=trouble.reason, value=_json(trouble.value))
        if policy == "roll_back":
            raise AttemptEnded("rolled_back", f"{where}; the run goes back to its newest checkpoint", step)
        return where

    def _write(self, action: str, step: int, cursor: Cursor, trouble: Trouble, steps: StepBuilder) -> None:
        error = None
        if self.ranks.is_main:
            source_G, id_G = steps.order(cursor).sample_ids(cursor.position, steps.spec.global_batch_size)
            samples = {
                name or "data.prepared": id_G[source_G == number].tolist()
                for number, name in enumerate(steps.sources.names)
            }
            try:
                EventLog(self.run / SKIPPED).add(
                    attempt=self.ledger.attempt,
                    step=step,
                    position=cursor.position,
                    updates=_updates(cursor),
                    action=action,
                    reason=trouble.reason,
                    value=_json(trouble.value),
                    samples=samples,
                )
            except OSError as failure:
                error = f"Cannot write {self.run / SKIPPED}: {failure}. Free space, then start the run again."
        raise_together(error, self.ranks)


def _trouble(result: StepResult) -> Trouble:
    if result.discarded == "gradient norm":
        return Trouble("not_finite", "gradient norm", result.grad_norm)
    return Trouble("spike" if result.discarded == "refused" else "not_finite", "loss", result.loss)


def _updates(cursor: Cursor) -> str:
    """A fingerprint of how the sources grew before the cursor, which with its position says which samples come next."""
    return xxhash.xxh3_64_hexdigest(json.dumps(cursor.as_json()["updates"]).encode())


def _json(value: float) -> float | str:
    """JSON has no NaN."""
    return value if math.isfinite(value) else str(value)
