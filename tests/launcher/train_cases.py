"""A job small enough to train in seconds, and what a run leaves behind."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from onetrain.data.options import BatchOptions, DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.launcher.config import run_folder
from onetrain.launcher.options import EvaluationOptions, RunConfig, TrackingOptions, TrainOptions
from onetrain.launcher.tokenize import tokenize
from onetrain.launcher.train import train
from onetrain.model.options import ModelOptions, TokenizerOptions
from onetrain.parallel import process_group
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool, free_port


def make_job(folder: Path) -> RunConfig:
    """A prepared and tokenized simulated shop, and the configuration that made it."""
    shop = SimulatorOptions(users=240, items=120, events_per_user=10, themes=12, embedding_dim=8)
    config = RunConfig(
        name="job",
        storage_path=str(folder / "runs"),
        data=DataOptions(
            prepared=str(folder / "prepared"),
            source=SourceOptions(reader="simulator", events=str(folder / "logs"), simulator=shop),
        ),
        tokenizer=TokenizerOptions(codebook=(8, 8, 8), iterations=10),
        batch=BatchOptions(max_context=10),
        model=ModelOptions(d_model=32, n_layers=2, n_heads=2, embed_dim=16, features=("sid", "behaviour")),
        optimizer=OptimizerOptions(learning_rate=2e-3, warmup_steps=5),
        parallel=ParallelOptions(global_batch_size=32, micro_batch_size=8),
        train=TrainOptions(steps=40, log_every=5),
        evaluation=EvaluationOptions(ks=(5, 10), beam_size=12),
        tracking=TrackingOptions(wandb="disabled"),
    )
    prepare(config.data)
    tokenize(config)
    return config


def changed(config: Any, **values: Any) -> Any:
    """The configuration with other values; `model__dropout=0.1` reaches into a section."""
    for key, value in values.items():
        section, _, rest = key.partition("__")
        config = replace(config, **{section: changed(getattr(config, section), **{rest: value}) if rest else value})
    return config


def train_on(pool: WorkerPool, config: RunConfig, stop_after: int | None = None) -> dict[str, float]:
    """`train` on every rank of a pool; the result of rank 0."""
    return pool.run(_train_as_rank, config, stop_after, free_port())[0]


def _train_as_rank(ranks: Ranks, config: RunConfig, stop_after: int | None, port: int) -> dict[str, float]:
    process_group.stop()  # the pool's own
    os.environ["MASTER_PORT"] = str(port)  # a store serves one process group
    return train(config, stop_after=stop_after)


def records(config: RunConfig, kind: str = "train") -> list[dict[str, Any]]:
    """The records of one kind in the run's metrics.jsonl."""
    lines = (run_folder(config) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def checkpoint(config: RunConfig, step: int) -> Path:
    """The run's checkpoint after `step` steps."""
    return run_folder(config) / "checkpoints" / f"step_{step:08d}"
