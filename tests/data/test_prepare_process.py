"""Preparation in a process of its own: its memory, and Ctrl-C in the middle of a query."""

import signal
import subprocess
import sys
import time

import duckdb
import pytest

MEMORY = """
import resource, sys
from onetrain.data.options import DataOptions, SourceOptions, SplitOptions
from onetrain.data.prepare import prepare
log, prepared = sys.argv[1:]
prepare(DataOptions(prepared, SourceOptions(events=log), SplitOptions("global_time"), memory_limit_mb=128))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
INTERRUPT = """
import sys
from onetrain.data.options import DataOptions, SourceOptions
from onetrain.data.prepare import prepare
log, prepared = sys.argv[1:]
try:
    prepare(DataOptions(prepared, SourceOptions(events=log)), lambda stage, done, total: print(stage, done, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def write_log(path, n):
    """n events of n / 40 users and 5000 items, in random order."""
    duckdb.sql(
        f"""COPY (SELECT 'u' || hash(i) % {n // 40} AS user, hash(i + 11) % 5000 AS item,
            1600000000000 + hash(i + 7) % 100000000 AS timestamp, 'b' || hash(i + 3) % 3 AS behaviour,
            hash(i + 5) % 60000 AS watch_ms, 30000 AS duration_ms FROM range({n}) r(i))
        TO '{path}' (FORMAT parquet)"""
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_events(tmp_path):
    peak = {}
    for n in (200_000, 2_000_000):
        log = tmp_path / f"log{n}.parquet"
        write_log(log, n)
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(log), str(tmp_path / "prepared")],
            capture_output=True,
            text=True,
            check=True,
        )
        peak[n] = int(done.stdout)
    assert peak[2_000_000] - peak[200_000] < 150, (
        peak
    )  # MB; the events alone are 72 MB in shards, over 200 while sorted


def test_ctrl_c_during_a_query(tmp_path):
    log = tmp_path / "log.parquet"
    write_log(log, 1_000_000)
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPT, str(log), str(tmp_path / "prepared")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "read 0\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "write" not in rest
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]
