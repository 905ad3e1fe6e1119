"""A log of JSON lines that only grows: <run>/events.jsonl of the supervisor, <run>/ledger.jsonl of the training loop.

Each record has `time` (Unix seconds) and survives the process that wrote it. Each file has one writer at a time.
"""

import errno
import json
import os
import time
from pathlib import Path
from typing import Any

EVENTS, LEDGER, SKIPPED, HEARTBEATS = "events.jsonl", "ledger.jsonl", "skipped.jsonl", "heartbeats.json"


class EventLog:
    """Appends to one file; a half-written last line, left by a crash or a full disk, is ended first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, *, durable: bool = True, **fields: Any) -> dict[str, Any]:
        """Append one record and return it; raises OSError where the disk is full.

        A `durable` one is on the disk after this; another may be lost with the machine, not with the process.
        """
        record = {"time": round(time.time(), 3), **fields}
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:  # a nearly full disk takes a part
                written = os.write(descriptor, line)
                if written == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                line = line[written:]
            if durable:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return record


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole records; none where there is no file."""
    if not path.exists():
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # cut off by a crash
                continue
            if isinstance(record, dict):
                records.append(record)
    return records
