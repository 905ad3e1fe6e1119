"""mosaicml-streaming: MDS shards through StreamingDataset and StreamingDataLoader."""

import importlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .histories import BATCH, FEATURES, Batch, Block, Padded, as_batch, pad, rows_of

RESUME = "state_dict of StreamingDataLoader"
SETTINGS = {
    "encoding": "bytes",
    "shard_bytes": 1 << 26,
    "workers": 2,
    "prefetch_factor": 4,
    "shuffle_algo": "py1s",
    "shuffle_block_size": 1 << 18,
    "predownload": 8 * BATCH,
}
VARIANTS = [
    {"workers": 0},
    {"workers": 1},
    {"prefetch_factor": 16},
    {"encoding": "ndarray:int32"},
    {"shard_bytes": 16_777_216},
    {"shuffle_algo": "py1e"},
    {"shuffle_algo": "naive"},
]

# Packages that mosaicml-streaming imports for its vision and text datasets alone. The pinned torch has no torchvision
# where there is no GPU, and the pinned datasets do not go with the transformers that mosaicml-streaming asks for.
UNUSED = (
    "torchvision.datasets",
    "torchvision.transforms.functional",
    "transformers.feature_extraction_utils",
    "transformers.tokenization_utils_base",
    "transformers.models.auto.tokenization_auto",
)


class _Anything(types.ModuleType):
    """Has a class of every name."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def _import() -> Any:
    """The package, with stand-ins for what it imports and never uses here."""
    names = {".".join(path.split(".")[: n + 1]) for path in UNUSED for n in range(path.count(".") + 1)}
    missing = sorted(names - sys.modules.keys())
    sys.modules.update((name, _Anything(name)) for name in missing)
    package = importlib.import_module("streaming")
    for name in missing:
        del sys.modules[name]
    return package


streaming = _import()


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """One sample a user: its ids (F, events), int32."""
    writer = streaming.MDSWriter
    columns = {"events": SETTINGS["encoding"]}
    with writer(out=str(folder), columns=columns, compression=None, size_limit=SETTINGS["shard_bytes"]) as out:
        for block in blocks:
            for ids_FE in rows_of(block):
                whole = np.ascontiguousarray(ids_FE)
                out.write({"events": whole.tobytes() if SETTINGS["encoding"] == "bytes" else whole})


def collate(samples: list[dict[str, Any]]) -> Padded:
    """Runs in the worker."""
    return pad([_decoded(sample["events"]) for sample in samples])


def _decoded(events: bytes | NDArray[np.int32]) -> NDArray[np.int32]:
    if isinstance(events, bytes):
        return np.frombuffer(events, np.int32).reshape(len(FEATURES), -1)
    return events


class Loader:
    """Batches of one epoch, from the state on if there is one."""

    def __init__(self, folder: Path, state: Any = None) -> None:
        streaming.base.util.clean_stale_shared_memory()
        dataset = streaming.StreamingDataset(
            local=str(folder),
            batch_size=BATCH,
            shuffle=True,
            shuffle_algo=SETTINGS["shuffle_algo"],
            shuffle_block_size=SETTINGS["shuffle_block_size"],
            num_canonical_nodes=1,
            predownload=SETTINGS["predownload"],
        )
        workers = SETTINGS["workers"]
        self._loader = streaming.StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=workers,
            prefetch_factor=SETTINGS["prefetch_factor"] if workers else None,
            collate_fn=collate,
            drop_last=False,
        )
        if state is not None:
            self._loader.load_state_dict(state)

    def __iter__(self) -> Iterator[Batch]:
        return map(as_batch, self._loader)

    def state(self) -> Any:
        """Where the epoch stands after the batches that were delivered."""
        return self._loader.state_dict()
