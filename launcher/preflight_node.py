"""What preflight looks at on every node, in the node's own agent. Light: it imports neither torch nor the model."""

import contextlib
import importlib
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import fsspec
import xxhash

from onetrain.data.errors import DataError
from onetrain.data.manifest import Manifest, StoredFile
from onetrain.data.remote import is_remote
from onetrain.data.sids import described
from onetrain.data.store import LocalStore, open_store
from onetrain.data.stream_options import StreamOptions
from onetrain.data.versions import newest_version, open_version, version_folder
from onetrain.launcher.doctor import Check, folders, shared_memory
from onetrain.launcher.environment import package_version

ROOMS = ("launcher", "cluster", "parallel", "data", "model")
COMPARED = ("onetrain", "torch", "deepspeed", "ray", "numpy", "pyarrow", "megatron-core")
UNREADABLE = (DataError, OSError, ValueError, KeyError)  # of prepared data that are missing or damaged
FILES_AT_ONCE = 16  # a shared file system answers slowly, but many at once
SHARD_MAGIC = b"ARROW1"
SEEN_WITHIN_S = 3.0  # a file made on another node, through a network file system that keeps listings


@dataclass(frozen=True)
class Look:
    """What a node is asked."""

    written: tuple[str, ...]  # folders or URLs that the run writes to
    prepared: tuple[str, ...]  # folders or URLs of prepared data
    stream: StreamOptions = field(default_factory=StreamOptions)
    tokens: tuple[tuple[str, str], ...] = ()  # (file, its text) that the asking side has written


@dataclass(frozen=True)
class Seen:
    """What a node answers."""

    checks: list[Check]
    versions: dict[str, str]
    fingerprints: dict[str, str]  # prepared folder -> those of its data and SIDs
    free: dict[str, int]  # bytes in the folders that the run writes to
    seconds: float


def look(what: Look) -> Seen:
    """Look around on this node."""
    started = time.monotonic()
    checks = [*_shared(what.tokens), *_written(what.written), shared_memory()]
    contents: dict[str, str] = {}
    for folder in what.prepared:
        checks.append(_readable(folder, what.stream))
        with contextlib.suppress(*UNREADABLE):
            contents[folder] = fingerprints(folder, what.stream)
    local = [folder for folder in what.written if os.path.isdir(folder)]
    free = {folder: shutil.disk_usage(folder).free for folder in local}
    return Seen(checks, versions(), contents, free, time.monotonic() - started)


def versions() -> dict[str, str]:
    """What has to be equal on all nodes; `code` is of onetrain's own sources, installed or shipped."""
    found = {name: package_version(name) or "not installed" for name in COMPARED}
    return {"Python": platform.python_version(), **found, "code": _code()}


def _code() -> str:
    digest = xxhash.xxh3_64()
    for room in ROOMS:
        folder = Path(importlib.import_module(f"onetrain.{room}").__file__ or "").parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{room}/{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _shared(tokens: tuple[tuple[str, str], ...]) -> Iterator[Check]:
    """Whether what the asking side wrote can be seen here."""
    for file, text in tokens:
        folder = Path(file).parent
        deadline = time.monotonic() + SEEN_WITHIN_S
        while (found := _read(Path(file))) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if found == text:
            yield Check(f"shared {folder}", "ok", "what the supervisor writes is seen")
            continue
        yield Check(
            f"shared {folder}",
            "fail",
            f"{'a file that the supervisor wrote there is not seen' if found is None else 'another file is seen'}: "
            "it is not the same folder as the supervisor's",
            "mount the same shared storage there on every node",
        )


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _written(places: tuple[str, ...]) -> Iterator[Check]:
    """Whether this node can write where the run writes, by writing."""
    fix = "give this node and user the right to write there, or change storage_path"
    for folder in places:
        if is_remote(folder):
            yield _write_remote(folder)
            continue
        (found,) = folders([Path(folder)], least=0)
        if found.state != "fail" and Path(folder).is_dir():
            # the rights that a file system shows may not be those that its server grants
            path = Path(folder) / f".preflight-{uuid.uuid4().hex}"
            try:
                path.write_text("written", encoding="utf-8")
            except OSError as error:
                found = Check(found.name, "fail", f"cannot be written: {error}", fix)
            finally:
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
        yield found


def _write_remote(url: str) -> Check:
    name = f"storage {url}"
    try:
        system, root = fsspec.core.url_to_fs(url)
        path = f"{root.rstrip('/')}/.preflight-{uuid.uuid4().hex}"
        system.makedirs(root, exist_ok=True)
        system.pipe_file(path, b"written")
        system.rm_file(path)
    except Exception as error:  # every storage library has exceptions of its own
        detail = f"cannot be written ({type(error).__name__}: {error})"
        return Check(name, "fail", detail, "look at this node's network and credentials for it, or change the URL")
    return Check(name, "ok", "writable")


def fingerprints(folder: str, stream: StreamOptions) -> str:
    """Those of the newest version of prepared data and of their SIDs; one of UNREADABLE where there are none."""
    store = open_store(folder, stream)
    manifest = open_version(store, newest_version(folder))
    return f"data {manifest.fingerprint} with SIDs {described(f'{folder}/sids', stream)['fingerprint']}"


def _readable(folder: str, stream: StreamOptions) -> Check:
    """Every file of every version in its size, with a readable beginning; and that the SID map is the manifest's."""
    name, fix = f"prepared data {folder}", "copy the folder there again, mount it, or correct data.prepared"
    try:
        store = open_store(folder, stream)
        manifests = [open_version(store, version) for version in range(newest_version(folder) + 1)]
        sids, stamped = described(f"{folder}/sids", stream)["fingerprint"], manifests[0].sid_fingerprint
        if sids != stamped:
            return Check(name, "fail", f"the SID map has fingerprint {sids}, the manifest names {stamped}", fix)
        if isinstance(store, LocalStore):
            files = [(store.of_version(v), file) for v, manifest in enumerate(manifests) for file in manifest.files]
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                problems = [problem for problem in pool.map(_open_local, files) if problem]
        else:
            problems = _open_remote(store.name, manifests)
    except UNREADABLE as error:
        return Check(name, "fail", str(error), fix)
    if not problems:
        return Check(name, "ok", f"{sum(len(manifest.shards) for manifest in manifests)} shards readable")
    more = f", and {len(problems) - 1} more files" if len(problems) > 1 else ""
    # damaged shards are left out where the configuration says so
    state: Literal["warn", "fail"] = "fail" if stream.damaged == "error" else "warn"
    return Check(name, state, f"{problems[0]}{more}", fix)


def _open_local(job: tuple[LocalStore, StoredFile]) -> str | None:
    """What is wrong with one file, by its size and first bytes."""
    store, stored = job
    try:
        with store.path(stored).open("rb") as file:
            beginning = file.read(len(SHARD_MAGIC))
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"{store.name}/{stored.file} cannot be read: {error.strerror}"
    return _wrong_beginning(f"{store.name}/{stored.file}", beginning)


def _open_remote(url: str, manifests: list[Manifest]) -> list[str]:
    """The same of files behind a URL: one listing for the sizes, and the first bytes of one shard."""
    system, root = fsspec.core.url_to_fs(url)
    root = root.rstrip("/")
    sizes = {path.lstrip("/"): info["size"] for path, info in system.find(root, detail=True).items()}
    problems, first = [], None
    for version, manifest in enumerate(manifests):
        for stored in manifest.files:
            path = "/".join(part for part in (root, version_folder(version), stored.file) if part)
            size = sizes.get(path.lstrip("/"))
            if size != stored.bytes:
                there = "is missing" if size is None else f"has {size} bytes, the manifest says {stored.bytes}"
                problems.append(f"{url}/{path.removeprefix(root).lstrip('/')} {there}")
            elif first is None and stored in manifest.shards:
                first = path
    if first is not None and (problem := _wrong_beginning(first, system.cat_file(first, end=len(SHARD_MAGIC)))):
        problems.append(problem)
    return problems


def _wrong_beginning(path: str, beginning: bytes) -> str | None:
    if path.endswith(".arrow") and beginning != SHARD_MAGIC:
        return f"{path} is no Arrow file: it begins with {beginning!r}"
    return None
