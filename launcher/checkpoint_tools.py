"""What `onetrain checkpoint` does: find checkpoints, tell what is in them, verify them, copy them elsewhere."""

import time
from calendar import timegm
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from onetrain.launcher.checkpoints import Best, load_best, run_store
from onetrain.launcher.config import load_config, run_folder
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig
from onetrain.parallel.checkpoint import verify
from onetrain.parallel.checkpoint_saver import MODEL, OPTIMIZER, write_files, write_header
from onetrain.parallel.checkpoint_store import CheckpointStore, FolderStore, open_checkpoint, open_store
from onetrain.parallel.errors import DamagedCheckpointError, ParallelError
from onetrain.parallel.safetensors_writer import file_order

Row = list[Any]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_run(place: str) -> tuple[CheckpointStore, Best | None]:
    """Where the checkpoints of a run are, given its folder, the YAML file of its job, or that place itself."""
    if "://" in place:
        return open_store(place), None
    path = Path(place).absolute()
    if path.is_file():
        config = load_config(path, needs_data=False)
        store, run = run_store(config), run_folder(config)
    elif (path / "config.yaml").exists():
        there = load_config(path / "config.yaml", needs_data=False).train.checkpoint_path
        store, run = open_store(there or path / "checkpoints"), path
    elif path.is_dir():
        store, run = FolderStore(path / "checkpoints" if (path / "checkpoints").is_dir() else path), path
    else:
        raise ConfigError(f"{place} is not there. Give a run's folder, the YAML file of its job, or a URL.")
    return store, load_best(run, store)


def list_rows(store: CheckpointStore, best: Best | None) -> list[Row]:
    """Name, step, size, age, whether best, and whether the sizes are right, of every checkpoint."""
    rows = []
    for name in store.candidates():
        try:
            header = store.header(name)
        except DamagedCheckpointError as error:
            rows.append([name, None, "-", "-", "", str(error)])
            continue
        is_best = best is not None and header["step"] == best.step
        mark = f"{best.metric} {best.value:.4f}" if best is not None and is_best else ""
        size = format_bytes(sum(file["bytes"] for file in header["files"].values()))
        rows.append([name, header["step"], size, _age(header), mark, store.problem(name) or "yes"])
    return rows


def verify_rows(place: str) -> tuple[list[Row], bool]:
    """Name and what is damaged of one checkpoint or of all that a run has; whether all are whole."""
    store, names = _one_or_all(place)
    rows, whole = [], True
    for name in names:
        try:
            problem = verify(store.fetch(name))
        except DamagedCheckpointError as error:
            problem = str(error)
        rows.append([store.where(name), problem or "whole"])
        whole = whole and problem is None
    return rows, whole


def fetch_checkpoint(place: str) -> tuple[Path, dict[str, Any]]:
    """The local folder and the header of one checkpoint. ConfigError where there is none."""
    store, name = open_checkpoint(place)
    if not store.exists(name):
        raise ConfigError(f"{place} is no checkpoint: it has no state.json. Give the folder or URL of one.")
    return store.fetch(name), store.header(name)


def state_rows(header: dict[str, Any]) -> list[Row]:
    """What state.json says, the configuration left out."""
    about = {"step": header["step"], "optimizer": header["optimizer"], **header.get("written", {})}
    about |= {name: value for name, value in header["state"].items() if name != "config"}
    about |= {
        name: f"{format_bytes(file['bytes'])}, xxh3_128 {file['xxh3_128']}" for name, file in header["files"].items()
    }
    return [[key, str(value)] for key, value in _leaves(about)]


def config_rows(header: dict[str, Any]) -> list[Row]:
    """Where the configuration that a checkpoint holds is not the default."""
    saved = dict(_leaves(header["state"].get("config", {})))
    defaults = dict(_leaves(_as_saved(asdict(RunConfig(name="")))))
    return [
        [key, str(value), str(defaults.get(key, "-"))] for key, value in saved.items() if defaults.get(key) != value
    ]


def tensor_rows(folder: Path, header: dict[str, Any]) -> tuple[list[str], list[Row]]:
    """Columns and rows: type, shape and norm of every tensor, with the norms of its moments."""
    moments: dict[str, dict[str, float]] = {}
    if OPTIMIZER in header["files"]:
        with safe_open(folder / OPTIMIZER, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                kind, name = key.split("/", 1)
                moments.setdefault(kind, {})[name] = _norm(file.get_tensor(key))
    rows = []
    with safe_open(folder / MODEL, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            own = [name, str(tensor.dtype).removeprefix("torch."), "x".join(map(str, tensor.shape)), _norm(tensor)]
            rows.append([*own, *(of_kind.get(name) for of_kind in moments.values())])
    return ["tensor", "type", "shape", "norm", *(f"{kind} norm" for kind in moments)], rows


def convert(source: str, target: str, weights_only: bool, dtype: Literal["fp32", "bf16"]) -> int:
    """Copies a checkpoint, which is verified first; the copy is there at once or not at all. Its bytes.

    Without moments, and in bf16, it can start another run and be evaluated, but its own run cannot go on from it.
    """
    if dtype == "bf16" and not weights_only:
        raise ConfigError("--dtype bf16 rounds the weights, so that training cannot go on: give --weights-only too")
    folder, header = fetch_checkpoint(source)
    if problem := verify(folder):
        raise DamagedCheckpointError(problem)
    store, name = open_checkpoint(target)
    if store.exists(name):
        raise ConfigError(f"{target} is a checkpoint already. Choose another place, or remove it.")
    if store.taken(name):
        raise ConfigError(
            f"{target} is there already, and would be replaced: give the folder that the checkpoint is to be, such as "
            f"{target.rstrip('/')}/{folder.name}."
        )
    files = [MODEL] if weights_only or OPTIMIZER not in header["files"] else [MODEL, OPTIMIZER]
    layouts = {file: _layout(folder / file, DTYPES[dtype]) for file in files}
    try:
        staging = store.staging(name)
        checks = write_files(staging, layouts, _content(folder, layouts))
        size = write_header(staging, {**header, "converted_from": source}, checks)
        store.commit(name)
    except OSError as error:
        raise ParallelError(f"Cannot write checkpoint {target}: {error}.") from error
    finally:
        store.discard(name)
    return size


def format_bytes(number: float) -> str:
    """1,234 B, 1.2 GB."""
    power = min(4, max(0, (len(str(int(number))) - 1) // 3))
    digits = 0 if power == 0 else 1
    return f"{number / 1000**power:,.{digits}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _one_or_all(place: str) -> tuple[CheckpointStore, list[str]]:
    store, name = open_checkpoint(place)
    if store.exists(name):
        return store, [name]
    if name.startswith("step_"):
        raise ConfigError(f"{place} is no checkpoint: it has no state.json.")
    store, _ = open_run(place)
    names = store.candidates()
    if not names:
        raise ConfigError(f"{store.where('').rstrip('/')} holds no checkpoint.")
    return store, names


def _layout(path: Path, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    with safe_open(path, "pt") as file:
        layout = {}
        for name in file.offset_keys():  # in the order of the file
            tensor = file.get_tensor(name)
            layout[name] = (dtype if tensor.dtype == torch.float32 else tensor.dtype, tuple(tensor.shape))
    return layout


def _content(folder: Path, layouts: dict[str, Any]) -> Iterator[tuple[str, str, Iterator[Tensor]]]:
    for name, layout in layouts.items():
        with safe_open(folder / name, "pt") as file:
            for tensor in file_order(layout):
                yield name, tensor, iter((file.get_tensor(tensor).to(layout[tensor][0]).contiguous(),))


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _as_saved(value: Any) -> Any:
    """As JSON holds it: lists for tuples."""
    if isinstance(value, dict):
        return {key: _as_saved(inner) for key, inner in value.items()}
    return [_as_saved(inner) for inner in value] if isinstance(value, list | tuple) else value


def _age(header: dict[str, Any]) -> str:
    written = header.get("written", {}).get("time")
    if written is None:
        return "-"
    seconds = max(0.0, time.time() - timegm(time.strptime(written, "%Y-%m-%dT%H:%M:%SZ")))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
