"""state.json of a checkpoint: its own checksum, and those of the files that it lists."""

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from onetrain.parallel.errors import DamagedCheckpointError

FORMAT = 2
STATE = "state.json"
OWN_HASH = "xxh3_128"  # in state.json: of all the rest that it says
HASH_CHUNK = 1 << 24


def read_header(folder: Path) -> dict[str, Any]:
    """What state.json of a local checkpoint says. DamagedCheckpointError where it cannot be read."""
    try:
        content = (folder / STATE).read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(
            f"Cannot read checkpoint {folder}: {error}. Give the folder that holds {STATE}."
        ) from error
    return parse_header(content, str(folder))


def parse_header(content: bytes, where: str) -> dict[str, Any]:
    """The content of state.json."""
    try:
        header = json.loads(content)
        header["files"].items(), header["state"], header["step"]
        checked = header.get("format") == FORMAT or OWN_HASH in header  # an older version's is refused as such
        if checked and header[OWN_HASH] != own_hash(header):
            raise ValueError("it does not match its checksum")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(
            f"Checkpoint file {where}/{STATE} is damaged: {type(error).__name__}: {error}. Use another checkpoint."
        ) from error
    return header


def own_hash(header: dict[str, Any]) -> str:
    """xxh3_128 of what state.json says besides, in a form that does not depend on how it is laid out."""
    rest = {name: value for name, value in header.items() if name != OWN_HASH}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def header_text(header: dict[str, Any]) -> str:
    """The content of state.json, with its own checksum."""
    plain = json.loads(json.dumps(header))  # as it will be read
    return json.dumps({**plain, OWN_HASH: own_hash(plain)}, indent=1)


def damage(folder: Path, header: dict[str, Any], contents: bool = True) -> str | None:
    """What is wrong with the files that a header lists: their sizes and, with `contents`, their checksums."""
    for name, check in header["files"].items():
        path = folder / name
        size = path.stat().st_size if path.exists() else 0
        if size != check["bytes"]:
            return f"{name} has {size} bytes instead of {check['bytes']}"
        if contents and file_hash(path) != check["xxh3_128"]:
            return f"{name} does not match its checksum"
    return None


def file_hash(path: Path) -> str:
    """xxh3_128 of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """A file's or folder's content is on the disk after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
