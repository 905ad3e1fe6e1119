"""The manifest of a prepared folder: what is in it, in numbers and checksums."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onetrain.data.errors import DataError
from onetrain.data.fingerprint import file_checksum
from onetrain.data.remote import RemoteFolder, is_remote

FORMAT = 3
FILE_NAME = "manifest.json"


@dataclass(frozen=True)
class StoredFile:
    """One file of the folder: name, rows, events (of shards), size and checksum."""

    file: str
    rows: int
    bytes: int
    xxh3_128: str
    events: int = 0


@dataclass(frozen=True)
class Manifest:
    """Contents of a prepared folder.

    `fingerprint` covers users, events, items, attributes, vocabularies and split, and neither paths, dates, shard sizes
    nor the report. `sid_fingerprint` names the SID map made for these items and is no part of `fingerprint`.
    A version that was appended (data/versions.py) has the fingerprint of the version before it as `parent`; its own
    covers that too, so that it names everything up to here. Its items are those of the folder.
    """

    shards: tuple[StoredFile, ...]
    items: StoredFile
    user_table: StoredFile  # data/user_table.py
    batch_table: StoredFile
    users: int
    events: int
    n_train_events: int
    n_valid_events: int
    n_test_events: int
    behaviours: tuple[str, ...]
    scenarios: tuple[str, ...]
    extra: tuple[str, ...]
    time_range_ms: tuple[int, int]
    split: dict[str, Any]  # kind, valid_from, test_from (epoch ms, None for leave_one_out)
    catalogue_fingerprint: str
    fingerprint: str
    report: dict[str, int] = field(default_factory=dict)
    sid_fingerprint: str | None = None
    item_features: dict[str, tuple[str, ...]] = field(default_factory=dict)  # attribute: names of ids 1, 2, ...
    user_features: dict[str, tuple[str, ...]] = field(default_factory=dict)
    parent: str | None = None
    append_history: int | None = None  # of a version: data.append_history that its rows were cut to
    format: int = FORMAT

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """Every file that the manifest lists."""
        return (*self.shards, self.items, self.user_table, self.batch_table)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Manifest":
        """Read `<folder>/manifest.json`. Raises DataError when it is missing, damaged or of another format."""
        remote = RemoteFolder(os.fspath(folder)) if is_remote(folder) else None
        path = remote.where(FILE_NAME) if remote else Path(os.fspath(folder).removeprefix("file://")) / FILE_NAME
        try:
            raw = json.loads(remote.read(FILE_NAME) if remote else Path(path).read_bytes())
        except FileNotFoundError:
            raise DataError(f"{path} does not exist. Run `onetrain prepare` first, or correct data.prepared.") from None
        except ValueError as error:
            raise DataError(f"{path} is no valid JSON ({error}). Run `onetrain prepare` again.") from error
        found = raw.get("format") if isinstance(raw, dict) else None
        if found != FORMAT:
            raise DataError(
                f"{path} has format {found}, this version reads format {FORMAT}. Run `onetrain prepare` again."
            )
        try:
            raw["shards"] = tuple(StoredFile(**shard) for shard in raw["shards"])
            for name in ("items", "user_table", "batch_table"):
                raw[name] = StoredFile(**raw[name])
            for name in ("behaviours", "scenarios", "extra", "time_range_ms"):
                raw[name] = tuple(raw[name])
            for name in ("item_features", "user_features"):
                raw[name] = {feature: tuple(values) for feature, values in raw[name].items()}
            return cls(**raw)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}). Run `onetrain prepare` again.") from error

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `<folder>/manifest.json` atomically."""
        path = Path(folder) / FILE_NAME
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        temporary.write_text(
            json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.replace(temporary, path)

    def with_sid_fingerprint(self, sid_fingerprint: str) -> "Manifest":
        """The same manifest, stamped with the fingerprint of its SID map."""
        return dataclasses.replace(self, sid_fingerprint=sid_fingerprint)


def verify_sizes(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Check that every file is there in its full size. Raises DataError that names the file."""
    for stored in manifest.files:
        path = Path(folder) / stored.file
        if not path.is_file():
            raise DataError(f"{path} is missing, but the manifest lists it. Run `onetrain prepare` again.")
        if path.stat().st_size != stored.bytes:
            raise DataError(
                f"{path} has {path.stat().st_size} bytes, the manifest says {stored.bytes}: it is truncated or was "
                "replaced. Copy it again or run `onetrain prepare` again."
            )


def verify_shards(manifest: Manifest, folder: str | os.PathLike[str]) -> None:
    """Check size and checksum of every file; reads all of them. Raises DataError that names the damaged file."""
    verify_sizes(manifest, folder)
    for stored in manifest.files:
        path = Path(folder) / stored.file
        found = file_checksum(path)
        if found != stored.xxh3_128:
            raise DataError(
                f"{path} is damaged: its checksum is {found}, the manifest says {stored.xxh3_128}. Copy it again or "
                "run `onetrain prepare` again."
            )
