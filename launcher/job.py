"""What training, debugging and evaluation share: the prepared data of a job, its model, and batches as model inputs."""

import dataclasses
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from onetrain.data.batch import GAP_BUCKETS, Batch, BatchBuilder
from onetrain.data.manifest import Manifest
from onetrain.data.shards import ShardReader, read_items
from onetrain.data.sids import SidMap
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.model.inputs import Context, Targets
from onetrain.model.lazy_decoder import LazyDecoder
from onetrain.model.options import Vocabulary


@dataclass(frozen=True)
class PreparedData:
    """Shards, item table and SID map of one job, whose fingerprints match."""

    folder: Path
    manifest: Manifest
    reader: ShardReader
    sids: SidMap

    @classmethod
    def open(cls, config: RunConfig, *, checksum: bool = True) -> "PreparedData":
        """Open and verify the folder data.prepared; DataError for what is missing, damaged or foreign."""
        folder = Path(config.data.prepared)
        manifest = Manifest.load(folder)
        sids = SidMap.load(str(folder / "sids"))
        sids.check_against(manifest)
        return cls(folder, manifest, ShardReader(folder, manifest, checksum=checksum), sids)

    @cached_property
    def train_count_I(self) -> NDArray[np.int64]:  # noqa: N802
        """Training events of every item."""
        return read_items(self.folder).column("train_count").to_numpy()

    def vocabulary(self, config: RunConfig) -> Vocabulary:
        """Sizes that the model takes from the data."""
        return Vocabulary(
            codes=self.sids.sizes,
            n_items=self.manifest.items.rows,
            n_behaviours=len(self.manifest.behaviours),
            n_scenarios=len(self.manifest.scenarios),
            max_context=config.batch.max_context,
            n_gaps=GAP_BUCKETS,
        )

    def builder(self, config: RunConfig) -> BatchBuilder:
        """Builds batches with this job's SIDs and target weights."""
        return BatchBuilder(self.sids, config.batch, self.manifest.behaviours)

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint carries to know its data again."""
        return {"data_fingerprint": self.manifest.fingerprint, "sid_fingerprint": self.sids.fingerprint}

    def check_sids(self, state: dict[str, str], checkpoint: Path) -> None:
        """Raises ConfigError, naming both sides, if a checkpoint was trained with another SID map."""
        if state["sid_fingerprint"] != self.sids.fingerprint:
            raise ConfigError(
                f"Checkpoint {checkpoint} was trained with SID map {state['sid_fingerprint']}, but {self.folder}/sids "
                f"is {self.sids.fingerprint}: its codes mean other items. Point data.prepared to the folder that it "
                "was trained on, or train anew under another name."
            )


def build_model(config: RunConfig, data: PreparedData) -> LazyDecoder:
    """The model with initial weights that depend on the seed alone."""
    torch.manual_seed(config.seed)
    return LazyDecoder(config.model, data.vocabulary(config))


def model_inputs(batch: Batch, device: torch.device) -> tuple[Context, Targets]:
    """A batch as the model reads it, on `device`."""
    context = Context(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(Context)})
    return context.to(device), Targets(batch.target_sid_BTL, batch.end_BT, batch.weight_BT).to(device)


def set_numerics(config: RunConfig) -> None:
    """Threads and determinism of this process; the same in every front end (Ray would choose its own)."""
    torch.set_num_threads(config.train.threads_per_worker)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
