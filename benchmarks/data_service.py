"""Sequences per second of this project's data path beside other loaders, on one machine, from the same histories.

Every system delivers the same tensors: batches of 512 shuffled histories, eight features of the last 256 events each,
int64, padded with zeros, and their lengths. The other systems read the eight ids of every event ready-made from their
own format (so they compute none of the features); ours reads raw columns and computes them. Settings of each system
stand in its file under data_service_peers/, with what else was tried.

A measurement is a process of its own: `start_s` from constructing the loader to the first batch (imports done),
`per_second` from 10 % to 90 % of an epoch, `cpu_us` of all its processes for one sequence; there it takes its state,
and another process measures `resume_s` from constructing the loader from that state to the first batch. Systems take
turns, `rounds` times; medians are shown. Before that, a small run checks what was delivered against what was drawn,
user by user, in one epoch, and in one that is interrupted at 90 % (`lost`, `repeated`). Usage:

    python -m venv PEERS                                 # an environment of its own: see the requirements file
    PEERS/bin/pip install -c constraints.txt torch setuptools && PEERS/bin/pip install -c constraints.txt -e .
    PEERS/bin/pip install --no-deps -r benchmarks/data_service_requirements.txt
    OMP_NUM_THREADS=1 PEERS/bin/python benchmarks/data_service.py [--users 200000] [--rounds 3] [--systems ...] [--tune]

`--tune` measures each system with its settings changed in every way that its file lists as VARIANTS, instead.
Writes runs/benchmarks/data_service.json with versions, settings and machine, and prints a Markdown table. The data
(1.7 GB a format) go to runs/data_service and are kept.
"""

import argparse
import ast
import gc
import importlib
import json
import math
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch
from data_service_peers.histories import BATCH, draw_blocks, expected_signatures, signatures

from onetrain.launcher.console import print_message
from onetrain.launcher.environment import environment, package_version

SYSTEMS = {  # name: module of data_service_peers
    "onetrain, in process": "ours",
    "onetrain, service": "service",
    "mosaicml-streaming": "mosaic",
    "litdata": "lit",
    "datasets, streaming": "huggingface",
    "DataLoader over Parquet": "parquet",
    "DataLoader over Parquet, packed": "parquet_packed",
}
PACKAGES = ("mosaicml-streaming", "litdata", "datasets", "torchdata", "pyarrow", "numpy", "torch", "fsspec")
WRITTEN = ("encoding", "shard_bytes", "chunk_bytes", "layout", "compression", "use_dictionary", "format", "batch_rows")
RESUME_AT = 0.9  # of an epoch
WARM_UP = 0.1


def write(system: Any, folder: Path, users: int) -> dict[str, Any]:
    """The system's own format, unless it is there."""
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        system.write(unfinished, draw_blocks(users))
        unfinished.rename(folder)
    return {"bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())}


def verify(system: Any, folder: Path, users: int) -> dict[str, Any]:
    """Users that one epoch, and one interrupted epoch with its rest, lost or delivered more than once."""
    expected = Counter(expected_signatures(users))
    if max(expected.values()) > 1:
        raise SystemExit("two users look the same; draw fewer")
    whole = Counter(sign for batch in system.Loader(folder) for sign in signatures(batch))
    loader, parts = system.Loader(folder), Counter[bytes]()
    for batch in islice(loader, interruption(users)):
        parts.update(signatures(batch))
    state = pickle.loads(pickle.dumps(loader.state()))
    del loader
    for batch in system.Loader(folder, state):
        parts.update(signatures(batch))
    return {"equal": whole == expected, "lost": (expected - parts).total(), "repeated": (parts - expected).total()}


def steady(system: Any, folder: Path, users: int) -> dict[str, Any]:
    """Start-up and throughput; leaves the state at the end of the measured part beside the folder."""
    begin, end = max(1, int(users / BATCH * WARM_UP)), interruption(users)
    started = time.perf_counter()
    loader = system.Loader(folder)
    batches = iter(loader)
    next(batches)
    start_s = time.perf_counter() - started
    for _ in islice(batches, begin - 1):
        pass
    cpu, rows, started = cpu_seconds(), 0, time.perf_counter()
    for batch in islice(batches, end - begin):
        rows += len(batch["length"])
    seconds = time.perf_counter() - started
    cpu = cpu_seconds() - cpu
    _state_file(folder).write_bytes(pickle.dumps(loader.state()))
    return {"start_s": start_s, "per_second": rows / seconds, "cpu_us": cpu / rows * 1e6}


def resume(system: Any, folder: Path, users: int) -> dict[str, Any]:
    """From the state that `steady` left to the next batch; NaN where the state leads to none."""
    state = pickle.loads(_state_file(folder).read_bytes())
    started = time.perf_counter()
    batch = next(iter(system.Loader(folder, state)), None)
    return {"resume_s": math.nan if batch is None else time.perf_counter() - started}


PHASES = {phase.__name__: phase for phase in (write, verify, steady, resume)}


def interruption(users: int) -> int:
    """Batches of an epoch before it is interrupted."""
    return int(users / BATCH * RESUME_AT)


def cpu_seconds() -> float:
    """Of this process and those that it started."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def _state_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.state")


def child(phase: str, module: str, folder: Path, users: int, changes: dict[str, Any]) -> None:
    """What a process of `measure` does; its result is the last line."""
    torch.set_num_threads(1)
    system = importlib.import_module(f"data_service_peers.{module}")
    system.SETTINGS.update(changes)
    gc.collect()
    result = PHASES[phase](system, folder, users)
    print("\n" + json.dumps({**result, "settings": system.SETTINGS, "resume_by": system.RESUME}), flush=True)
    for process in psutil.Process().children(recursive=True):
        process.terminate()
    os._exit(0)  # loaders of an unfinished epoch may wait for their workers


def measure(
    phase: str, name: str, users: int, options: argparse.Namespace, changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One phase of one system, with settings changed, in a process of its own."""
    module, changes = SYSTEMS[name], changes or {}
    written = [f"{key}-{value}" for key, value in changes.items() if key in WRITTEN]
    folder = options.data / str(users) / ".".join([module, *written])
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--child", phase, module, str(folder), str(users), json.dumps(changes)]
    variables = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | variables, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{name}: {phase} of {users} users ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record a system."""
    records: dict[str, dict[str, Any]] = {}
    for name in options.systems:
        print_message(f"{name}: writing and checking")
        measure("write", name, options.check_users, options)
        checked = measure("verify", name, options.check_users, options)
        if not checked["equal"]:
            raise SystemExit(f"{name} does not deliver what was drawn")
        records[name] = {"system": name, **checked, **measure("write", name, options.users, options)}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.systems}
    for number in range(options.rounds):
        for name in options.systems:
            found = {phase: measure(phase, name, options.users, options) for phase in ("steady", "resume")}
            rounds[name].append(found["steady"] | {"resume_s": found["resume"]["resume_s"]})
            print_message(f"round {number + 1}, {name}: {rounds[name][-1]['per_second']:,.0f} sequences/s")
    for name, record in records.items():
        for key in ("per_second", "cpu_us", "start_s", "resume_s"):
            record[key] = statistics.median(of[key] for of in rounds[name])
        of_rounds = [of["per_second"] for of in rounds[name]]
        record |= {"lowest": min(of_rounds), "highest": max(of_rounds), "rounds": rounds[name]}
    return list(records.values())


def tune(options: argparse.Namespace) -> None:
    """Throughput of each system with its settings, and with each of its changes to them; the best of all rounds."""
    print("| system | changed | sequences/s | CPU µs each |\n|---|---|---|---|")
    for name in options.systems:
        path = Path(__file__).with_name("data_service_peers") / f"{SYSTEMS[name]}.py"
        for changes in ({}, *variants(path)):
            measure("write", name, options.users, options, changes)
            found = [measure("steady", name, options.users, options, changes) for _ in range(options.rounds)]
            best = max(found, key=lambda of: of["per_second"])
            text = ", ".join(f"{key} {value}" for key, value in changes.items()) or "-"
            print(f"| {name} | {text} | {best['per_second']:,.0f} | {best['cpu_us']:.0f} |", flush=True)


def variants(path: Path) -> list[dict[str, Any]]:
    """The literal VARIANTS of a file, which is not imported here: its package may be large, or fork badly."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VARIANTS":
            return list(ast.literal_eval(node.value))
    return []


def markdown(records: list[dict[str, Any]]) -> str:
    """The table that docs/data_service.md shows."""
    lines = [
        "| system | sequences/s | lowest to highest | CPU µs each | start-up s | resume s | lost / repeated by it |",
        "|---|---|---|---|---|---|---|",
    ]
    for of in records:
        lines.append(
            f"| {of['system']} | {of['per_second']:,.0f} | {of['lowest']:,.0f} to {of['highest']:,.0f} | "
            f"{of['cpu_us']:.0f} | {of['start_s']:.2f} | {of['resume_s']:.2f} | {of['lost']:,} / {of['repeated']:,} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    if sys.argv[1:2] == ["--child"]:
        phase, module, folder, users, changes = sys.argv[2:]
        child(phase, module, Path(folder), int(users), json.loads(changes))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=200_000)
    parser.add_argument("--check-users", type=int, default=20_480, help="of the small run whose content is compared")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data", type=Path, default=Path("runs/data_service"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/data_service.json"))
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    if options.tune:
        tune(options)
        return
    records = compare(options)
    print(markdown(records))
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    summary = {
        "options": {key: str(value) for key, value in vars(options).items()},
        "records": records,
        "versions": {name: package_version(name) for name in PACKAGES},
        "cpu": next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "environment": environment(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
