"""What training, debugging and evaluation share: the prepared data of a job, its model, and batches as model inputs."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from onetrain.data.batch import Batch, BatchBuilder
from onetrain.data.features import feature_sizes, user_feature_sizes
from onetrain.data.item_table import ItemTable
from onetrain.data.manifest import Manifest, verify_sizes
from onetrain.data.remote import is_remote
from onetrain.data.shards import ShardReader
from onetrain.data.sids import SidMap
from onetrain.data.store import local_folder, open_store
from onetrain.data.stream_options import StreamOptions
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.features import feature_names
from onetrain.launcher.lifelong import aligned
from onetrain.launcher.options import RunConfig
from onetrain.model.build import build
from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.options import Vocabulary


@dataclass(frozen=True)
class PreparedData:
    """Shards, item table and SID map of one job, whose fingerprints match."""

    folder: str  # any fsspec path
    manifest: Manifest
    reader: ShardReader
    sids: SidMap
    stream: StreamOptions

    @classmethod
    def open(cls, config: RunConfig) -> "PreparedData":
        """Open the folder data.prepared; DataError for what is missing, of another size, or foreign.

        Contents are held against their checksums when they are read.
        """
        folder, stream = config.data.prepared, config.stream
        manifest = Manifest.load(folder)
        sids = SidMap.load(f"{folder}/sids", stream)
        sids.check_against(manifest)
        if not is_remote(folder) and stream.damaged == "error":
            verify_sizes(manifest, local_folder(folder))
        return cls(folder, manifest, ShardReader(open_store(folder, stream), manifest), sids, stream)

    @cached_property
    def items(self) -> ItemTable:
        """Training counts and features of every item."""
        return ItemTable.load(self.folder, self.stream)

    @property
    def train_count_I(self) -> NDArray[np.int64]:  # noqa: N802
        """Training events of every item."""
        return self.items.train_count_I

    def vocabulary(self, config: RunConfig) -> Vocabulary:
        """Sizes that the model takes from the data."""
        return Vocabulary(
            codes=self.sids.sizes,
            features=feature_sizes(self.manifest, self.items),
            pathways=config.batch.pathway_lengths,
            user_features=user_feature_sizes(self.manifest),
        )

    def builder(self, config: RunConfig) -> BatchBuilder:
        """Builds batches with this job's SIDs and target weights."""
        batch = aligned(config.batch, config.model, len(self.sids.sizes))
        return BatchBuilder(self.sids, self.manifest, self.items, batch, feature_names(config.model))

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


def build_model(config: RunConfig, data: PreparedData) -> SidDecoder:
    """The model with initial weights that depend on the seed alone.

    Raises ConfigError for a feature that the data lack or whose ids are unbounded and not hashed.
    """
    torch.manual_seed(config.seed)
    try:
        return build(config.model, data.vocabulary(config))
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def model_inputs(batch: Batch, device: torch.device) -> tuple[Context, Targets]:
    """A batch as the model reads it, on `device`."""
    sequences = {
        name: Events(events.sid_BNL, events.index_BN, events.length_B, events.features)
        for name, events in batch.sequences.items()
    }
    targets = Targets(
        sid_BTL=batch.target_sid_BTL,
        end_BT=batch.end_BT,
        weight_BT=batch.weight_BT,
        request=batch.request,
        item={**batch.target_features, "item": batch.target_item_BT},
        log_q_BT=batch.log_q_BT,
    )
    return Context(sequences, batch.user).to(device), targets.to(device)


def set_numerics(config: RunConfig) -> None:
    """Threads and determinism of this process; the same in every front end (Ray would choose its own)."""
    torch.set_num_threads(config.train.threads_per_worker)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # Else every new tensor is written twice.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
