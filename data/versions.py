"""Versions of a prepared folder: what `onetrain append` adds to it, each on top of the one before."""

from pathlib import Path

from onetrain.data.manifest import Manifest


def version_folder(version: int) -> str:
    """Where a version lies within the prepared folder; version 0 is the folder itself."""
    return f"versions/{version:05d}" if version else ""


def newest_version(folder: str) -> int:
    """The number of the newest version that is complete."""
    version = 0
    while (Path(folder) / version_folder(version + 1) / "manifest.json").is_file():
        version += 1
    return version


def open_version(store, version: int) -> Manifest:
    """The manifest of one version."""
    return Manifest.load(Path(store.folder) / version_folder(version))
