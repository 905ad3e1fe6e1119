"""What the log says of the data between two log lines: rates, queue, latency of batches, waiting, padding, sources."""

import numpy as np

from onetrain.data.stream import Step
from onetrain.parallel.process_group import Ranks, all_reduce_max, all_reduce_sum


class DataMetrics:
    """Sums of one rank since the last report; `report` is a collective of all ranks."""

    def __init__(self, ranks: Ranks, readers: int) -> None:
        self._ranks, self._readers = ranks, readers  # ranks that read the same samples
        self.skipped = 0.0  # samples of damaged shards that were left out, over all ranks, since the start
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        """A step that was trained."""
        self._steps.append(step)

    def report(self, seconds: float) -> dict[str, float]:
        """Over all ranks, per second of the interval; starts the next one.

        data_wait: share of the time that ranks stood still for data. queue: steps that were ready beside the one that
        was taken. latency: milliseconds to build a rank's step, the median (mean over ranks) and the 99th percentile
        (of the slowest rank). imbalance: of a rank's padded work, the largest over the mean, minus 1.
        """
        stats = [step.stats for step in self._steps]
        build_ms = [1e3 * stat.seconds for stat in stats]
        names = list(stats[0].sources)
        world = self._ranks.world_size
        waited, queue, padding, median, cost, events, n_bytes, skipped, *sources = all_reduce_sum(
            [
                sum(step.waited_s for step in self._steps),
                sum(step.ready for step in self._steps) / len(stats),
                sum(stat.padding for stat in stats) / len(stats),
                float(np.percentile(build_ms, 50)),
                sum(stat.cost for stat in stats),
                float(sum(stat.events for stat in stats)),
                float(sum(stat.bytes for stat in stats)),
                float(sum(stat.skipped for stat in stats)),
                *(float(sum(stat.sources[name] for stat in stats)) for name in names),
            ],
            self._ranks,
        )
        dearest = all_reduce_max(sum(stat.cost for stat in stats), self._ranks)
        slowest = all_reduce_max(float(np.percentile(build_ms, 99)), self._ranks)
        self.skipped += skipped / self._readers
        self._steps = []
        return {
            "data_wait": waited / world / seconds,
            "padding": padding / world,
            "data/events_per_s": events / self._readers / seconds,
            "data/mb_per_s": n_bytes / self._readers / seconds / 1e6,
            "data/queue": queue / world,
            "data/latency_p50_ms": median / world,
            "data/latency_p99_ms": slowest,
            "data/imbalance": dearest / (cost / world) - 1,
            **({"data/skipped_samples": self.skipped} if self.skipped else {}),
            **{f"data/samples_{name}": count / self._readers for name, count in zip(names, sources, strict=True)},
        }
