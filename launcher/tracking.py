"""Where a run's numbers go: metrics.jsonl always, wandb on top. Only rank 0 writes.

metrics.jsonl holds one JSON object a line: `step` (optimizer steps done), `time` (Unix seconds), `attempt`, `kind`
("train", "valid", "table", ...) and the metrics. NaN and infinity, which JSON lacks, are written as null.

A later attempt cuts off what it will write again. wandb cannot take a value back, so it gets a step only once a
checkpoint keeps it and a later step is recorded: both have one value per step, and the same. Where a run goes back
further than what wandb has got (its newest checkpoint was damaged or deleted), the history that is left goes on in a
new wandb run.
"""

import errno
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from onetrain.cluster.atomic import write_atomically
from onetrain.cluster.beacon import BEACON
from onetrain.launcher.console import print_message, print_warning
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig

RESERVED = ("step", "time", "attempt", "kind")
RUN_ID, SENT = "wandb_run_id", "wandb_sent"  # files: the wandb run, and the highest step that it has got
WANDB_TIMEOUT_S = 30  # to reach the server


class Tracker:
    """Records of one run, which survive its restarts.

    A context manager: leaving it by an exception marks the wandb run as failed.

    Args:
        config: the resolved configuration; attached to the wandb run.
        run_dir: the run's folder; metrics.jsonl, wandb/ and wandb_run_id arise in it.
        is_main: whether this is rank 0; on every other rank all methods do nothing.
        start_step: the step of the checkpoint that this process goes on from. Records of later steps, written by an
            attempt that died, are cut off, so that the file keeps one value per step. 0 is a new start: the file is
            emptied. None adds to a run that is over, such as a later evaluation's table.
        attempt: number of this attempt at the run.

    Raises:
        ConfigError: tracking.wandb is online and wandb cannot start.
    """

    def __init__(
        self, config: RunConfig, run_dir: str | Path, is_main: bool, start_step: int | None = 0, attempt: int = 1
    ) -> None:
        self._is_main = is_main
        self._wandb: Any = None
        if not is_main:
            return
        self._folder, self._attempt, self._over = Path(run_dir), attempt, start_step is None
        self._folder.mkdir(parents=True, exist_ok=True)
        self._path = self._folder / "metrics.jsonl"
        kept = [] if start_step is None else cut_records(self._path, start_step)
        self._path.touch()
        self._earlier = {(record["step"], record.get("kind")) for record in kept}
        self._lines: list[str] = []  # records that are not in the file yet
        self._warned = self._closed = False
        self._kept = self._newest = start_step or 0  # up to the first records may be sent; the second is under way
        self._sent = _sent_step(self._folder)
        behind = start_step is not None and self._sent > start_step
        if behind and config.tracking.wandb != "disabled":
            print_message(f"wandb has steps up to {self._sent}: the history up to step {start_step} gets a new run")
        if behind:
            (self._folder / RUN_ID).unlink(missing_ok=True)
            (self._folder / SENT).unlink(missing_ok=True)
            self._sent = 0
        self._wandb = _start_wandb(config, self._folder, new=start_step is not None)
        # Records that wandb has not got: also those of a process that died between a checkpoint and its records.
        self._held = [record for record in kept if record["step"] > self._sent]
        self._send_held()

    def log(self, step: int, metrics: Mapping[str, Any], kind: str = "train") -> None:
        """Record numbers of one step.

        Raises:
            ValueError: a metric is called step, time, attempt or kind.
        """
        if reserved := [name for name in RESERVED if name in metrics]:
            raise ValueError(f"a metric cannot be called {reserved[0]}: every record has a field of that name")
        if self._is_main:
            self._add(step, kind, {name: _number(value) for name, value in metrics.items()})

    def has(self, step: int, kind: str) -> bool:
        """Whether an earlier attempt has recorded this; asked on rank 0."""
        return self._is_main and (step, kind) in self._earlier

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Record a table that belongs to the state after `step` steps."""
        if self._is_main:
            cells = [[_number(value) for value in row] for row in rows]
            self._add(step, "table", {"name": name, "columns": list(columns), "rows": cells})

    def kept(self, step: int) -> None:
        """A checkpoint keeps the run up to `step`: wandb may have what was recorded until there."""
        if not self._is_main:
            return
        self._kept = max(self._kept, step)
        self._send_held()

    def close(self, exit_code: int = 0, whole: bool = True) -> None:
        """End the records; an `exit_code` other than 0 marks the wandb run as failed, 0 says that everything is saved.

        `whole`: no later attempt adds to the newest step. Calling it twice is harmless.
        """
        if not self._is_main or self._closed:
            return
        self._closed = True
        self._write()
        if exit_code == 0:
            self._send_held(everything=whole)
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(0 if error is None else getattr(error, "exit_code", 1))

    def _add(self, step: int, kind: str, fields: dict[str, Any]) -> None:
        record = {"step": step, "time": round(time.time(), 3), "attempt": self._attempt, "kind": kind, **fields}
        line = json.dumps({key: _finite(value) for key, value in record.items()}, ensure_ascii=False, allow_nan=False)
        self._lines.append(line + "\n")
        self._write()
        self._newest = max(self._newest, step)
        self._held.append(record)
        self._send_held(everything=self._over)

    def _write(self) -> None:
        """Appends what is not in the file yet; what a full disk refuses is told once, and waits for the next record."""
        if not self._lines:
            return
        data = "".join(self._lines).encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                if file.write(data) < len(data):
                    file.truncate(before)  # no half of a line
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._warn(self._path, error)
        else:
            self._lines.clear()

    def _warn(self, path: Path, error: OSError) -> None:
        if not self._warned:
            print_warning(f"{path} cannot be written ({error}); training goes on, and records wait until it can")
        self._warned = True

    def _send_held(self, everything: bool = False) -> None:
        """To wandb what a checkpoint keeps, up to the newest step: more may follow of that, also by a later attempt."""
        while self._held and (everything or self._held[0]["step"] <= min(self._kept, self._newest - 1)):
            try:
                self._send(self._held[0])
            except OSError as error:  # a later record tries again
                self._warn(self._folder / SENT, error)
                return
            self._held.pop(0)

    def _send(self, record: dict[str, Any]) -> None:
        """One record to wandb, which takes steps in rising order only, and after a restart only steps it has not."""
        if self._wandb is None:
            return
        if record["kind"] == "table":
            import wandb

            table = wandb.Table(columns=record["columns"], data=record["rows"], allow_mixed_types=True)
            self._wandb.log({record["name"]: table})
            return
        self._remember_sent(max(self._sent, record["step"]))  # first: a crash must not leave wandb ahead of it
        values = {f"{record['kind']}/{name}": value for name, value in record.items() if name not in RESERVED}
        values = {name: value for name, value in values.items() if value is not None}
        self._wandb.log({**values, "attempt": record.get("attempt", 1)}, step=record["step"])

    def _remember_sent(self, step: int) -> None:
        if step == self._sent:
            return
        write_atomically(self._folder / SENT, f"{step}\n")
        self._sent = step


def _sent_step(folder: Path) -> int:
    path = folder / SENT
    return int(path.read_text(encoding="utf-8")) if path.exists() else 0


def cut_records(path: Path, start_step: int) -> list[dict[str, Any]]:
    """Keep the records up to `start_step`, none if it is 0, and return them. The file is replaced atomically."""
    if not path.exists():
        return []
    kept: list[str] = []
    records: list[dict[str, Any]] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                step = record["step"]
            except (ValueError, KeyError, TypeError):  # the process died while it wrote this line
                print_warning(f"{path}, line {number}: dropped an incomplete record")
                continue
            if step <= start_step and start_step > 0:
                kept.append(line)
                records.append(record)
    write_atomically(path, "".join(kept))
    return records


def _number(value: Any) -> Any:
    """numpy and torch scalars as Python numbers."""
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(config: RunConfig, folder: Path, new: bool) -> Any:
    """The wandb run, None when it is disabled."""
    mode = config.tracking.wandb
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")  # errors arrive as exceptions and are told below
    if mode != "auto":
        return _init_wandb(config, folder, new, mode)
    import wandb

    try:
        # WANDB_MODE is how wandb's users say it for a whole machine; a missing account means offline
        wanted = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
        if wanted == "disabled":
            return None
        return _init_wandb(config, folder, new, "online" if wanted == "online" else "offline")
    except (wandb.errors.Error, ConfigError) as error:
        print_warning(f"wandb cannot go online, so this run is recorded offline. {error}")
        wandb.teardown()  # forgets the failed attempt, which would hold the run id
        return _init_wandb(config, folder, new, "offline")


def _init_wandb(config: RunConfig, folder: Path, new: bool, mode: Literal["online", "offline"]) -> Any:
    import wandb

    options = config.tracking
    try:
        run = wandb.init(
            dir=str(folder),
            id=_run_id(config, folder, new),
            resume="allow",
            name=config.name,
            project=options.project,
            entity=options.entity,
            tags=list(options.tags),
            config=asdict(config),
            allow_val_change=True,  # a resumed run may have, say, more steps
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=WANDB_TIMEOUT_S),
        )
    except wandb.errors.Error as error:
        raise ConfigError(
            f"tracking.wandb: wandb cannot start {mode}: {str(error).rstrip('.')}. "
            "Log in with `wandb login`, or set tracking.wandb to offline or disabled"
        ) from error
    place = run.url if mode == "online" else f"{run.settings.sync_dir} (send it later with `wandb sync`)"
    print_message(f"wandb: {mode}, {place}")
    return run


def _run_id(config: RunConfig, folder: Path, new: bool) -> str:
    """Made once for a run folder; a run that never resumes gets a new one at each start, not at each attempt."""
    path = folder / RUN_ID
    if (config.train.resume == "auto" or not new or not BEACON.first) and path.exists():
        return path.read_text(encoding="utf-8").strip()
    name = uuid.uuid4().hex[:8]
    path.write_text(name + "\n", encoding="utf-8")
    return name
