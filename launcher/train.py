"""The training function. It reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and nothing else about
where it runs; `onetrain debug`, the Ray worker group and torchrun all call it.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
import xxhash

from onetrain.cluster.beacon import BEACON, DRAIN, AttemptEnded
from onetrain.data.batch import Batch
from onetrain.data.cursor import Cursor
from onetrain.data.steps import StepBuilder
from onetrain.data.stream import Step
from onetrain.launcher import conversion
from onetrain.launcher.batch_loss import as_decoder, loss_of_batch
from onetrain.launcher.config import run_folder
from onetrain.launcher.console import print_message
from onetrain.launcher.environment import save_environment
from onetrain.launcher.evaluator import SUBSETS, Evaluator
from onetrain.launcher.guards import Guards
from onetrain.launcher.job import PreparedData, build_model, set_numerics
from onetrain.launcher.ledger import Ledger
from onetrain.launcher.lifelong import check_kernels, stack_lines
from onetrain.launcher.meter import Meter
from onetrain.launcher.options import GuardOptions, RunConfig
from onetrain.launcher.resume import keep_config
from onetrain.launcher.saving import RunCheckpoints
from onetrain.launcher.stream import grown, newest_versions, open_stream, sample_order, stream_spec
from onetrain.launcher.tracking import Tracker
from onetrain.model.loss import LossParts
from onetrain.parallel import process_group
from onetrain.parallel.deepspeed_config import check_options
from onetrain.parallel.engine import Engine, StepResult
from onetrain.parallel.errors import SaveError
from onetrain.parallel.optimizer_state import canonical_shapes
from onetrain.parallel.process_group import Ranks, all_reduce_max, broadcast_object, first_error


def train(config: RunConfig, *, stop_after: int | None = None, overfit: bool = False) -> dict[str, float]:
    """Train to `train.steps`, going on from the run's newest checkpoint; returns the last metrics.

    `stop_after` ends the run after so many optimizer steps of the whole schedule; `overfit` trains on the first global
    batch again and again. Raises ConfigError, DataError or ParallelError, where it can before the first step, and
    AttemptEnded where the same command goes on from what was saved.
    """
    ledger = Ledger()
    ranks = process_group.start(config.parallel.collective_timeout_s)
    BEACON.collectives = process_group.collectives
    try:
        check_options(config.parallel, ranks.world_size, config.model)  # before data are read and a model is built
        check_kernels(config.model, ranks.device)
        set_numerics(config)
        ledger.open(run_folder(config), ranks.is_main)
        with _Run(config, ranks, ledger, overfit) as run:
            return run.train(min(config.train.steps, stop_after or config.train.steps))
    finally:
        process_group.stop()


class _Run:
    """One attempt at a run, on one rank."""

    def __init__(self, config: RunConfig, ranks: Ranks, ledger: Ledger, overfit: bool) -> None:
        self.config, self.ranks, self.ledger, self.overfit = config, ranks, ledger, overfit
        self.folder = run_folder(config)
        ledger.enter("build")
        self.data = PreparedData.open(config)
        self.data.builder(config)  # refuses features and pathways that the data lack
        model = build_model(config, self.data)
        conversion.prepare(model, config.conversion)
        self.engine = Engine(model, config.parallel, config.optimizer, ranks, config.train.steps)
        self.data_rank = self.engine.mesh.data_rank(ranks.rank)
        spec = stream_spec(config, self.data, self.engine.mesh)
        self.steps = StepBuilder(broadcast_object(spec if ranks.is_main else None, ranks))  # equal to the last bit
        ledger.enter("restore")
        self.checkpoints = RunCheckpoints(config, ranks, self.engine, self.data, self._say, self._record)
        restored = self.checkpoints.restore(self._order)
        self.cursor = Cursor() if restored is None else restored.cursor
        losses = [] if restored is None else restored.state.get("losses", [])
        self.guards = Guards(GuardOptions() if overfit else config.guards, ranks, self.folder, ledger, losses)
        self._look_for_growth()
        ledger.enter("build", self.engine.step, self.cursor.position)
        self.stream = open_stream(config, self.steps, self.data_rank, self._say)
        self.evaluator = Evaluator(self.data, config, "valid")
        self.meter = Meter(config, self.data.vocabulary(config), self.engine, ledger.stood_still)
        self.validated = self.engine.step  # the last step that was
        self.tracker = self._start_records()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        outcome = "finished" if error is None else error.kind if isinstance(error, AttemptEnded) else "failed"
        self.ledger.enter("end")
        try:
            self.stream.close()
            self.engine.close()  # a save under way may still end
        finally:
            self.ledger.end(outcome, self.engine.step, self.cursor.position)
            code = 0 if outcome in ("finished", "drained") else getattr(error, "exit_code", 1)
            self.tracker.close(code, whole=outcome != "drained")

    def train(self, last_step: int) -> dict[str, float]:
        """Optimizer steps up to `last_step`, with logs, validations and checkpoints on the way."""
        options = self.config.train
        metrics: dict[str, float] = {"step": self.engine.step}
        self.wanted_step, self.last_step = last_step, self._within_order(last_step)
        if self.engine.step >= last_step:
            self._say(f"nothing left to do: {self.engine.step} steps are done, and {last_step} were asked for")
        if self._validation_missing():
            metrics |= self._validate()
        for step in self._steps():
            result = self._compute(step)
            if result.done:
                self.guards.add(result.loss)
                self.meter.add(step, result)
                self.cursor = step.cursor
            else:
                self._leave_out(step, result)
            number, final = self.engine.step, self.engine.step == self.last_step
            if not result.done and (not final or number == 0):
                continue
            drained = result.flagged and not final
            logged = final or drained or number % options.log_every == 0
            if logged and self.meter.steps:
                metrics = self._log()
            validated = (final or _due(number, options.evaluate_every)) and number > self.validated
            if final or validated or drained or _due(number, options.checkpoint_every):
                self._save()
            if drained:
                self._end_drained()
            if validated:
                metrics |= self._validate()
            self.checkpoints.poll()
            self.ledger.note(number, self.cursor.position, now=logged)
        self.ledger.enter("checkpoint", self.engine.step, self.cursor.position)
        self.checkpoints.finish()
        return metrics

    def _steps(self) -> Iterator[Step]:
        """What to train on, until the last step is done; the phase is data_wait while it is fetched."""
        self._wait_for_data()
        if self.overfit:
            (only,) = self.stream.steps(1, self.cursor.at(0))
            while self.engine.step < self.last_step:
                yield replace(only, waited_s=0.0)  # built once
            return
        watch = self.config.stream.watch_every
        while (count := self.last_step - self.engine.step) > 0:
            with contextlib.closing(self.stream.steps(count, self.cursor)) as steps:
                for step in steps:
                    if self.guards.leaves_out(self.cursor):
                        self.cursor = step.cursor
                        continue
                    yield step
                    self._wait_for_data()
                    if watch and self.engine.step % watch == 0 and self._look_for_growth():
                        self.last_step = self._within_order(self.wanted_step)
                        break  # what was built ahead belongs to the order as it was

    def _wait_for_data(self) -> None:
        self.ledger.enter("data_wait", self.engine.step, self.cursor.position)

    def _compute(self, step: Step) -> StepResult:
        """Forward, backward and update; the update only if the guards let it be made."""
        self.ledger.enter("step" if self.meter.begun else "first_step", self.engine.step, self.cursor.position)
        conversion.before_step(self.engine.module, self.config.conversion, self.engine.step)
        torch.manual_seed(_step_seed(self.config.seed, self.engine.step, self.data_rank))
        loss = self._loss_of(step)
        return self.engine.train_step(step.micro_batches, loss, _weight, self.guards.accepts, _drain_wanted)

    def _leave_out(self, step: Step, result: StepResult) -> None:
        """The batch has not changed the weights, and no later attempt sees it; raises where the policy is another."""
        why = self.guards.refuse(result, self.engine.step, self.cursor, self.steps)
        self._say(f"{why}; the batch is left out")
        self.cursor = step.cursor
        self.last_step = self._within_order(self.wanted_step)

    def _log(self) -> dict[str, float]:
        number = self.engine.step
        metrics = {**self.meter.report(), "goodput": self.ledger.goodput()}
        blend = conversion.blend_of_step(self.config.conversion, number - 1)
        metrics |= {} if blend is None else {"conversion_blend": blend}
        self.tracker.log(number, metrics)
        self._say(self.meter.line(number, self.last_step, metrics))
        return {"step": number, **metrics}

    def _end_drained(self) -> NoReturn:
        """Some rank was asked to end the attempt, and every rank says why, once the save under way is whole.

        Time may be short: the next attempt makes the validation that was due.
        """
        with contextlib.suppress(SaveError):  # which is told; the attempt ends all the same
            self.checkpoints.finish()
        why = first_error(BEACON.wish()[1] or None, self.ranks) or "asked to"
        raise AttemptEnded("drained", why, self.engine.step)

    def _look_for_growth(self) -> bool:
        """Take up versions that were appended to the sources: from this cursor on, on every rank. Whether there are."""
        versions = newest_versions(self.steps.sources, self.ranks)
        if news := grown(self.cursor, versions):
            self._say(news)
        own = self.steps.sources.grown(self.cursor, versions) if self.ranks.is_main else None
        self.cursor = broadcast_object(own, self.ranks)
        self.steps.order(self.cursor)  # raises where this rank finds other contents
        return bool(news)

    def _within_order(self, last_step: int) -> int:
        """The last step there are samples for."""
        left = self.steps.steps_left(self.cursor)
        if left is None:
            return last_step
        left -= self.guards.ahead(self.cursor, self.config.parallel.global_batch_size)
        if self.engine.step + left >= last_step:
            return last_step
        self._say(f"the order of time ends after step {self.engine.step + left}, before step {last_step}")
        return self.engine.step + left

    def _loss_of(self, step: Step) -> partial[LossParts]:
        chunk, most_targets = self.config.parallel.loss_chunk, 0
        if chunk is not None and self.config.parallel.zero_stage == 3:  # ranks gather the heads for every chunk
            own = max(int((batch.weight_BT > 0).sum()) for batch in step.micro_batches)
            most_targets = int(all_reduce_max(own, self.ranks))
        distil = self.config.conversion if self.config.conversion.stage == "distil" else None
        return partial(loss_of_batch, device=self.ranks.device, chunk=chunk, most_targets=most_targets, distil=distil)

    def _order(self, cursor: Cursor) -> dict[str, object]:
        return sample_order(self.config, self.steps.sources, cursor)

    def _start_records(self) -> Tracker:
        if self.ranks.is_main:
            keep_config(self.config, self.folder, resumed=self.engine.step > 0)
            save_environment(self.folder, {"world_size": self.ranks.world_size, **self.data.fingerprints()})
        parameters = sum(math.prod(shape) for shape in canonical_shapes(self.engine).values())
        self._say(
            f"{self.config.name}: {parameters:,} parameters, {self.steps.sources.size:,} training samples, "
            f"{self.ranks.world_size} rank(s) on {self.ranks.device.type}, ZeRO {self.config.parallel.zero_stage}, "
            f"{self.config.parallel.precision}, {self.engine.mesh.accumulation_steps} micro batch(es) a step"
        )
        for line in stack_lines(self.config.model, self.data.vocabulary(self.config), self.ranks.device):
            self._say(line)
        self.ledger.start(self.ranks.world_size, self.engine.step)
        return Tracker(self.config, self.folder, self.ranks.is_main, self.engine.step, self.ledger.attempt)

    def _validation_missing(self) -> bool:
        """Whether the attempt before ended between the save of this step and the validation that was due at it."""
        number = self.engine.step
        due = number > 0 and (number == self.last_step or _due(number, self.config.train.evaluate_every))
        return due and broadcast_object(not self.tracker.has(number, "valid"), self.ranks)

    def _validate(self) -> dict[str, float]:
        """Ranking metrics of the validation split on all ranks; names the best checkpoint, which is saved already."""
        options = self.config.evaluation
        self.validated = self.engine.step
        self.ledger.enter("validation", self.engine.step, self.cursor.position)
        with self.engine.gathered() as module:
            module.eval()
            ranker = self.evaluator.model_ranker(as_decoder(module), self.ranks.device)
            result = self.evaluator.run(ranker, self.ranks, options.max_users)[SUBSETS[0]]
            module.train()
        self.tracker.log(self.engine.step, {**result.means, "requests": result.requests}, kind="valid")
        value = result.means[options.best_metric]
        better = self.checkpoints.found(self.engine.step, options.best_metric, value)
        mark = ", the best so far" if better else ""
        self._say(f"validation at step {self.engine.step}: {options.best_metric} {value:.4f}{mark}")
        return {f"valid_{name}": number for name, number in result.means.items()}

    def _save(self) -> None:
        self.ledger.enter("checkpoint", self.engine.step, self.cursor.position)
        self.checkpoints.save(self.cursor, self._order(self.cursor), self.guards.state())

    def _record(self, kind: str, **fields: Any) -> None:
        """What became of checkpoints; wandb gets what they keep."""
        self.ledger.record(kind, **fields)
        if kind == "checkpoint":
            self.tracker.kept(fields["step"])

    def _say(self, message: str) -> None:
        if self.ranks.is_main:
            print_message(message)


def _weight(batch: Batch) -> float:
    return batch.weight


def _drain_wanted() -> bool:
    return BEACON.wish()[0] == DRAIN


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout of every step and data rank has its own seed, so that a resumed run needs no saved generator."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{rank}".encode())
