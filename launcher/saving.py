"""The checkpoints of one run, as the training loop uses them: restore, save, keep the best, prune."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onetrain.data.cursor import Cursor
from onetrain.launcher import conversion
from onetrain.launcher.checkpoints import Best, folder_of_checkpoints, load_best
from onetrain.launcher.config import run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.job import PreparedData
from onetrain.launcher.options import RunConfig
from onetrain.launcher.resume import check_model, check_order, read_cursor
from onetrain.parallel import checkpoint as checkpoints
from onetrain.parallel.engine import Engine
from onetrain.parallel.process_group import Ranks


@dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    cursor: Cursor
    state: dict[str, Any]  # the loop's own, as `RunCheckpoints.save` got it and more
    path: Path


def _nowhere(**_: Any) -> None:
    """Records that nobody keeps."""


class RunCheckpoints:
    """Restores a run and saves it. `record(kind=..., **fields)` is told on rank 0 what became of every save."""

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        engine: Engine,
        data: PreparedData,
        say: Callable[[str], None],
        record: Callable[..., None] = _nowhere,
    ) -> None:
        self.config, self.ranks, self.engine, self.data = config, ranks, engine, data
        self.say, self.record = say, record
        self.run = run_folder(config)
        self.folder = folder_of_checkpoints(self.run)
        self.best: Best | None = None
        self._saved = False  # since the last pruning

    def restore(self, order: Callable[[Cursor], dict[str, Any]]) -> Restored | None:
        """Goes on from the newest checkpoint, or starts from train.warm_start; every rank takes part.

        `order` describes the order of samples at a cursor. None for a run that begins. Raises ConfigError for a
        checkpoint that this configuration cannot go on from.
        """
        newest = checkpoints.latest(self.folder)
        if newest is None:
            self._warm_start()
            return None
        if self.config.train.resume == "never":
            raise ConfigError(
                f"{self.folder} holds checkpoints of an earlier run, and train.resume is never. Choose another "
                "name, remove that folder, or set train.resume to auto."
            )
        state = checkpoints.read_state(newest)
        self.data.check_sids(state, newest)
        cursor = read_cursor(state["cursor"], newest)
        check_order(state["order"], order(cursor), newest)
        check_model(state["config"], self.config, newest)
        checkpoints.load(self.engine, newest)
        self.say(f"going on from {newest}: step {self.engine.step}, {cursor.position} samples consumed")
        if self.engine.step > 0:
            self.best = load_best(self.run)
        return Restored(cursor, state, newest)

    def save(self, cursor: Cursor, order: dict[str, Any], extra: dict[str, Any]) -> None:
        """Saves the state after the engine's step; every rank takes part. `extra`: further state of the loop."""
        state = {
            "step": self.engine.step,
            "cursor": cursor.as_json(),
            **self.data.fingerprints(),
            "order": order,
            "config": asdict(self.config),
            **extra,
        }
        checkpoints.save(self.engine, checkpoints.step_folder(self.folder, self.engine.step), state)
        self._saved = True

    def found(self, step: int, metric: str, value: float) -> bool:
        """Takes note of a validation at `step`, whose checkpoint is saved already; whether it is the best so far."""
        if self.best is not None and self.best.metric == metric and value <= self.best.value:
            return False
        self.best = Best(step, metric, value)
        if self.ranks.is_main:
            self.best.save(self.run)
        return True

    def poll(self) -> None:
        """At every step: takes up what saves in the background have done, and prunes."""
        if self._saved and self.ranks.is_main:
            keep = {checkpoints.step_folder(self.folder, self.best.step).name} if self.best else set()
            checkpoints.prune(self.folder, self.config.train.keep_last, keep)
        self._saved = False

    def finish(self) -> None:
        """Waits for the save under way; every rank takes part. Raises ParallelError where the newest save failed."""
        self.poll()

    def _warm_start(self) -> None:
        if self.config.train.warm_start is None:
            return
        source = Path(self.config.train.warm_start)
        state = checkpoints.read_state(source)
        self.data.check_sids(state, source)
        conversion.check_source(self.config, state["config"])
        differences = checkpoints.start_from(self.engine, source).describe()
        self.say(f"starting from the weights of {source}" + (f"; {differences}" if differences else ""))
