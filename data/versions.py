"""Versions of a prepared folder: what `onetrain append` adds to it, each on top of the one before."""

from typing import TYPE_CHECKING

from onetrain.data.errors import DataError
from onetrain.data.manifest import FILE_NAME, Manifest
from onetrain.data.remote import file_exists

if TYPE_CHECKING:
    from onetrain.data.store import Store

FOLDER = "versions"


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
