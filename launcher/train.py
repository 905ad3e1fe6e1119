"""The training function. It reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, and nothing else about
where it runs; `onetrain debug`, the Ray worker group and torchrun all call it.
"""

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import xxhash
from torch import nn

from onetrain.data.batch import Batch
from onetrain.data.cursor import Cursor
from onetrain.data.steps import StepBuilder
from onetrain.data.stream import Step
from onetrain.launcher import conversion
from onetrain.launcher.config import config_difference, load_config, run_folder, save_config
from onetrain.launcher.console import print_message, print_warning
from onetrain.launcher.environment import environment
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.evaluator import SUBSETS, Evaluator
from onetrain.launcher.job import PreparedData, build_model, model_inputs, set_numerics
from onetrain.launcher.lifelong import check_kernels, stack_lines
from onetrain.launcher.meter import Meter
from onetrain.launcher.options import RunConfig
from onetrain.launcher.saving import RunCheckpoints
from onetrain.launcher.stream import grown, newest_versions, open_stream, sample_order, stream_spec
from onetrain.launcher.tracking import Tracker
from onetrain.model.decoder import SidDecoder
from onetrain.model.ksa.conversion import distillation_loss
from onetrain.model.loss import LossParts, training_loss
from onetrain.model.options import ConversionOptions
from onetrain.parallel import process_group
from onetrain.parallel.deepspeed_config import check_options
from onetrain.parallel.engine import Engine
from onetrain.parallel.optimizer_state import canonical_shapes
from onetrain.parallel.process_group import Ranks, all_reduce_max, broadcast_object


def train(config: RunConfig, *, stop_after: int | None = None, overfit: bool = False) -> dict[str, float]:
    """Train to `train.steps`, going on from the run's newest checkpoint; returns the last metrics.

    `stop_after` ends the run after so many optimizer steps of the whole schedule; `overfit` trains on the first global
    batch again and again. Raises ConfigError, DataError or ParallelError, where it can before the first step.
    """
    ranks = process_group.start(config.parallel.collective_timeout_s)
    try:
        check_options(config.parallel, ranks.world_size, config.model)  # before data are read and a model is built
        check_kernels(config.model, ranks.device)
        set_numerics(config)
        with _Run(config, ranks, overfit) as run:
            return run.train(min(config.train.steps, stop_after or config.train.steps))
    finally:
        process_group.stop()


class _Run:
    """One attempt at a run, on one rank."""

    def __init__(self, config: RunConfig, ranks: Ranks, overfit: bool) -> None:
        self.config, self.ranks, self.overfit = config, ranks, overfit
        self.folder = run_folder(config)
        self.data = PreparedData.open(config)
        self.data.builder(config)  # refuses features and pathways that the data lack
        model = build_model(config, self.data)
        conversion.prepare(model, config.conversion)
        self.engine = Engine(model, config.parallel, config.optimizer, ranks, config.train.steps)
        self.data_rank = self.engine.mesh.data_rank(ranks.rank)
        spec = stream_spec(config, self.data, self.engine.mesh)
        self.steps = StepBuilder(broadcast_object(spec if ranks.is_main else None, ranks))  # equal to the last bit
        self.checkpoints = RunCheckpoints(config, ranks, self.engine, self.data, self._say)
        restored = self.checkpoints.restore(self._order)
        self.cursor = Cursor() if restored is None else restored.cursor
        self._look_for_growth()
        self.stream = open_stream(config, self.steps, self.data_rank, self._say)
        self.evaluator = Evaluator(self.data, config, "valid")
        self.meter = Meter(config, self.data.vocabulary(config), self.engine)
        self.tracker = self._start_records()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.stream.close()
        self.tracker.close(0 if error is None else getattr(error, "exit_code", 1))
        self.engine.close()

    def train(self, last_step: int) -> dict[str, float]:
        """Optimizer steps up to `last_step`, with logs, validations and checkpoints on the way."""
        options = self.config.train
        metrics: dict[str, float] = {"step": self.engine.step}
        self.wanted_step, self.last_step = last_step, self._within_order(last_step)
        if self.engine.step >= last_step:
            self._say(f"nothing left to do: {self.engine.step} steps are done, and {last_step} were asked for")
        for step in self._steps():
            with self.meter.step(step):
                conversion.before_step(self.engine.module, self.config.conversion, self.engine.step)
                torch.manual_seed(_step_seed(self.config.seed, self.engine.step, self.data_rank))
                result = self.engine.train_step(step.micro_batches, self._loss_of(step), lambda batch: batch.weight)
            self.cursor = step.cursor
            number, final = self.engine.step, self.engine.step == self.last_step
            self.meter.add(result)
            if number % options.log_every == 0 or final:
                metrics = {"step": number, **self.meter.report()}
                blend = conversion.blend_of_step(self.config.conversion, number - 1)
                metrics |= {} if blend is None else {"conversion_blend": blend}
                self.tracker.log(number, {name: value for name, value in metrics.items() if name != "step"})
                self._say(self.meter.line(number, self.last_step, metrics))
            validated = final or (options.evaluate_every > 0 and number % options.evaluate_every == 0)
            if validated or (options.checkpoint_every > 0 and number % options.checkpoint_every == 0):
                self._save()
                if validated:
                    metrics |= self._validate()
            self.checkpoints.poll()
        self.checkpoints.finish()
        return metrics

    def _steps(self) -> Iterator[Step]:
        if self.overfit:
            (only,) = self.stream.steps(1, self.cursor.at(0))
            while self.engine.step < self.last_step:
                yield replace(only, waited_s=0.0)  # built once
            return
        watch = self.config.stream.watch_every
        while (count := self.last_step - self.engine.step) > 0:
            with contextlib.closing(self.stream.steps(count, self.cursor)) as steps:
                for step in steps:
                    yield step
                    if watch and self.engine.step % watch == 0 and self._look_for_growth():
                        self.last_step = self._within_order(self.wanted_step)
                        break  # what was built ahead belongs to the order as it was

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
        if left is None or self.engine.step + left >= last_step:
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
            self.folder.mkdir(parents=True, exist_ok=True)
            self._warn_of_changes()
            save_config(self.config, self.folder / "config.yaml")
            details = {**environment(), "world_size": self.ranks.world_size, **self.data.fingerprints()}
            (self.folder / "environment.json").write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
        parameters = sum(math.prod(shape) for shape in canonical_shapes(self.engine).values())
        self._say(
            f"{self.config.name}: {parameters:,} parameters, {self.steps.sources.size:,} training samples, "
            f"{self.ranks.world_size} rank(s) on {self.ranks.device.type}, ZeRO {self.config.parallel.zero_stage}, "
            f"{self.config.parallel.precision}, {self.engine.mesh.accumulation_steps} micro batch(es) a step"
        )
        for line in stack_lines(self.config.model, self.data.vocabulary(self.config), self.ranks.device):
            self._say(line)
        return Tracker(self.config, self.folder, self.ranks.is_main, self.engine.step)

    def _warn_of_changes(self) -> None:
        before = self.folder / "config.yaml"
        if self.engine.step == 0 or not before.exists():
            return
        try:
            old_config = load_config(before)
        except ConfigError as error:
            print_warning(f"cannot tell what changed since the run was started; an older version wrote {error}")
            return
        for key, old, new in config_difference(old_config, self.config):
            print_warning(f"resumed with {key} = {new}; it was {old}")

    def _validate(self) -> dict[str, float]:
        """Ranking metrics of the validation split on all ranks; names the best checkpoint, which is saved already."""
        options = self.config.evaluation
        with self.meter.pause(), self.engine.gathered() as module:
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
        with self.meter.pause():
            self.checkpoints.save(self.cursor, self._order(self.cursor), {})

    def _say(self, message: str) -> None:
        if self.ranks.is_main:
            print_message(message)


def loss_of_batch(
    module: nn.Module,
    batch: Batch,
    device: torch.device,
    chunk: int | None = None,
    most_targets: int = 0,
    distil: ConversionOptions | None = None,
) -> LossParts:
    """Weighted loss sum, weight sum and weighted sums of statistics of one micro batch."""
    context, targets = model_inputs(batch, device)
    if distil is not None:
        return distillation_loss(as_decoder(module), context, targets, distil, chunk, most_targets)
    return training_loss(module(context, targets), as_decoder(module).options, chunk, most_targets)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Dropout of every step and data rank has its own seed, so that a resumed run needs no saved generator."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{step}/{rank}".encode())


def as_decoder(module: nn.Module) -> SidDecoder:
    """The engine's module by its type."""
    assert isinstance(module, SidDecoder)
    return module
