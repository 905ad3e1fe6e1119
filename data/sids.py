"""The item -> semantic ID map of a prepared folder, with the fingerprint that shards, checkpoints and exports carry.

Files, in <prepared>/sids/: sids.safetensors (`codes` and `codebook_0`, `codebook_1` ...) and sids.json (sizes and both
fingerprints).

Legend: I items, D width of an embedding, L levels, V codes per level.
"""

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest
from onetrain.data.store import LocalStore, open_store
from onetrain.data.stream_options import StreamOptions

FORMAT = 1
TENSORS = "sids.safetensors"
DESCRIPTION = "sids.json"


@dataclass(frozen=True)
class SidMap:
    """One SID per item of a catalogue.

    codes_IL: (I, L) int64, row = item index. sizes: codes per level. codebooks: the fitted centres, (V, D) float32 per
    level; a level that only tells equal SIDs apart has none. catalogue_fingerprint: the manifest's, over the item ids.
    """

    codes_IL: NDArray[np.int64]
    sizes: tuple[int, ...]
    codebooks: tuple[NDArray[np.float32], ...]
    catalogue_fingerprint: str

    def __post_init__(self) -> None:
        if self.codes_IL.ndim != 2 or self.codes_IL.shape[1] != len(self.sizes):
            raise DataError(f"SID codes have shape {self.codes_IL.shape}, but there are {len(self.sizes)} level sizes")
        if ((self.codes_IL < 0) | (self.codes_IL >= np.array(self.sizes))).any():
            raise DataError(f"SID codes lie outside the level sizes {list(self.sizes)}; run `onetrain tokenize` again")

    @cached_property
    def fingerprint(self) -> str:
        """xxh3_128 over sizes, codes, codebooks and the catalogue's fingerprint."""
        digest = xxhash.xxh3_128()
        shapes = [list(codebook.shape) for codebook in self.codebooks]
        digest.update(json.dumps([FORMAT, self.catalogue_fingerprint, list(self.sizes), shapes]).encode())
        digest.update(np.ascontiguousarray(self.codes_IL, dtype="<i8").data)
        for codebook in self.codebooks:
            digest.update(np.ascontiguousarray(codebook, dtype="<f4").data)
        return digest.hexdigest()

    def save(self, folder: str) -> None:
        """Write the map into `folder`. An interrupted save leaves the folder as it was."""
        target = Path(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            tensors = {"codes": np.ascontiguousarray(self.codes_IL)}
            for level, codebook in enumerate(self.codebooks):
                tensors[f"codebook_{level}"] = np.ascontiguousarray(codebook)
            save_file(tensors, staging / TENSORS)
            description = {
                "format": FORMAT,
                "items": len(self.codes_IL),
                "sizes": list(self.sizes),
                "catalogue_fingerprint": self.catalogue_fingerprint,
                "fingerprint": self.fingerprint,
            }
            (staging / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
            staging.chmod(0o755)  # mkdtemp's folder is private
            _replace_folder(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @staticmethod
    def load(folder: str, options: StreamOptions | None = None) -> "SidMap":
        """Read the map in `folder`. DataError when there is none, or when its contents are not what was written.

        `options` say where copies of a remote folder's files are kept.
        """
        again = "run `onetrain tokenize` again"
        try:
            description, path = _files(folder, options)
            tensors = load_file(path)
            if description["format"] != FORMAT:
                raise DataError(f"the SID map in {folder} has format {description['format']}, not {FORMAT}; {again}")
            recorded = description["fingerprint"]
            sids = SidMap(
                codes_IL=tensors["codes"],
                sizes=tuple(description["sizes"]),
                codebooks=tuple(tensors[f"codebook_{level}"] for level in range(len(tensors) - 1)),
                catalogue_fingerprint=description["catalogue_fingerprint"],
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DataError(f"the SID map in {folder} is damaged ({type(error).__name__}: {error}); {again}") from error
        if sids.fingerprint != recorded:
            raise DataError(
                f"the SID map in {folder} is damaged: its contents have fingerprint {sids.fingerprint}, "
                f"{DESCRIPTION} records {recorded}; {again}"
            )
        return sids

    def check_against(self, manifest: Manifest) -> None:
        """DataError unless this map was made for the manifest's catalogue and is the one stamped into the manifest."""
        if self.catalogue_fingerprint != manifest.catalogue_fingerprint:
            raise DataError(
                f"foreign SID map: it was made for the catalogue {self.catalogue_fingerprint}, the prepared data hold "
                f"the catalogue {manifest.catalogue_fingerprint}; run `onetrain tokenize` on these data"
            )
        if self.fingerprint != manifest.sid_fingerprint:
            stamped = manifest.sid_fingerprint or "no SID map"
            raise DataError(
                f"foreign SID map: it has fingerprint {self.fingerprint}, the manifest names {stamped}; "
                "run `onetrain tokenize` on these data"
            )


def described(folder: str, options: StreamOptions | None = None) -> dict[str, Any]:
    """What sids.json in `folder` says, contents unread. DataError when there is no map."""
    store = open_store(folder, options)
    try:
        text = (store.folder / DESCRIPTION).read_bytes() if isinstance(store, LocalStore) else store.read(DESCRIPTION)
    except FileNotFoundError:
        raise DataError(f"no SID map in {folder} ({DESCRIPTION} is missing); run `onetrain tokenize` first") from None
    return dict(json.loads(text))


def _files(folder: str, options: StreamOptions | None) -> tuple[dict[str, Any], Path]:
    """The map's description, and the local file of its tensors. DataError when there is no map."""
    store, description = open_store(folder, options), described(folder, options)
    if isinstance(store, LocalStore):
        return description, store.folder / TENSORS
    return description, store.copy(TENSORS, str(description["fingerprint"]))


def _replace_folder(new: Path, target: Path) -> None:
    old = new.with_name(new.name + ".old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
