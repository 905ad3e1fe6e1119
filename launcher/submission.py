"""What `onetrain submit` sends to a cluster: configuration, this installation's source, and what it was tried with.

The cluster runs exactly the source of the client; dependencies come from the cluster, and `submission.json` says which
versions they must have (`onetrain.launcher.job_entry` compares, on the node of the job).
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from onetrain.cluster.kubernetes_options import SECRET_NAME
from onetrain.launcher.environment import PACKAGES, git_state, package_version
from onetrain.launcher.errors import ConfigError

ROOMS = ("launcher", "model", "parallel", "data", "cluster")
CONFIG, SUBMISSION = "config.yaml", "submission.json"
ENTRYPOINT = f"exec python -m onetrain.launcher.job_entry {CONFIG}"
MUST_MATCH = ("python", "torch", "deepspeed", "ray", "megatron-core", "numpy", "pyarrow", "onetrain", "source")
IMAGE_MUST_MATCH = ("ray", "onetrain", "source")  # where nothing but the configuration comes from the client
LARGEST_BYTES = 20 * 2**20
TRAVELLING = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL")
TRAVELLING_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_")
MASK = "********"


def source_files() -> dict[str, Path]:
    """Path in the package -> file, of every Python file of this installation, wherever its five folders are."""
    files = {}
    for room in ROOMS:
        spec = importlib.util.find_spec(f"onetrain.{room}")
        assert spec is not None, room
        for folder in map(Path, spec.submodule_search_locations or ()):
            for file in folder.rglob("*.py"):
                files[f"onetrain/{room}/{file.relative_to(folder).as_posix()}"] = file
    return dict(sorted(files.items()))


def source_hash(files: Mapping[str, Path] | None = None) -> str:
    """Of names and contents of the source files; equal on two machines that have the same code."""
    digest = hashlib.sha256()
    for name, file in (source_files() if files is None else files).items():
        content = file.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def facts() -> dict[str, Any]:
    """This installation: Python, packages, source and commit."""
    return {
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "source": source_hash(),
        "git": git_state(Path(__file__).resolve().parent.parent),
    }


def submission(must_match: Iterable[str] = MUST_MATCH) -> dict[str, Any]:
    """The content of submission.json."""
    return {**facts(), "must_match": list(must_match)}


def differences(submitted: Mapping[str, Any], here: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(name, submitted from, here, what to do) of everything that must match and does not."""
    rows = []
    for name in submitted["must_match"]:
        theirs, ours = _comparable(submitted, name), _comparable(here, name)
        if theirs != ours:
            rows.append((name, theirs or "not installed", ours or "not installed", _remedy(name, theirs, ours)))
    return rows


def _comparable(side: Mapping[str, Any], name: str) -> str | None:
    """What has to be equal: 3.11 of Python, and versions without their build (torch 2.13.0+cpu is as 2.13.0+cu130)."""
    if name == "source":
        return str(side["source"])
    if name == "python":
        return ".".join(str(side["python"]).split(".")[:2])
    version = side["packages"].get(name)
    return None if version is None else str(version).split("+")[0]


def _remedy(name: str, theirs: str | None, ours: str | None) -> str:
    if name == "source":
        return "install the same commit on every node, or submit without --installed"
    if name == "python":
        return f"Python {theirs} on every node, or {ours} where you submit"
    there = f"pip install {name}=={theirs} on every node" if theirs else f"remove {name} on every node"
    return f"{there}, or " + (f"{name}=={ours} where you submit" if ours else f"remove {name} where you submit")


def stage(config_text: str, folder: Path, installed: bool = False) -> dict[str, int]:
    """Fill an empty folder with what is uploaded; path -> size in bytes.

    Args:
        config_text: the resolved configuration, in YAML.
        folder: where to.
        installed: leave the source out; the cluster has the same.

    Raises:
        ConfigError: it is larger than LARGEST_BYTES.
    """
    contents = {CONFIG: config_text, SUBMISSION: json.dumps(submission(), indent=2) + "\n"}
    if not installed:
        version = package_version("onetrain")
        contents["onetrain/__init__.py"] = '"""The submitted source; a regular package wins over an installed one."""\n'
        contents[f"onetrain-{version}.dist-info/METADATA"] = (
            f"Metadata-Version: 2.1\nName: onetrain\nVersion: {version}\n"
        )
        for name, file in source_files().items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    for name, text in contents.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    if (total := sum(files.values())) > LARGEST_BYTES:
        largest = sorted(files, key=lambda name: -files[name])[:3]
        raise ConfigError(
            f"{total:,} bytes to upload, more than {LARGEST_BYTES:,}; the largest files are "
            + ", ".join(f"{name} ({files[name]:,})" for name in largest)
            + ". Remove what is no source, or install onetrain on the cluster and submit with --installed"
        )
    return dict(sorted(files.items()))


def job_environment(given: Iterable[str], own: Mapping[str, str]) -> dict[str, str]:
    """The environment variables that travel: tracking and network ones of this shell, and those `given`.

    Args:
        given: NAME (its value here) or NAME=VALUE each.
        own: what the job gets unless `given` says otherwise.

    Raises:
        ConfigError: a NAME that is not set here, or a malformed one.
    """
    travelling = {
        name: value
        for name, value in sorted(os.environ.items())
        if name in TRAVELLING or name.startswith(TRAVELLING_PREFIXES)
    }
    chosen = {}
    for variable in given:
        name, equals, value = variable.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--env {variable.partition('=')[0]!r}: write NAME, or NAME=VALUE")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: is not set here; export it, or write --env {name}=VALUE")
        chosen[name] = value if equals else os.environ[name]
    if token := next((name for name in chosen if name.startswith("RAY_AUTH_")), None):
        raise ConfigError(f"--env {token}: the cluster's nodes have their token; it does not travel with a job")
    return {**own, **travelling, **chosen}


def masked(environment: Mapping[str, str]) -> dict[str, str]:
    """For printing: the values of what looks like a secret are left out."""
    return {name: MASK if SECRET_NAME.search(name) else value for name, value in environment.items()}


def job_id(run: str, moment: str) -> str:
    """Ray's submission id: part of addresses and file names."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', run)}-{moment}"
