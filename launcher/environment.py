"""What a run ran on: versions, git commit, machine and device. Saved with every run, so that it can be repeated."""

import json
import os
import platform
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from onetrain.cluster.atomic import write_atomically

PACKAGES = (
    "onetrain",
    "torch",
    "deepspeed",
    "ray",
    "megatron-core",
    "wandb",
    "numpy",
    "pyarrow",
    "duckdb",
    "scikit-learn",
    "safetensors",
    "pydantic",
)
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "DS_ACCELERATOR",
    "NCCL_DEBUG",
)


def environment() -> dict[str, Any]:
    """Everything about this process that can change a result, as plain values that JSON takes."""
    return {
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "git": git_state(Path(__file__).resolve().parent.parent) or _submitted_git(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "device": _device(),
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def save_environment(run: Path, details: dict[str, Any]) -> None:
    """Write <run>/environment.json, atomically: the environment, and further details of the attempt."""
    write_atomically(run / "environment.json", json.dumps({**environment(), **details}, indent=1) + "\n")


def package_version(name: str) -> str | None:
    """Installed version of a distribution, None when it is not installed. Imports nothing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it ("dirty"); None when `folder` is not the top of a checkout."""
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != folder.resolve():
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _submitted_git() -> dict[str, Any] | None:
    """The commit where a job was submitted: beside the source that came with it, or in a manifest's environment."""
    beside = Path(__file__).resolve().parents[2] / "submission.json"
    text = beside.read_text(encoding="utf-8") if beside.is_file() else os.environ.get("ONETRAIN_SUBMISSION")
    return json.loads(text).get("git") if text else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git on this machine, or a hanging file system
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device() -> dict[str, Any]:
    import torch  # here, because torch takes seconds to import

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return {"type": "cuda", "names": names, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    return {"type": "cpu", "names": [platform.processor() or platform.machine()], "threads": torch.get_num_threads()}
