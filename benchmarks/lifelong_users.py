"""What the benchmarks on simulated lifelong users share: data, runs in two stages, and accuracy on held-out users.

Legend: B requests, T target slots, M targets, L levels.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onetrain.data.samples import Sample, SampleIndex, Split
from onetrain.data.simulate_lifelong import BEHAVIOURS, BUY
from onetrain.launcher.checkpoints import find_checkpoint
from onetrain.launcher.config import load_config, run_folder
from onetrain.launcher.job import PreparedData, build_model, model_inputs
from onetrain.launcher.options import RunConfig
from onetrain.model.loss import cross_entropies
from onetrain.parallel import checkpoint as checkpoints

FOLDER = Path("configs/simulator/lifelong")
CHUNK = 8  # of model.ksa.lifelong in all files of FOLDER
EVALUATED = 8  # requests of a forward


@dataclass(frozen=True)
class Outcome:
    """Held-out targets, given all codes before the one in question."""

    hit_LM: np.ndarray
    distance_M: np.ndarray  # events from the deciding event to the request
    alone_M: np.ndarray  # bool: no other deciding event lies in the same chunk of CHUNK events

    @property
    def accuracy(self) -> list[float]:
        """Of every level."""
        return [float(hit_M.mean()) for hit_M in self.hit_LM]

    def shared(self, alone: bool) -> float | None:
        """Accuracy of level 1 where the deciding event is (or is not) alone in its chunk; None without such targets."""
        of = self.alone_M == alone
        return float(self.hit_LM[1][of].mean()) if of.any() else None

    def by_distance(self, edges: Sequence[float]) -> list[tuple[float, float]]:
        """(geometric middle of the bin, accuracy of level 1) of every bin that holds a target."""
        bins = [
            (low, high, (self.distance_M >= low) & (self.distance_M < high)) for low, high in itertools.pairwise(edges)
        ]
        return [((low * high) ** 0.5, float(self.hit_LM[1][of].mean())) for low, high, of in bins if of.any()]


def prepare_data(config: RunConfig) -> None:
    """Simulate, prepare and tokenize, unless it is there."""
    from onetrain.data.prepare import prepare
    from onetrain.launcher.tokenize import tokenize

    if not (Path(config.data.prepared) / "sids").exists():
        prepare(config.data)
        tokenize(config)


def train_stages(stages: Sequence[Path], name: str, seed: int, changes: Sequence[str]) -> list[RunConfig]:
    """Train on the data of each file, from the weights of the one before; the runs' configurations.

    A run that is complete is not repeated. Seconds of training go to seconds.json of a run's folder.
    """
    from onetrain.launcher.train import train

    configs: list[RunConfig] = []
    for path in stages:
        own = [f"name={path.stem}_{name}_seed_{seed}", f"seed={seed}", *changes]
        if configs:
            own.append(f"train.warm_start={find_checkpoint(run_folder(configs[-1]), 'latest')}")
        config = load_config(path, own)
        prepare_data(config)
        record = run_folder(config) / "seconds.json"
        if not record.exists():
            started, cpu = time.perf_counter(), time.process_time()
            train(config)
            seconds = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
            record.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
        configs.append(config)
    return configs


def curve(config: RunConfig) -> list[tuple[int, float]]:
    """(step, level-1 accuracy since the last record) of a run: on users that it sees for the first time."""
    lines = (run_folder(config) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return [(record["step"], record["accuracy_level_1"]) for record in records]


@torch.no_grad()
def outcome(trained: RunConfig, config: RunConfig, split: Split = "test") -> Outcome:
    """The newest weights of the run `trained` on the data of `config`."""
    torch.set_num_threads(config.train.threads_per_worker)
    data = PreparedData.open(config)
    folder = find_checkpoint(run_folder(trained), "latest")
    data.check_sids(checkpoints.read_state(folder), folder)
    model = build_model(config, data)
    checkpoints.load_weights(model, folder)
    model.eval()
    builder, index = data.builder(config), SampleIndex(data.reader, split, config.batch)
    hits, places = [], []
    for start in range(0, len(index), EVALUATED):
        ids = range(start, min(start + EVALUATED, len(index)))
        context, targets = model_inputs(builder.build(index.rows(ids)), torch.device("cpu"))
        hits.append(cross_entropies(model(context, targets))[1].numpy())
        places += [_deciding(index[number], data) for number in ids]
    distance_M, alone_M = (np.concatenate(parts) for parts in zip(*places, strict=True))
    return Outcome(np.concatenate(hits, axis=1), distance_M, alone_M)


def _deciding(sample: Sample, data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
    """Of every target of a request: the distance of the `buy` of its theme, and whether that is alone in its chunk."""
    theme = data.sids.codes_IL[sample.user.item, 0]
    bought = np.flatnonzero(sample.user.behaviour == data.manifest.behaviours.index(BEHAVIOURS[BUY]))
    place = {theme[event]: event for event in bought}
    own = np.array([place[theme[target]] for target in sample.requests[0].targets])
    of_chunk = np.bincount((bought - sample.start) // CHUNK)
    return sample.end - own, of_chunk[(own - sample.start) // CHUNK] == 1
