"""Speed and loss between two log lines: throughput, data wait, padding, model FLOPs, per-level loss and accuracy."""

import time
from collections import Counter
from collections.abc import Callable

import torch

from onetrain.data.batch import Batch
from onetrain.data.stream import Step
from onetrain.launcher.console import print_warning
from onetrain.launcher.data_metrics import DataMetrics
from onetrain.launcher.options import RunConfig
from onetrain.launcher.router_metrics import RouterMetrics
from onetrain.model.flops import forward_flops
from onetrain.model.ksa.sizes import StackWork, stack_work, total
from onetrain.model.lifelong import read_counts
from onetrain.model.moe import routers
from onetrain.model.options import Vocabulary
from onetrain.model.parameter_counts import stacks
from onetrain.parallel.engine import Engine, StepResult
from onetrain.parallel.process_group import all_reduce_sum


class Meter:
    """Sums since the last report; `report` is a collective of all ranks."""

    def __init__(
        self, config: RunConfig, vocabulary: Vocabulary, engine: Engine, stood_still: Callable[[], float]
    ) -> None:
        """`stood_still`: seconds until now that do not count as training, for checkpoints and validations."""
        self.config, self.vocabulary, self.ranks = config, vocabulary, engine.ranks
        self.stood_still = stood_still
        self.readers = engine.mesh.replica_ranks  # each counts the samples that all of them read
        sparse = config.model.moe.experts > 0
        self.routers = RouterMetrics(config, engine.mesh, routers(engine.module)) if sparse else None
        self.flops = forward_flops(config.model, vocabulary)
        self._data = DataMetrics(engine.ranks, self.readers)
        self._begun = time.perf_counter()
        self._first_step_done: float | None = None
        self._steps_since_first = 0
        self._reset()

    @property
    def begun(self) -> bool:
        """Whether a step has been done."""
        return self._first_step_done is not None

    @property
    def steps(self) -> int:
        """Steps since the last report."""
        return len(self._results)

    def add(self, step: Step, result: StepResult) -> None:
        """One optimizer step that was done: what it worked on, and its outcome."""
        self._data.add(step)
        ksa = self.config.model.ksa
        for batch in step.micro_batches:
            if not batch.weight:  # stands in for samples that are not there
                continue
            self._targets += int((batch.weight_BT > 0).sum())
            self._positions += self._visible(batch)
            self._events.update(batch.n_events)
            for name, lengths in self._lengths(batch).items():
                self._work[name] = total([self._work[name], *(stack_work(length, ksa[name]) for length in lengths)])
            self._samples += batch.rows
            self._micro_batches += 1
        self._results.append(result)
        if self.routers is not None:
            self.routers.add(result.stats)
        now = time.perf_counter()
        if self._first_step_done is None:
            self._first_step_done = now  # start-up and warm-up stay out of the estimate
        else:
            self._steps_since_first += 1

    def report(self) -> dict[str, float]:
        """Means since the last report, over all ranks; starts the next interval. Warns of experts that have died."""
        paused = self.stood_still() - self._stood_still_before
        seconds = max(time.perf_counter() - self._started - paused, 1e-9)
        names = list(self.vocabulary.pathways)
        local = [self._targets, self._positions, self._samples, self._micro_batches, *(self._events[n] for n in names)]
        of_stacks = [count for work in self._work.values() for count in work]
        counts = all_reduce_sum([*map(float, local), *of_stacks], self.ranks)
        targets, positions, samples, micro_batches, *counts = (count / self.readers for count in counts)
        events, counts, width = counts[: len(names)], counts[len(names) :], len(StackWork._fields)
        weight = max(sum(result.weight for result in self._results), 1e-12)
        last = self._results[-1]
        flops = self.flops.training(
            targets=targets,
            target_positions=positions,
            rows=samples,
            events=dict(zip(names, events, strict=True)),
            micro_batches=micro_batches,
            histories={n: StackWork(*counts[i * width : (i + 1) * width]) for i, n in enumerate(self._work)},
        )
        report = {
            "loss": sum(result.loss * result.weight for result in self._results) / weight,
            "grad_norm": last.grad_norm,
            "learning_rate": last.learning_rate,
            **self._means(weight),
            "samples_per_s": samples / seconds,
            "targets_per_s": targets / seconds,
            "tokens_per_s": targets * self.vocabulary.levels / seconds,
            "step_s": seconds / len(self._results),
            **self._data.report(seconds),
            "model_gflops_per_s": flops / seconds / 1e9,
        }
        if self.routers is not None:
            report |= self.routers.report()
            if self.routers.alarm is not None and self.ranks.is_main:
                print_warning(self.routers.alarm)
        self._reset()
        return report

    def _means(self, weight: float) -> dict[str, float]:
        """The loss function's weighted sums by their names in the log."""
        names = {
            "level_loss": "loss_level_{}",
            "level_hits": "accuracy_level_{}",
            "mtp_loss": "loss_mtp_{}",
            "contrastive_loss": "loss_contrastive",
            "contrastive_hits": "accuracy_contrastive",
            "router_loss": "loss_router",
            "conversion_ce": "conversion_ce",
            "conversion_kl": "conversion_kl",
            "conversion_mse": "conversion_mse",
        }
        means = {}
        for key in [key for key in names if key in self._results[0].stats]:
            total = torch.stack([result.stats[key] for result in self._results]).sum(0) / weight
            for index, value in enumerate(total.flatten().tolist()):
                means[names[key].format(index + 1 if key == "mtp_loss" else index)] = value
        return means

    def _visible(self, batch: Batch) -> int:
        """Context positions that the targets of a batch see, summed over targets."""
        options = self.config.model
        real_BT = batch.weight_BT > 0
        per_event, lengths = self.vocabulary.levels if options.flatten_codes else 1, self._lengths(batch)
        visible = int(real_BT.sum())  # the static position
        for name, events in batch.sequences.items():
            if name in lengths:
                read_B = torch.tensor([sum(read_counts(length, options.ksa[name])) for length in lengths[name]])
                visible += int((read_B * real_BT.sum(1)).sum())
                continue
            if name in options.query_formers:
                visible += options.query_formers[name].queries * int(real_BT.sum())
                continue
            real_BN = torch.arange(events.index_BN.shape[1]) < events.length_B[:, None]
            seen_BTN = (events.index_BN[:, None] < batch.end_BT[..., None]) & real_BN[:, None] & real_BT[..., None]
            visible += per_event * int(seen_BTN.sum())
        return visible

    def _lengths(self, batch: Batch) -> dict[str, list[int]]:
        """Of every lifelong pathway the lengths of its histories, in what its stack takes for a token."""
        per_event = self.vocabulary.levels if self.config.model.flatten_codes else 1
        return {name: (batch.sequences[name].length_B * per_event).tolist() for name in self._work}

    def line(self, step: int, last_step: int, metrics: dict[str, float]) -> str:
        """One line of progress with the time left."""
        load = metrics.get("experts/load_max")
        experts = "" if load is None else f"expert load max {load:.2f}  "
        levels = "/".join(f"{metrics[f'accuracy_level_{level}']:.3f}" for level in range(self.vocabulary.levels))
        return (
            f"step {step}/{last_step}  loss {metrics['loss']:.4f}  accuracy {levels}  {experts}"
            f"{metrics['samples_per_s']:.0f} samples/s  data wait {metrics['data_wait']:.1%}  "
            f"{_duration(self._seconds_left(last_step - step))} left"
        )

    def _seconds_left(self, steps: int) -> float:
        """From the pace since the first step, validations and checkpoints included."""
        if self._first_step_done is None or self._steps_since_first == 0:
            return steps * (time.perf_counter() - self._begun)
        return steps * (time.perf_counter() - self._first_step_done) / self._steps_since_first

    def _reset(self) -> None:
        self._started = time.perf_counter()
        self._stood_still_before = self.stood_still()
        self._targets = self._positions = self._samples = self._micro_batches = 0
        self._events: Counter[str] = Counter()
        self._work = dict.fromkeys(stacks(self.config.model, self.vocabulary), StackWork())
        self._results: list[StepResult] = []


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
