"""Saves checkpoints, in the foreground or beside training, by the same code and to the same bytes.

Training stands still while every rank copies its own share of the state to host memory (snapshot.py). A thread of every
rank then brings the shares together on rank 0, which streams them into the files; `finish` and the next save wait for
it. Only one save is under way at a time.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from onetrain.parallel.checkpoint_agreement import agreement_of
from onetrain.parallel.checkpoint_header import FORMAT, STATE, header_text, sync
from onetrain.parallel.checkpoint_store import CheckpointStore
from onetrain.parallel.engine import Engine
from onetrain.parallel.errors import SaveError
from onetrain.parallel.safetensors_writer import Layout, SafetensorsWriter, file_order
from onetrain.parallel.snapshot import Snapshot

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
FAILURES = 3  # in a row, before saving is given up
CLOSE_S = 5.0  # for a save under way to end when its engine is closed
Mode = Literal["sync", "async"]


@dataclass(frozen=True)
class SaveOutcome:
    """What became of a save."""

    step: int
    path: str
    bytes: int
    blocked_s: float  # that training stood still, the wait for the save before included
    write_s: float  # from the copy to the end
    mode: Mode
    problem: str | None  # why there is no such checkpoint


@dataclass
class _Save:
    """A save under way, on one rank."""

    name: str
    header: dict[str, Any]
    mode: Mode
    bytes: int = 0
    blocked_s: float = 0.0
    write_s: float = 0.0
    problem: str | None = None
    thread: threading.Thread | None = None


class CheckpointSaver:
    """Saves an engine's state into a store. Every rank makes one, and calls `save` and `finish` at the same steps."""

    def __init__(self, engine: Engine, store: CheckpointStore) -> None:
        self.engine, self.store, self.ranks = engine, store, engine.ranks
        self.agreement = agreement_of(engine)
        self._under_way: _Save | None = None
        self._told: list[SaveOutcome] = []
        self._failures = 0  # in a row
        self._newest_problem: str | None = None
        self._closes = False  # with the engine

    def save(self, name: str, state: dict[str, Any], mode: Mode = "async") -> None:
        """Saves the engine's state as it is now, with `state` of the caller (JSON values), under `name`.

        A save that fails is an outcome, and training may go on; after three in a row this raises SaveError, on
        every rank.
        """
        begun = time.perf_counter()
        self._wait()
        if self._failures >= FAILURES:
            raise SaveError(f"{FAILURES} saves in a row have failed, the last one so: {self._newest_problem}")
        snapshot = snapshot_of(self.engine)
        snapshot.take(copy=mode == "async")
        save = _Save(name, _header(self.engine, state), mode)
        if mode == "sync":
            self._write(save, snapshot)
            save.blocked_s = time.perf_counter() - begun
            self._under_way = save
            self._wait()
            return
        if not self._closes:
            self.engine.at_close.append(self.close)
            self._closes = True
        save.thread = threading.Thread(target=self._write, args=(save, snapshot), name="checkpoint", daemon=True)
        save.thread.start()
        save.blocked_s = time.perf_counter() - begun
        self._under_way = save

    def outcomes(self) -> list[SaveOutcome]:
        """Of saves that have ended since the last call; rank 0's word. Cheap; call it at every step."""
        save = self._under_way
        if save is not None and save.thread is not None and not save.thread.is_alive():
            self._tell(save)
            save.thread = None  # told; `_wait` has yet to agree on it
        told, self._told = self._told, []
        return told

    def finish(self) -> None:
        """Waits for the save under way. Raises SaveError, on every rank, where the newest save failed."""
        self._wait()
        if self._newest_problem is not None:
            raise SaveError(self._newest_problem)

    def close(self) -> None:
        """Ends a save under way, unless it ends by itself in a few seconds; what was there before stays whole."""
        save, self._under_way = self._under_way, None
        if save is None or save.thread is None:
            return
        save.thread.join(CLOSE_S)
        if save.thread.is_alive() and self.engine.snapshot is not None:
            self.engine.snapshot.stop()
            save.thread.join(CLOSE_S)
        if save.thread.is_alive():
            save.problem = _ended(self.store.where(save.name))
        self._tell(save)

    def _wait(self) -> None:
        """Until the save under way has ended, on all ranks, which then agree on what became of it."""
        save, self._under_way = self._under_way, None
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()
        if save.thread is not None or save.mode == "sync":
            self._tell(save)
        self._newest_problem = self.agreement.first_error(save.problem)
        self._failures = 0 if self._newest_problem is None else self._failures + 1

    def _tell(self, save: _Save) -> None:
        step, where = save.header["step"], self.store.where(save.name)
        self._told.append(SaveOutcome(step, where, save.bytes, save.blocked_s, save.write_s, save.mode, save.problem))

    def _write(self, save: _Save, snapshot: Snapshot) -> None:
        """On every rank, in any thread: rank 0 writes what the others send."""
        begun = time.perf_counter()
        try:
            if self.ranks.is_main:
                save.bytes = _write_checkpoint(snapshot, self.store, save.name, save.header)
            else:
                snapshot.send()
        except Exception as error:
            where = self.store.where(save.name)
            save.problem = (
                f"Cannot write checkpoint {where}: {error}. Free space there (or copy its checkpoints to another place "
                "and set train.checkpoint_path to that), then resume."
            )
            if snapshot.stopped:
                save.problem = _ended(where)
        save.write_s = time.perf_counter() - begun


def _ended(where: str) -> str:
    return f"Checkpoint {where} was not written: the run ended before it was."


def save_now(engine: Engine, store: CheckpointStore, name: str, state: dict[str, Any]) -> None:
    """One save in the foreground; every rank takes part. Raises ParallelError on every rank when it fails."""
    saver = CheckpointSaver(engine, store)
    saver.save(name, state, "sync")
    saver.finish()


def snapshot_of(engine: Engine) -> Snapshot:
    """The engine's own, made at first use; every rank takes part in that."""
    if engine.snapshot is None:
        engine.snapshot = Snapshot(engine)
    return engine.snapshot


def write_files(
    folder: Path, files: Mapping[str, Layout], content: Iterator[tuple[str, str, Iterator[Tensor]]]
) -> dict:
    """Writes safetensors files of these layouts; `content` gives (file, tensor, its elements) in their order.

    Size and checksum of every file.
    """
    checks, writer, current = {}, None, None
    try:
        for file, _, elements in content:
            if file != current:
                if writer is not None:
                    checks[current] = writer.close()
                writer, current = SafetensorsWriter(folder / file, files[file]), file
            for chunk in elements:
                assert writer is not None
                writer.write(chunk)
        if writer is not None:
            checks[current] = writer.close()
    finally:
        if writer is not None:
            writer.__exit__(None, None, None)
    for file in files.keys() - checks.keys():  # without a tensor
        with SafetensorsWriter(folder / file, files[file]) as empty:
            checks[file] = empty.close()
    return {file: checks[file] for file in files}


def write_header(folder: Path, header: dict[str, Any], checks: dict[str, Any]) -> int:
    """Writes state.json; bytes of the whole checkpoint."""
    (folder / STATE).write_text(header_text({**header, "files": checks}))
    sync(folder / STATE)
    return sum(check["bytes"] for check in checks.values()) + (folder / STATE).stat().st_size


def _write_checkpoint(snapshot: Snapshot, store: CheckpointStore, name: str, header: dict[str, Any]) -> int:
    """Bytes written. Where that fails, what other ranks send is still received, so that they are not left waiting."""
    arriving = snapshot.arriving()
    try:
        model, optimizer = snapshot.layouts()
        folder = store.staging(name)
        content = _content(snapshot, model, arriving)
        checks = write_files(folder, {MODEL: model, OPTIMIZER: optimizer}, content)
        written = write_header(folder, header, checks)
        store.commit(name)
    except BaseException as error:
        store.discard(name)
        if isinstance(error, Exception):
            for _ in arriving:
                pass
        raise
    return written


def _content(
    snapshot: Snapshot, model: Layout, arriving: Iterator[Tensor]
) -> Iterator[tuple[str, str, Iterator[Tensor]]]:
    for name in file_order(model):
        outside = snapshot.outside(name)
        yield MODEL, name, snapshot.elements(name, arriving) if outside is None else iter((outside,))
    for kind in snapshot.kinds[1:]:
        for name in snapshot.trainable:
            yield OPTIMIZER, f"{kind}/{name}", snapshot.elements(name, arriving)


def _header(engine: Engine, state: dict[str, Any]) -> dict[str, Any]:
    """Of state.json. `written` is for people: nothing that reads a checkpoint depends on it."""
    options = engine.options
    written = {
        "onetrain": version("onetrain"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": engine.ranks.world_size,
        "zero_stage": engine.zero_stage,
        "expert_parallel": options.expert_parallel,
        "tensor_parallel": options.tensor_parallel,
        "context_parallel": options.context_parallel,
        "precision": options.precision,
    }
    return {
        "format": FORMAT,
        "step": engine.step,
        "optimizer": engine.optimizer_options.name,
        "written": written,
        "state": json.loads(json.dumps(state)),  # as it is now: a thread writes it later
    }
