"""The canonical checkpoint: parameter name -> fp32 value and moments, independent of ZeRO stage and world size.

A checkpoint is a folder: `model.safetensors` (parameters in fp32 and persistent buffers), `optimizer.safetensors`
("<moment>/<parameter>") and `state.json` (format, step, sizes and xxh3_128 of those files, and the caller's state, such
as the data cursor). checkpoint_saver.py writes it; here it is verified and read.
"""

from collections.abc import Container
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from onetrain.model.ksa.warm_start import Bridge, bridge
from onetrain.parallel.checkpoint_agreement import agreement_of
from onetrain.parallel.checkpoint_header import FORMAT, STATE, damage, read_header
from onetrain.parallel.checkpoint_saver import MODEL, OPTIMIZER, save_now
from onetrain.parallel.checkpoint_store import FolderStore, step_name
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import DamagedCheckpointError, ParallelError
from onetrain.parallel.optimizer_state import MOMENTS, VALUE, canonical_shapes, scatter
from onetrain.parallel.snapshot import persistent_buffers

BLEND_TOLERANCE = 1e-6  # fp32 rounding
UNREADABLE = (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError)  # what damage may raise
SAME = Bridge()  # the checkpoint has the weights of the model
__all__ = ["MODEL", "OPTIMIZER", "STATE"]


def save(engine: Engine, folder: Path, state: dict[str, Any]) -> None:
    """Writes the checkpoint `folder`, replacing one of that name; every rank takes part, rank 0 writes.

    `state` is the caller's, as JSON values. Raises ParallelError on every rank when it cannot be written (disk full); a
    checkpoint already in `folder` is then still whole, and nothing half-written is left.
    """
    save_now(engine, FolderStore(folder.parent), folder.name, state)


def load(engine: Engine, folder: Path, verified: bool = False) -> dict[str, Any]:
    """Restores weights, moments and step exactly, at any ZeRO stage and world size; returns the caller's state.

    Files that rank 0 has just verified are not verified again.

    Raises ParallelError on every rank for a damaged file, another optimizer, or parameters that do not match by name
    and shape.
    """
    header, _ = _checked(engine, folder, verified=verified)
    saved, ours = header["optimizer"], engine.optimizer_options.name
    if OPTIMIZER not in header["files"]:
        raise ParallelError(f"Checkpoint {folder} holds weights only: start from it with train.warm_start.")
    if saved != ours:
        raise ParallelError(
            f"Checkpoint {folder} holds the state of optimizer {saved}; this run uses {ours}: "
            f"set optimizer.name to {saved}, or start from its weights only with train.warm_start."
        )
    engine.step = header["step"]
    _restore(engine, folder, (VALUE, *MOMENTS[ours]))
    return header["state"]


def load_weights(target: nn.Module | Engine, folder: Path) -> dict[str, Any]:
    """Restores only the weights and buffers, exactly those, into an engine (every rank takes part) or a plain module.

    Returns the caller's state of that checkpoint. Raises ParallelError for a damaged file, and for missing, unexpected
    or differently shaped parameters.
    """
    if isinstance(target, Engine):
        header, _ = _checked(target, folder)
        _restore(target, folder, (VALUE,))
        return header["state"]
    header = _read_header(folder)
    _check_files(folder, header)
    _check_shapes(folder, {name: tuple(p.shape) for name, p in target.named_parameters()}, target)
    with safe_open(folder / MODEL, "pt") as file, torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(file.get_tensor(name))
        _restore_buffers(target, file)
    return header["state"]


def start_from(engine: Engine, folder: Path) -> Bridge:
    """Starts from only the weights and buffers of a checkpoint; every rank takes part.

    As strict as `load_weights`, but for the weights of summary tokens, which a conversion adds and drops; returns what
    they were made of. Raises ParallelError also where dropped ones are still in use.
    """
    _, across = _checked(engine, folder, bridged=True)
    _restore(engine, folder, (VALUE,), across)
    return across


def read_state(folder: Path) -> dict[str, Any]:
    """The caller's state of a checkpoint, without loading a tensor. Raises ParallelError when it cannot be read."""
    return _read_header(folder)["state"]


def verify(folder: Path) -> str | None:
    """What is damaged in a checkpoint, or None. Raises ParallelError for one of another format."""
    try:
        _check_files(folder, _read_header(folder))
    except DamagedCheckpointError as error:
        return str(error)
    except UNREADABLE as error:
        return f"Checkpoint {folder} is damaged: {type(error).__name__}: {error}. Use another checkpoint."
    return None


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return checkpoints / step_name(step)


def latest(checkpoints: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    name = FolderStore(checkpoints).latest()
    return None if name is None else checkpoints / name


def _checked(
    engine: Engine, folder: Path, bridged: bool = False, verified: bool = False
) -> tuple[dict[str, Any], Bridge]:
    """The header and how weights cross, on every rank; rank 0 checks the files, every rank the shapes."""
    header, across, error = {}, SAME, None  # type: dict[str, Any], Bridge, Exception | None
    try:
        header = _read_header(folder)
        if engine.ranks.is_main and not verified:
            _check_files(folder, header)
        ours = canonical_shapes(engine)
        if bridged:
            across = _bridge(folder, {*ours, *persistent_buffers(engine.module)})
            _check_blends(folder, engine.module)
        _check_shapes(folder, ours, engine.module, across)
    except ParallelError as failure:
        error = failure
    except UNREADABLE as failure:
        text = f"Checkpoint {folder} is damaged: {type(failure).__name__}: {failure}. Use another checkpoint."
        error = DamagedCheckpointError(text)
    agreement_of(engine).raise_together(error)
    return header, across


def _read_header(folder: Path) -> dict[str, Any]:
    header = read_header(folder)
    if header.get("format") != FORMAT:
        writer = header.get("written", {}).get("onetrain", "the version that wrote it")
        raise ParallelError(
            f"Checkpoint {folder} has format {header.get('format')}; this version reads {FORMAT}. "
            f"Use onetrain {writer}, or choose another name to begin anew."
        )
    return header


def _check_files(folder: Path, header: dict[str, Any]) -> None:
    if problem := damage(folder, header):
        raise DamagedCheckpointError(f"Checkpoint {folder} is damaged: {problem}. Use another checkpoint.")


def _bridge(folder: Path, ours: set[str]) -> Bridge:
    """Raises ParallelError for summary projections that would be dropped while they are in use."""
    across = bridge(ours, _saved_shapes(folder))
    with safe_open(folder / MODEL, "pt") as file:
        in_use = {name: value for name in sorted(across.blends) if (value := float(file.get_tensor(name))) != 0}
    if in_use:
        name, value = next(iter(in_use.items()))
        raise ParallelError(
            f"Checkpoint {folder} still uses its summary tokens' own projections ({name} is {value:g}), which this "
            "model does not have: its pathway's blend in model.ksa is 0. Anneal them away first (conversion.stage "
            "anneal, with train.steps above conversion.anneal_to), or set blend to 1."
        )
    return across


def _check_blends(folder: Path, module: nn.Module) -> None:
    """What the configuration says of projections that both have, the checkpoint must say too: it would win silently."""
    ours = {name: float(value) for name, value in persistent_buffers(module).items() if name.endswith(".blend")}
    with safe_open(folder / MODEL, "pt") as file:
        names = set(file.keys()) & set(ours)
        saved = {name: float(file.get_tensor(name)) for name in names}
    for name in sorted(names):
        if abs(saved[name] - ours[name]) > BLEND_TOLERANCE:
            raise ParallelError(
                f"Checkpoint {folder} has {name} {saved[name]:g}, and this model starts with {ours[name]:g}: set the "
                f"pathway's blend in model.ksa to {saved[name]:g}, or start from a checkpoint of that blend."
            )


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(folder / MODEL, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpointError(
            f"Checkpoint file {folder / MODEL} is damaged: {error}. Use another checkpoint."
        ) from error


def _check_shapes(folder: Path, ours: dict[str, tuple[int, ...]], module: nn.Module, across: Bridge = SAME) -> None:
    ours = {**ours, **{name: tuple(buffer.shape) for name, buffer in persistent_buffers(module).items()}}
    saved = _saved_shapes(folder)
    made = across.kept | across.copies.keys()
    problems = [f"{name} is missing" for name in ours if name not in saved and name not in made]
    problems += [f"{name} is unexpected" for name in saved if name not in ours and name not in across.dropped]
    problems += [
        f"{name} has shape {saved[name]} instead of {shape}"
        for name, shape in ours.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ParallelError(f"Checkpoint {folder} does not fit the model: {shown}. Build the model as it was saved.")


def _restore(engine: Engine, folder: Path, kinds: tuple[str, ...], across: Bridge = SAME) -> None:
    with ExitStack() as files:
        model = files.enter_context(safe_open(folder / MODEL, "pt"))
        optimizer = files.enter_context(safe_open(folder / OPTIMIZER, "pt")) if kinds != (VALUE,) else None

        def read(kind: str, name: str) -> Tensor:
            source = across.copies.get(name, name)
            return optimizer.get_tensor(f"{kind}/{source}") if optimizer and kind != VALUE else model.get_tensor(source)

        scatter(engine, read, kinds, across.kept)
        _restore_buffers(engine.module, model, across.kept)


def _restore_buffers(module: nn.Module, file: Any, keep: Container[str] = ()) -> None:
    with torch.no_grad():
        for name, buffer in persistent_buffers(module).items():
            if name not in keep:
                buffer.copy_(file.get_tensor(name))
