"""The checkpoints of one run, as the training loop uses them: restore, save, keep the best, prune."""

import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from onetrain.cluster.beacon import BEACON
from onetrain.data.cursor import Cursor
from onetrain.launcher import conversion
from onetrain.launcher.checkpoints import BEST, Best, load_best, run_store
from onetrain.launcher.config import run_folder
from onetrain.launcher.console import print_warning
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.job import PreparedData
from onetrain.launcher.options import RunConfig
from onetrain.launcher.resume import check_model, check_order, read_cursor
from onetrain.parallel import checkpoint as checkpoints
from onetrain.parallel.checkpoint_agreement import Agreement, agreement_of
from onetrain.parallel.checkpoint_saver import CheckpointSaver, SaveOutcome
from onetrain.parallel.checkpoint_store import CheckpointStore, open_checkpoint, step_name
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import DamagedCheckpointError, ParallelError
from onetrain.parallel.param_groups import learning_rate_factor
from onetrain.parallel.process_group import Ranks

DROPOUT = "a step's generator: xxh3_64 of seed/step/data rank"  # `_step_seed` of train.py; no generator is saved


@dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    cursor: Cursor
    state: dict[str, Any]  # as `RunCheckpoints.save` wrote it, what the loop added included
    path: Path


@dataclass(frozen=True)
class _Found:
    """What rank 0 has found in the store."""

    names: list[str]
    whole: str | None = None  # the newest whole one
    damaged: tuple[tuple[str, str], ...] = ()  # newer than that, with their problems


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
        self.store = run_store(config)
        self.saver = CheckpointSaver(engine, self.store)
        self.agreement = agreement_of(engine)
        self._may_resume = config.train.resume == "auto" or not BEACON.first  # a later attempt finds its own
        self.best: Best | None = None
        self._best_on_disk: Best | None = None  # what best.json says
        self._saved: set[int] = set()  # steps of the checkpoints that this attempt has written
        self._failed: set[int] = set()
        self._warned_of: Best | None = None  # which best.json could not be written
        self._prune_due = False
        self._pruning: threading.Thread | None = None
        engine.at_close.append(self._close)

    def restore(self, order: Callable[[Cursor], dict[str, Any]]) -> Restored | None:
        """Goes on from the newest whole checkpoint, or starts from train.warm_start; every rank takes part.

        `order` describes the order of samples at a cursor. None for a run that begins. Raises ConfigError for a
        checkpoint that this configuration cannot go on from, ParallelError where all of them are damaged.
        """
        found = self._find()
        if not found.names:
            self._warm_start()
            self.agreement.from_main(self.store.sweep)
            return None
        if found.whole is None:
            problems = "; ".join(problem for _, problem in found.damaged) or "all of them were found damaged before"
            raise ParallelError(
                f"No checkpoint of this run is whole: {problems}. To begin anew, remove {', '.join(found.names)} in "
                f"{self._place()}, or choose another name."
            )
        folder, state = _fetch(self.store, found.whole, self.agreement)
        self._check_run(state)
        self.data.check_sids(state, folder)
        cursor = read_cursor(state["cursor"], folder)
        check_order(state["order"], order(cursor), folder)
        check_model(state["config"], self.config, folder)
        checkpoints.load(self.engine, folder, verified=True)
        best = self.agreement.from_main(lambda: self._tidy(found))
        where = self.store.where(found.whole)
        self.say(f"going on from {where}: step {self.engine.step}, {cursor.position} samples consumed")
        self._saved.add(self.engine.step)  # a validation may still follow
        if self.engine.step > 0:
            self.best = self._best_on_disk = best
        return Restored(cursor, state, folder)

    def save(self, cursor: Cursor, order: dict[str, Any], extra: dict[str, Any]) -> None:
        """Saves the state after the engine's step; every rank takes part. `extra`: further state of the loop.

        A save that fails is told by `poll`; raises ParallelError after three in a row.
        """
        engine, options = self.engine, self.config.optimizer
        rate = options.learning_rate * learning_rate_factor(engine.step, engine.total_steps, options)
        state = {
            "step": engine.step,
            "cursor": cursor.as_json(),
            **self.data.fingerprints(),
            "order": order,
            "rng": {"seed": self.config.seed, "dropout": DROPOUT},
            "learning_rate": rate,  # of the next step
            "config": asdict(self.config),
            **extra,
        }
        self.saver.save(step_name(engine.step), state, "async" if self.config.train.async_checkpoints else "sync")
        self.poll()  # what became of the save before, which this one has waited for

    def found(self, step: int, metric: str, value: float) -> bool:
        """Takes note of a validation at `step`, whose checkpoint `save` has got; whether it is the best so far.

        best.json follows when that checkpoint is on the disk.
        """
        if step in self._failed:  # there is no checkpoint to be the best
            return False
        if self.best is not None and self.best.metric == metric and value <= self.best.value:
            return False
        self.best = Best(step, metric, value)
        self._name_best()
        return True

    def poll(self) -> None:
        """At every step: takes up what saves in the background have done, and prunes. Cheap."""
        outcomes = self.saver.outcomes()
        if not self.ranks.is_main:
            return
        for outcome in outcomes:
            self._take_up(outcome)
        self._name_best()
        if self._prune_due:
            self._prune()

    def finish(self) -> None:
        """Waits for the save under way; every rank takes part. Raises ParallelError where the newest save failed."""
        try:
            self.saver.finish()
        finally:
            self.poll()
            self._wait_for_pruning()

    def _close(self) -> None:
        self.saver.close()
        self.poll()
        self._wait_for_pruning()

    def _take_up(self, outcome: SaveOutcome) -> None:
        if outcome.problem is None:
            self._saved.add(outcome.step)
            self._prune_due = True
            self._failed.discard(outcome.step)
            told = {name: value for name, value in asdict(outcome).items() if name != "problem"}
            self.record(kind="checkpoint", **told)
            return
        self._failed.add(outcome.step)
        print_warning(f"{outcome.problem} A run that trains on tries again at its next checkpoint.")
        self.record(kind="checkpoint_failed", step=outcome.step, problem=outcome.problem)
        if self.best is not None and self.best.step == outcome.step:
            self.best = self._best_on_disk

    def _name_best(self) -> None:
        new = self.best if self.best != self._best_on_disk else None
        if self.ranks.is_main and new is not None and new.step in self._saved:
            try:
                new.save(self.run)
            except OSError as error:  # the other ranks train on
                if new != self._warned_of:
                    print_warning(f"{self.run / BEST} cannot be written ({error}); it is tried again at every step")
                self._warned_of = new
                return
            self._best_on_disk = new
            self._prune_due = True

    def _prune(self) -> None:
        """In a thread: large files take their time, other storage even more."""
        self._prune_due = False
        self._wait_for_pruning()
        keep = {step_name(best.step) for best in (self.best, self._best_on_disk) if best is not None}
        self._pruning = threading.Thread(target=self._prune_now, args=(keep,), name="prune", daemon=True)
        self._pruning.start()

    def _prune_now(self, keep: set[str]) -> None:
        try:
            self.store.prune(self.config.train.keep_last, keep, self.config.train.keep_every)
        except (OSError, ParallelError) as error:
            print_warning(f"old checkpoints in {self._place()} cannot be deleted: {error}")

    def _wait_for_pruning(self) -> None:
        if self._pruning is not None:
            self._pruning.join()
            self._pruning = None

    def _place(self) -> str:
        return self.store.where("").rstrip("/")

    def _find(self) -> _Found:
        """Rank 0 looks, from the newest to the oldest, and the others hear of it."""
        result = self.agreement.from_main(self._look)
        if result.names and not self._may_resume:
            raise ConfigError(
                f"{self._place()} holds checkpoints of an earlier run, and train.resume is never. Choose another "
                "name, remove that folder, or set train.resume to auto."
            )
        return result

    def _look(self) -> _Found:
        if self._may_resume:
            self.store.recover()
        names = self.store.candidates()
        damaged: list[tuple[str, str]] = []
        for name in reversed(names if self._may_resume else []):
            try:
                problem = checkpoints.verify(self.store.fetch(name))
            except DamagedCheckpointError as error:
                problem = str(error)
            except (OSError, KeyError, TypeError, ValueError) as error:
                problem = f"Checkpoint {self.store.where(name)} cannot be read ({type(error).__name__}: {error})."
            if problem is None:
                return _Found(names, name, tuple(damaged))
            damaged.append((name, problem))
        return _Found([*names, *self.store.damaged()], None, tuple(damaged))

    def _tidy(self, found: _Found) -> Best | None:
        """On rank 0, once it is sure from which checkpoint the run goes on; the best one so far.

        Damaged ones must not be found again, and what an attempt before has left half-written goes.
        """
        assert found.whole is not None
        self.store.sweep()
        used = self.store.where(found.whole)
        for name, problem in found.damaged:
            aside = self.store.set_aside(name)
            print_warning(f"{problem} It is called {aside} now; going on from {used} instead.")
            self.record(kind="fallback", damaged=self.store.where(name), problem=problem, used=used)
        return load_best(self.run, self.store)

    def _check_run(self, state: dict[str, Any]) -> None:
        """Two runs that were given one place would delete each other's checkpoints."""
        owner = state["config"].get("name", self.config.name)
        if self.config.train.checkpoint_path is not None and owner != self.config.name:
            raise ConfigError(
                f"train.checkpoint_path: {self._place()} holds the checkpoints of the run {owner}, and this one is "
                f"{self.config.name}. Give every run a place of its own, or start from that one with train.warm_start."
            )

    def _warm_start(self) -> None:
        if self.config.train.warm_start is None:
            return
        source = self.config.train.warm_start
        store, name = open_checkpoint(source, self.config.stream.cache)
        folder, state = _fetch(store, name, self.agreement)
        self.data.check_sids(state, folder)
        conversion.check_source(self.config, state["config"])
        differences = checkpoints.start_from(self.engine, folder).describe()
        self.say(f"starting from the weights of {source}" + (f"; {differences}" if differences else ""))


def _fetch(store: CheckpointStore, name: str, agreement: Agreement) -> tuple[Path, dict[str, Any]]:
    """A local copy for every rank, and the state in it; ParallelError on all of them where one gets none."""
    folder, state, error = Path(), {}, None  # type: Path, dict[str, Any], Exception | None
    try:
        folder = store.fetch(name)
        state = checkpoints.read_state(folder)
    except (ParallelError, OSError) as failure:
        error = failure
    agreement.raise_together(error)
    return folder, state
