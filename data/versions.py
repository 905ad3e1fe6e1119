"""Versions of a prepared folder: what `onetrain append` adds to it, each on top of the one before."""

import logging
from functools import cache
from typing import TYPE_CHECKING

from onetrain.data.errors import DataError
from onetrain.data.manifest import FILE_NAME, Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.remote import file_exists

if TYPE_CHECKING:
    from onetrain.data.store import Store

FOLDER = "versions"
_log = logging.getLogger(__name__)


def version_folder(version: int) -> str:
    """Where a version lies within the prepared folder; version 0 is the folder itself."""
    return f"{FOLDER}/{version:05d}" if version else ""


def newest_version(folder: str, since: int = 0) -> int:
    """The number of the newest complete version; `since` is known to be there. One look where nothing is new."""
    version = since
    while file_exists(folder, f"{version_folder(version + 1)}/{FILE_NAME}"):
        version += 1
    return version


def open_version(store: "Store", version: int) -> Manifest:
    """The manifest of one version of the folder `store`.

    Raises DataError for one that was not made on top of the version before it.
    """
    manifest = Manifest.load(store.of_version(version).name)
    if not version:
        return manifest
    before = Manifest.load(store.of_version(version - 1).name)
    where = f"{store.name}/{version_folder(version)}"
    if manifest.parent != before.fingerprint:
        raise DataError(
            f"{where} was appended to data of fingerprint {manifest.parent}, but the version before it is "
            f"{before.fingerprint}: the folder was prepared again, or versions of two folders were mixed. Copy the "
            "whole folder again, or remove this version and those after it and append again."
        )
    if manifest.catalogue_fingerprint != before.catalogue_fingerprint:
        raise DataError(
            f"{where} counts items of the catalogue {manifest.catalogue_fingerprint}, the folder's is "
            f"{before.catalogue_fingerprint}. Append these events again."
        )
    return manifest


def check_history(folder: str, manifest: Manifest, batch: BatchOptions) -> None:
    """Warn of a version whose rows were cut to fewer earlier events than a pathway reaches back."""
    reach = {name: length + batch.pathways[name].skip for name, length in batch.pathway_lengths.items()}
    longest = max(reach, key=reach.__getitem__)
    if manifest.append_history is not None and manifest.append_history < reach[longest]:
        _warn_of_cut(folder, manifest.append_history, longest, reach[longest])


@cache  # once, however many versions there are
def _warn_of_cut(folder: str, kept: int, pathway: str, reach: int) -> None:
    _log.warning(
        "%s has versions that were appended with data.append_history %d, and the pathway %s reaches %d events back "
        "(its length and skip): histories in these versions are cut. Set data.append_history to at least %d for later "
        "appends; for the versions that are there, prepare the whole log anew or shorten the pathway.",
        folder,
        kept,
        pathway,
        reach,
        reach,
    )
