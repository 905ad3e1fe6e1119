"""Wires the stream of training steps: what builds them, where a rank takes them from, and when sources grow."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from onetrain.data.cursor import Cursor
from onetrain.data.sample_table import ORDER_KEYS
from onetrain.data.sources import Sources
from onetrain.data.steps import Cost, StepBuilder, StreamSpec
from onetrain.data.stream import LocalStream, Stream
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.features import feature_names
from onetrain.launcher.job import PreparedData
from onetrain.launcher.lifelong import aligned
from onetrain.launcher.options import RunConfig
from onetrain.model.flops import forward_flops
from onetrain.model.options import Vocabulary
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.process_group import Ranks, all_reduce_max


def stream_spec(config: RunConfig, data: PreparedData, mesh: Mesh) -> StreamSpec:
    """What any process needs to build the steps of this run on this mesh."""
    return StreamSpec(
        prepared=config.data.prepared,
        stream=config.stream,
        batch=aligned(config.batch, config.model, len(data.sids.sizes)),
        features=feature_names(config.model),
        seed=config.seed,
        global_batch_size=config.parallel.global_batch_size,
        micro_batches=mesh.accumulation_steps,
        ranks=mesh.data_parallel,
        cost=sample_cost(config, data.vocabulary(config)),
        sid_fingerprint=data.sids.fingerprint,
    )


def open_stream(config: RunConfig, builder: StepBuilder, data_rank: int, warn: Callable[[str], None]) -> Stream:
    """Where this rank takes its steps from: itself, or the run's data service. ConfigError where there can be none."""
    if not config.stream.service.actors:
        return LocalStream(builder, data_rank)
    import ray  # takes a second, which runs without a service need not pay

    from onetrain.data.service.client import ServiceStream

    if not ray.is_initialized():
        raise ConfigError(
            f"stream.service.actors is {config.stream.service.actors}, but this process is no part of a Ray cluster. "
            "Start the run with `onetrain train`, or set stream.service.actors to 0."
        )
    return ServiceStream(builder, data_rank, config.name, warn)


def sample_cost(config: RunConfig, vocabulary: Vocabulary) -> Cost:
    """Training FLOPs of a sample of one target by its length: a parabola through three lengths.

    Every pathway is as long as the sample, or as it can be.
    """
    flops, longest = forward_flops(config.model, vocabulary), max(vocabulary.pathways.values())

    def cost(length: int) -> float:
        events = {name: float(min(length, most)) for name, most in vocabulary.pathways.items()}
        work = flops.work(targets=1, target_positions=0, rows=1, events=events)
        return flops.training(targets=1, target_positions=work.positions, rows=1, events=events)

    half, whole = max(longest // 2, 1), max(longest, 2)
    fixed = cost(0)
    slopes = (cost(half) - fixed) / half, (cost(whole) - fixed) / whole
    square = max((slopes[1] - slopes[0]) / (whole - half), 0.0)
    return Cost(max(fixed, 1.0), max(slopes[1] - square * whole, 0.0), square)


def newest_versions(sources: Sources, ranks: Ranks) -> dict[str, int]:
    """The newest version of every source that all ranks see; a collective of all ranks."""
    seen = sources.newest()
    fewest = [-int(all_reduce_max(-float(version), ranks)) for version in seen.values()]
    return dict(zip(seen, fewest, strict=True))


def sample_order(config: RunConfig, sources: Sources, cursor: Cursor) -> dict[str, Any]:
    """All that decides which sample stands at which position, beside the cursor itself; as JSON."""
    batch = asdict(config.batch)
    return {
        "seed": config.seed,
        **{f"contents of {name or 'data.prepared'}": v for name, v in sources.contents(cursor.versions()).items()},
        **{f"batch.{key}": batch[key] for key in ORDER_KEYS},
        "stream.order": config.stream.order,
        "stream.shuffle_window": config.stream.shuffle_window,
        "stream.mixture": {name: source.parts for name, source in config.stream.mixture.items()},
    }


def grown(cursor: Cursor, versions: dict[str, int]) -> str:
    """One line on sources that are at other versions from this cursor on, or nothing."""
    known = cursor.versions()
    new = [f"{name or 'data.prepared'} at version {v}" for name, v in versions.items() if known.get(name, 0) != v]
    return f"from sample {cursor.position} on: {', '.join(new)}" if new else ""
