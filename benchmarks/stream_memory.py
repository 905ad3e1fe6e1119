"""Anonymous resident memory of order, cursor and reading: flat, however many users there are.

Two parts. `users`: an index over 1 to 20 million simulated users (their user table; no events), and steps' worth of
order, cursor and sample look-ups at random places of the epoch. `shards`: a real shard set of some GB, every user read
once in shuffled order through the shard reader, checksums included. File-backed pages, which the system drops when it
needs room, are shown beside the anonymous ones and do not count.

    python benchmarks/stream_memory.py [--users 1 5 20] [--gigabytes 5] [--folder FOLDER]
"""

import argparse
import gc
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from onetrain.data.cursor import Cursor
from onetrain.data.manifest import Manifest
from onetrain.data.options import BatchOptions
from onetrain.data.order import Cycle, GlobalOrder, ShuffledOrder
from onetrain.data.permutation import permute
from onetrain.data.samples import SampleIndex
from onetrain.data.shard_writer import ShardWriter, UserBlock
from onetrain.data.shards import ShardReader
from onetrain.data.user_table import BATCHES, USERS, UserTable, batch_dtype, user_dtype
from onetrain.launcher.environment import environment

BATCH = 512
LOOK_UPS = 2000  # global batches, at random places of ten epochs
USERS_PER_BATCH = 250
EVENTS = (20, 500)
CHUNK = 1 << 16


def memory_mb() -> tuple[float, float]:
    """Anonymous and file-backed resident memory of this process."""
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            fields[name] = int(value.split()[0]) / 1024
    return fields["RssAnon"], fields["RssFile"]


class _TableOnly:
    """A reader of users without events, for samples that follow from the user table alone."""

    def __init__(self, folder: Path, users: int) -> None:
        self.manifest = SimpleNamespace(fingerprint=f"simulated-{users}", behaviours=(), users=users)
        self.store = SimpleNamespace(index_folders=(folder / "index",))
        self.table = UserTable.open(folder / USERS, folder / BATCHES, (), ())
        self.n_users = users

    def check_users(self) -> None:
        """Nothing was written, so nothing is checked."""


def simulated_table(folder: Path, users: int) -> None:
    """The user table of so many users, written piece by piece."""
    rng = np.random.default_rng(0)
    with (folder / USERS).open("wb") as file:
        for start in range(0, users, CHUNK):
            part = np.zeros(min(CHUNK, users - start), user_dtype(()))
            part["length"] = rng.integers(*EVENTS, len(part))
            part["valid_start"] = part["length"] - 2
            part["test_start"] = part["length"] - 1
            part["id"] = rng.integers(0, 1 << 62, len(part))
            part.tofile(file)
    batches = np.zeros(-(-users // USERS_PER_BATCH), batch_dtype(()))
    batches["first_row"] = np.arange(len(batches)) * USERS_PER_BATCH
    batches.tofile(folder / BATCHES)


def order_part(millions: float, folder: Path) -> dict[str, Any]:
    """Memory after an index was made, and after many look-ups; and how long a fresh start takes."""
    users = int(millions * 1e6)
    folder.mkdir(parents=True)
    simulated_table(folder, users)
    options = BatchOptions(max_context=256)
    started = time.perf_counter()
    SampleIndex(_TableOnly(folder, users), "train", options)  # type: ignore[arg-type]
    first = time.perf_counter() - started
    started = time.perf_counter()
    index = SampleIndex(_TableOnly(folder, users), "train", options)  # type: ignore[arg-type]
    order = GlobalOrder([ShuffledOrder((len(index),), (f"{users}",), 0)], Cycle((1,)))
    cursor = Cursor(position=int(0.9 * len(index)))
    index.rows(order.sample_ids(cursor.position, BATCH)[1])
    resumed = time.perf_counter() - started
    rng, started, anonymous = np.random.default_rng(1), time.perf_counter(), 0.0
    for number in range(LOOK_UPS):
        cursor = Cursor.from_json(cursor.at(int(rng.integers(0, 10 * len(index)))).as_json())
        index.rows(order.sample_ids(cursor.position, BATCH)[1])
        if number % 100 == 0:
            anonymous = max(anonymous, memory_mb()[0])
    look_ups = BATCH * LOOK_UPS / (time.perf_counter() - started)
    gc.collect()
    return {
        "users": users,
        "samples": len(index),
        "anonymous_mb": max(anonymous, memory_mb()[0]),
        "file_mb": memory_mb()[1],
        "first_index_s": first,
        "resume_s": resumed,
        "look_ups_per_s": look_ups,
    }


def write_shards(folder: Path, gigabytes: float) -> Manifest:
    """A real shard set of about this size."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, (), 2_000_000)
    users = events = 0
    while sum(shard.bytes for shard in writer.shards) < gigabytes * 1e9:
        lengths = rng.integers(*EVENTS, 2000)
        n = int(lengths.sum())
        columns = {
            "item": rng.integers(0, 100_000, n).astype(np.int32),
            "timestamp_ms": rng.integers(0, 1 << 40, n),
            "behaviour": rng.integers(0, 4, n).astype(np.int16),
            "scenario": rng.integers(0, 4, n).astype(np.int16),
            "watch_ms": rng.integers(0, 1 << 20, n),
            "duration_ms": rng.integers(0, 1 << 20, n),
        }
        names = pa.array([f"u{users + number}" for number in range(len(lengths))])
        writer.append(UserBlock(names, lengths, np.zeros_like(lengths), lengths - 2, lengths - 1, columns))
        users, events = users + len(lengths), events + n
    writer.close()
    user_table, batch_table = writer.tables()
    return Manifest(
        shards=tuple(writer.shards),
        items=user_table,
        user_table=user_table,
        batch_table=batch_table,
        users=users,
        events=events,
        n_train_events=events,
        n_valid_events=0,
        n_test_events=0,
        behaviours=("a", "b", "c", "d"),
        scenarios=("a", "b", "c", "d"),
        extra=(),
        time_range_ms=(0, 1 << 40),
        split={},
        catalogue_fingerprint="",
        fingerprint="shards",
    )


def shards_part(folder: Path, gigabytes: float) -> list[dict[str, Any]]:
    """Memory while every user is read once, in shuffled order."""
    manifest = write_shards(folder, gigabytes)
    reader, rows, started = ShardReader(folder, manifest), [], time.perf_counter()
    shares = np.linspace(0, manifest.users, 11).astype(int)
    for tenth, (begin, end) in enumerate(itertools.pairwise(shares), start=1):
        for start in range(begin, end, BATCH):
            chosen = permute(np.arange(start, min(start + BATCH, end)), manifest.users, 5)
            places = reader.locate(chosen)
            for name in reader.types:
                pieces = reader.pieces(name, places, np.zeros(len(chosen), np.int64), places.users["length"])
                np.concatenate(pieces).sum()
        anonymous, file = memory_mb()
        rows.append(
            {"read": tenth / 10, "anonymous_mb": anonymous, "file_mb": file, "s": time.perf_counter() - started}
        )
    rows[-1] |= {"gigabytes": sum(shard.bytes for shard in manifest.shards) / 1e9, "users": manifest.users}
    return rows


def main() -> None:
    """Run both parts and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=float, nargs="*", default=[1, 2, 5, 10, 20], help="millions")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="0 = leave that part out")
    parser.add_argument("--folder", default=None, help="working folder; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/stream_memory.json"))
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="stream-memory-", dir=options.folder))
    try:
        order_part(0.1, work / "warm")  # imports and first allocations
        print(f"before: {memory_mb()[0]:.1f} MB anonymous")
        order = []
        for millions in options.users:
            order.append(order_part(millions, work / "users"))
            shutil.rmtree(work / "users")
            row = order[-1]
            print(
                f"{row['users']:>12,} users  {row['samples']:>14,} samples  {row['anonymous_mb']:8.1f} MB anonymous  "
                f"{row['file_mb']:8.1f} MB file-backed  first index {row['first_index_s']:.2f} s  "
                f"resume {1e3 * row['resume_s']:.1f} ms  {row['look_ups_per_s']:,.0f} look-ups/s",
                flush=True,
            )
        read = shards_part(work / "shards", options.gigabytes) if options.gigabytes else []
        for row in read:
            print(
                f"{row['read']:.0%} read  {row['anonymous_mb']:8.1f} MB anonymous  {row['file_mb']:8.1f} MB file-backed"
            )
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"order": order, "shards": read, "environment": environment()}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
