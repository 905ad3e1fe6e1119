"""What would fail, before it fails: checks of this machine, and of one configuration on it. Prints nothing."""

import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

from onetrain.cluster.errors import ClusterError
from onetrain.cluster.options import ClusterOptions
from onetrain.data.errors import DataError
from onetrain.data.manifest import FILE_NAME as MANIFEST
from onetrain.data.manifest import verify_shards, verify_sizes
from onetrain.data.remote import file_exists, is_remote
from onetrain.data.sids import DESCRIPTION as SIDS
from onetrain.data.sids import SidMap
from onetrain.data.store import local_folder, open_store
from onetrain.data.versions import newest_version, open_version, version_folder
from onetrain.launcher.config import run_folder
from onetrain.launcher.environment import package_version
from onetrain.launcher.options import RunConfig
from onetrain.parallel.errors import ParallelError

TESTED_PYTHON = (3, 11)
TESTED = {  # the same as constraints.txt
    "torch": "2.13.0",
    "deepspeed": "0.19.8",
    "ray": "2.60.0",
    "megatron-core": "0.16.1",
    "wandb": "0.31.0",
    "numpy": "2.4.6",
    "numba": "0.68.1",
    "pyarrow": "26.0.1",
    "duckdb": "2.0.0",
    "scikit-learn": "1.9.1",
    "safetensors": "0.8.0",
    "pydantic": "2.14.3",
}
GIB = 2**30
LEAST_SHARED_MEMORY = 256 * 2**20
LEAST_OPEN_FILES = 8192
LEAST_DISK, GOOD_DISK = GIB, 10 * GIB


@dataclass(frozen=True)
class Check:
    """One finding. `fail`: training will not work; `warn`: it may not, or not as tested."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str = ""  # what to do; empty when ok


def checks(config: RunConfig | None = None, quick: bool = False) -> list[Check]:
    """Check this machine and, with `config`, what that job needs.

    `quick` neither starts Ray, nor imports DeepSpeed, nor reads whole shards.
    """
    found = [_python(), _libraries(), _device(config), _gloo()]
    if not quick:
        found += [_deepspeed(), _ray(config.cluster if config else None)]
    found += [shared_memory(), _open_files(), _clock()]
    found += folders([Path.cwd()] if config is None else [run_folder(config), *_local(config.data.prepared)])
    found.append(_wandb(config.tracking.wandb if config else "auto"))
    if config is not None:
        found += [_mesh(config), _threads(config), *prepared_data(config, quick)]
    return found


def _python() -> Check:
    wanted = ".".join(map(str, TESTED_PYTHON))
    here = sys.version_info[:2]
    if here == TESTED_PYTHON:
        return Check("python", "ok", platform.python_version())
    state: Literal["warn", "fail"] = "fail" if here < TESTED_PYTHON else "warn"
    return Check("python", state, f"{platform.python_version()}; tested with {wanted}", f"use Python {wanted}")


def _libraries() -> Check:
    installed = {name: package_version(name) for name in TESTED}
    missing = [name for name, version in installed.items() if version is None]
    # a local part, as in 2.13.0+cpu, names the build and not another version
    other = [
        f"{name} {version} (tested {TESTED[name]})"
        for name, version in installed.items()
        if version is not None and version.partition("+")[0] != TESTED[name]
    ]
    fix = "pip install -c constraints.txt -e ."
    if missing:
        return Check("libraries", "fail", f"not installed: {', '.join(missing)}", fix)
    if other:
        return Check("libraries", "warn", ", ".join(other), fix)
    return Check("libraries", "ok", f"{len(TESTED)} at the tested versions")


def _device(config: RunConfig | None) -> Check:
    import torch  # late, because it takes seconds

    local_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    wanted = 0 if config is None or config.cluster.address else config.cluster.workers * config.cluster.gpus_per_worker
    if wanted > local_gpus:
        return Check(
            "device",
            "fail",
            f"torch {torch.__version__} sees {local_gpus} CUDA devices, the job wants {wanted:g}",
            "lower cluster.workers or gpus_per_worker, name a cluster.address, or install a driver and torch for CUDA",
        )
    if not local_gpus:
        return Check("device", "ok", f"CPU only, {os.cpu_count()} cores")
    names = sorted({torch.cuda.get_device_name(index) for index in range(local_gpus)})
    memory = min(torch.cuda.mem_get_info(index)[0] for index in range(local_gpus))
    return Check("device", "ok", f"{local_gpus} x {', '.join(names)}, at least {memory / GIB:.0f} GiB free on each")


def _gloo() -> Check:
    import torch.distributed as dist

    try:
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=30))
    except RuntimeError as error:
        return Check(
            "gloo",
            "fail",
            str(error).splitlines()[0],
            "let this host's name resolve (/etc/hosts), or set GLOO_SOCKET_IFNAME to the network interface",
        )
    return Check("gloo", "ok", "a process group starts")


def _deepspeed() -> Check:
    import torch

    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", "import deepspeed"], env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check("deepspeed", "fail", f"cannot be imported: {reason}", "pip install -c constraints.txt deepspeed")
    return Check("deepspeed", "ok", "can be imported")


def _ray(wanted: ClusterOptions | None) -> Check:
    """Start or join Ray, and compare its resources with the wanted ones."""
    import ray

    from onetrain.cluster.local_ray import ray_session

    options = wanted or ClusterOptions(workers=1)
    started = time.monotonic()
    try:
        with ray_session(options):
            seconds = time.monotonic() - started
            total = ray.cluster_resources()
            nodes = sum(node["Alive"] for node in ray.nodes())
    except ClusterError as error:
        return Check("ray", "fail", str(error), "see the message; /tmp and the home folder must be writable")
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    how = f"joined {options.address}" if options.address else "local Ray started"
    detail = f"{how} in {seconds:.1f} s: {nodes} node(s), {cpus:g} CPU, {gpus:g} GPU"
    missing = [
        f"{options.workers * each:g} {kind}"
        for kind, each, there in (("CPU", options.cpus_per_worker, cpus), ("GPU", options.gpus_per_worker, gpus))
        if options.workers * each > there
    ]
    if missing:
        fix = "lower cluster.workers, cpus_per_worker or gpus_per_worker, or add nodes"
        return Check("ray", "fail", f"{detail}; the job wants {', '.join(missing)}", fix)
    return Check("ray", "ok", detail)


def shared_memory() -> Check:
    """Room in /dev/shm, which Ray and NCCL use."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Check("shared memory", "warn", f"there is no {folder}", "Ray uses /tmp instead, which is slower")
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free in {folder}"
    if usage.free < LEAST_SHARED_MEMORY:
        return Check(
            "shared memory", "warn", detail, "start the container with --shm-size=2g, or mount a memory volume"
        )
    return Check("shared memory", "ok", detail)


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Ray raises the soft limit up to the hard one by itself
    if hard != resource.RLIM_INFINITY and hard < LEAST_OPEN_FILES:
        return Check("open files", "warn", f"limit {soft}, at most {hard}", f"ulimit -Hn {LEAST_OPEN_FILES} or more")
    return Check("open files", "ok", f"limit {soft}, at most {'unlimited' if hard < 0 else hard}")


def _clock() -> Check:
    installed = Path(__file__).stat().st_mtime
    if time.time() < installed:
        return Check("clock", "warn", f"{time.ctime()} is before this code was installed", "set the clock (NTP)")
    return Check("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def folders(paths: list[Path], least: int = LEAST_DISK) -> Iterator[Check]:
    """Whether each folder can be written or made, and whether it has room for `least` bytes."""
    for folder in paths:
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        name = f"folder {folder}"
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield Check(
                name, "fail", f"cannot be written: {there}", "change its owner, or storage_path / data.prepared"
            )
            continue
        free = shutil.disk_usage(there).free
        detail = f"writable, {free / GIB:.1f} GiB free"
        fix = "free some space, or change storage_path / data.prepared"
        if free < least:
            needed = f"; {least / GIB:.1f} are needed" if least > LEAST_DISK else ""
            yield Check(name, "fail", detail + needed, fix)
        elif free < GOOD_DISK:
            yield Check(name, "warn", detail, fix)
        else:
            yield Check(name, "ok", detail)


def _wandb(mode: str) -> Check:
    if mode in ("disabled", "offline"):
        return Check("wandb", "ok", mode)
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        account = wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:
        return Check("wandb", "warn", str(error).rstrip("."), "wandb login")
    if account:
        return Check("wandb", "ok", "an account is set up")
    if mode == "online":
        fix = "wandb login, or tracking.wandb: auto"
        return Check("wandb", "fail", "tracking.wandb is online, but no account is set up", fix)
    return Check("wandb", "ok", "no account: runs are recorded offline (`wandb login` to change that)")


def _mesh(config: RunConfig) -> Check:
    from onetrain.parallel.deepspeed_config import check_options  # late, because it takes seconds

    try:
        mesh = check_options(config.parallel, config.cluster.workers, config.model)
    except ParallelError as error:
        return Check("mesh", "fail", str(error), "change the named options")
    return Check(
        "mesh",
        "ok",
        f"{mesh.summary()}; global batch {mesh.global_batch_size} in {mesh.data_parallel} data ranks x "
        f"{mesh.accumulation_steps} micro batches of about {mesh.micro_batch_size}",
    )


def _threads(config: RunConfig) -> Check:
    """A local Ray gives out as many CPUs as the job asks for; here is where too few cores are told."""
    cluster, threads, cores = config.cluster, config.train.threads_per_worker, os.cpu_count() or 1
    if cluster.address:
        return Check("cores", "ok", f"the nodes of {cluster.address}, as far as Ray counts them")
    detail = f"{cluster.workers} workers x {threads} threads on {cores} cores"
    if cluster.workers * threads > cores:
        return Check("cores", "warn", detail, "slow: lower cluster.workers or train.threads_per_worker")
    return Check("cores", "ok", detail)


def _local(folder: str) -> list[Path]:
    return [] if is_remote(folder) else [local_folder(folder)]


def prepared_data(config: RunConfig, quick: bool) -> Iterator[Check]:
    """Files of every version by size (and checksum unless `quick`), and the SID map by its fingerprint."""
    folder = config.data.prepared
    if not file_exists(folder, MANIFEST):
        yield Check("prepared data", "warn", f"none in {folder} yet", "onetrain prepare")
        return
    try:
        store, newest = open_store(folder, config.stream), newest_version(folder)
        manifests = [open_version(store, version) for version in range(newest + 1)]
        for version, manifest in enumerate([] if is_remote(folder) else manifests):
            (verify_sizes if quick else verify_shards)(manifest, local_folder(folder) / version_folder(version))
    except DataError as error:
        yield Check("prepared data", "fail", str(error), "onetrain prepare")
        return
    manifest = manifests[0]
    detail = f"{manifest.users:,} users, {manifest.events:,} events in {len(manifest.shards)} shards"
    if newest:
        detail += f", {sum(m.n_train_events for m in manifests[1:]):,} events in {newest} appended versions"
    checked = "to be checked when they are read" if is_remote(folder) else f"{'sizes' if quick else 'checksums'} right"
    yield Check("prepared data", "ok", f"{detail}, {checked}")
    if not file_exists(f"{folder}/sids", SIDS):
        yield Check("semantic IDs", "warn", f"none in {folder}/sids yet", "onetrain tokenize")
        return
    try:
        sid_map = SidMap.load(f"{folder}/sids", config.stream)
        sid_map.check_against(manifest)
    except DataError as error:
        yield Check("semantic IDs", "fail", str(error), "onetrain tokenize")
        return
    yield Check(
        "semantic IDs", "ok", f"{len(sid_map.codes_IL):,} items, codes {list(sid_map.sizes)}, fingerprint right"
    )
