"""`onetrain evaluate`: a checkpoint's ranking metrics, beside the floors that counting reaches and, for simulated logs,
the ceiling that the simulator itself sets.

Legend: B requests, T target slots.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from onetrain.cluster.atomic import write_atomically
from onetrain.cluster.event_log import LEDGER, read_log
from onetrain.data.batch import Batch
from onetrain.data.floors import FLOORS, Floors
from onetrain.data.samples import Sample, Split
from onetrain.data.shards import read_items
from onetrain.data.simulate import read_oracle
from onetrain.launcher.checkpoints import find_checkpoint, run_store
from onetrain.launcher.config import run_folder
from onetrain.launcher.evaluator import Evaluator, Progress, Ranker, SubsetMetrics
from onetrain.launcher.job import PreparedData, build_model
from onetrain.launcher.ledger import last_attempt
from onetrain.launcher.options import RunConfig
from onetrain.launcher.tracking import Tracker
from onetrain.model.ranking import NOT_FOUND, distinct_targets, ranking_metrics
from onetrain.parallel import checkpoint as checkpoints
from onetrain.parallel import process_group

Results = dict[str, dict[str, SubsetMetrics]]  # who ranks -> subset -> means


@dataclass(frozen=True)
class EvaluationTable:
    """Rows of text and numbers to print, and everything measured to keep."""

    title: str
    columns: list[str]
    rows: list[list[str | float]]
    notes: list[str]
    step: int  # of the checkpoint
    split: Split
    record: dict[str, object] = field(default_factory=dict)

    def save(self, config: RunConfig) -> Path:
        """Write all metrics to <run>/evaluation_<split>.json, then add the table to the run's JSONL and wandb."""
        name = f"evaluation_{self.split}"
        path = run_folder(config) / f"{name}.json"
        write_atomically(path, json.dumps(self.record, indent=1) + "\n")
        attempt = max(last_attempt(read_log(run_folder(config) / LEDGER)), 1)
        with Tracker(config, run_folder(config), is_main=True, start_step=None, attempt=attempt) as tracker:
            tracker.table(name, self.columns, self.rows, self.step)
        return path


def evaluate(
    config: RunConfig,
    checkpoint: str,
    split: Split,
    progress: Progress | None = None,
    max_requests: int | None = None,
) -> EvaluationTable:
    """Evaluate `checkpoint` ("best", "latest" or a folder) on the requests of `split`, in this process.

    With `max_requests`, on the first of a fixed shuffle, the same for every model of these data.
    Raises ConfigError for a checkpoint that is not there or belongs to another SID map, DataError for damaged data.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data = PreparedData.open(config)
    folder = find_checkpoint(run_folder(config), checkpoint, run_store(config))
    state = checkpoints.read_state(folder)
    data.check_sids(state, folder)
    ranks = process_group.start(config.parallel.collective_timeout_s)
    try:
        model = build_model(config, data)
        checkpoints.load_weights(model, folder)
        model.to(ranks.device).eval()
        evaluator = Evaluator(data, config, split)
        rankers = _floor_rankers(data, config)
        rankers["model"] = evaluator.model_ranker(model, ranks.device)
        if config.data.source.reader == "simulator" and config.data.split.kind == "leave_one_out" and split == "test":
            rankers["oracle (ceiling)"] = _oracle_ranker(data, config)
        results: Results = {}
        for name, ranker in rankers.items():
            stage = (lambda _, done, total, name=name: progress(name, done, total)) if progress else None
            results[name] = evaluator.run(ranker, ranks, max_requests, stage)
    finally:
        process_group.stop()
    return _table(config, folder, state["step"], split, results)


def _floor_rankers(data: PreparedData, config: RunConfig) -> dict[str, Ranker]:
    floors = Floors(data.reader, data.manifest.items.rows)

    def ranker(floor: str) -> Ranker:
        def rank(samples: Sequence[Sample], batch: Batch) -> dict[str, Tensor]:
            rank_BT = torch.from_numpy(floors.ranks(floor, samples, batch.target_item_BT.numpy()))
            counted_BT = distinct_targets(batch.target_item_BT, batch.weight_BT > 0)
            return ranking_metrics(rank_BT, counted_BT, config.evaluation.ks)

        return rank

    return {floor: ranker(floor) for floor in FLOORS}


def _oracle_ranker(data: PreparedData, config: RunConfig) -> Ranker:
    """Ranks by the simulator's true next-item probabilities of each user's last event."""
    oracle = read_oracle(config.data.source.events)
    items = read_items(data.folder, data.stream).column("item").cast(pa.string()).to_pylist()
    index = {item: number for number, item in enumerate(items)}
    best = {
        user: [index[item] for item in listed]
        for user, listed in zip(oracle["user"].to_pylist(), oracle["items"].to_pylist(), strict=True)
    }

    def rank(samples: Sequence[Sample], batch: Batch) -> dict[str, Tensor]:
        rank_BT = np.full(batch.target_item_BT.shape, NOT_FOUND, dtype=np.int64)
        for row, sample in enumerate(samples):
            target = int(batch.target_item_BT[row, 0])
            listed = best[sample.user.user]
            if target in listed:
                rank_BT[row, 0] = listed.index(target)
        return ranking_metrics(torch.from_numpy(rank_BT), batch.weight_BT > 0, config.evaluation.ks)

    return rank


def _table(config: RunConfig, folder: Path, step: int, split: Split, results: Results) -> EvaluationTable:
    ks = config.evaluation.ks
    model = results["model"]["all"].means
    one_target = all(model[f"hr@{k}"] == model[f"recall@{k}"] for k in ks)
    kinds = ("recall", "ndcg") if one_target else ("recall", "hr", "ndcg")
    names = [f"{kind}@{k}" for k in ks for kind in kinds] + [f"mrr@{ks[-1]}"]
    rows: list[list[str | float]] = []
    for subset, metrics in results["model"].items():
        for ranked_by, means in results.items():
            rows.append([subset, metrics.requests, ranked_by, *(means[subset].means[name] for name in names)])
    masked = "masked" if config.evaluation.mask_seen else "not masked"
    beams = "as many beams as SIDs" if config.evaluation.beam_size is None else f"{config.evaluation.beam_size} beams"
    notes = [
        f"model: {folder}, {beams}, seen items {masked}; items that share a SID: higher training count first, then id",
        "floors: training counts only, seen items masked, ties count half",
        f"beams of the model: {model['invalid_beams']:.4%} invalid, {model['duplicate_beams']:.4%} duplicate; "
        f"loss {model['loss']:.4f}",
    ]
    if one_target:
        notes.append("HR equals Recall: every request has one target")
    record = {
        "checkpoint": str(folder),
        "split": split,
        "mask_seen": config.evaluation.mask_seen,
        "beam_size": config.evaluation.beam_size,
        "results": {
            ranked_by: {subset: {"requests": m.requests, **m.means} for subset, m in subsets.items()}
            for ranked_by, subsets in results.items()
        },
    }
    return EvaluationTable(
        f"{config.name}: {split}", ["subset", "requests", "ranked by", *names], rows, notes, step, split, record
    )
