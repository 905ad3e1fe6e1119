"""`onetrain report`: one HTML file about a run, made from the files in its folder, finished or not."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from onetrain.cluster.atomic import write_atomically
from onetrain.cluster.event_log import EVENTS, LEDGER, SKIPPED, read_log
from onetrain.launcher import report_curves as curves
from onetrain.launcher import report_time as times
from onetrain.launcher.goodput import Goodput, goodput
from onetrain.launcher.report_page import Section, page
from onetrain.launcher.run_records import (
    METRICS,
    event_text,
    part,
    read_config,
    read_json,
    seconds_text,
)
from onetrain.launcher.status import RunStatus, StatusReader

Record = Mapping[str, Any]
MOST_TEXT = 200_000  # characters of a hang report
MOST_SKIPS = 200
MOST_IDS = 8  # of a skipped batch


@dataclass(frozen=True)
class RunData:
    """All records of a run's folder."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    train: list[Record]
    valid: list[Record]
    tables: list[Record]
    events: list[Record]
    ledger: list[Record]
    skipped: list[Record]
    best: dict[str, Any]


def write_report(folder: Path, output: Path | None = None, now: float | None = None) -> Path:
    """Write the report, atomically, and return its place: report.html in the run's folder unless told.

    A run that is still going is reported up to the Unix time `now`.
    """
    output = folder / "report.html" if output is None else output
    html = report_html(folder, time.time() if now is None else now)
    write_atomically(output, html)
    return output


def read_run(folder: Path) -> RunData:
    """Everything there is; what is absent is empty."""
    records = [record for record in read_log(folder / METRICS) if isinstance(record.get("step"), int)]
    kinds: dict[str, list[Record]] = {"train": [], "valid": [], "table": []}
    for record in records:
        kinds.setdefault(str(record.get("kind")), []).append(record)
    return RunData(
        folder,
        read_config(folder),
        read_json(folder / "environment.json"),
        _one_a_step(kinds["train"]),
        _one_a_step(kinds["valid"]),
        kinds["table"],
        list(read_log(folder / EVENTS)),
        list(read_log(folder / LEDGER)),
        list(read_log(folder / SKIPPED)),
        read_json(folder / "best.json"),
    )


def _one_a_step(records: Sequence[Record]) -> list[Record]:
    """In order of steps, the last record of each: an attempt that makes steps again has logged them again."""
    newest = {record["step"]: record for record in records}
    return [newest[step] for step in sorted(newest)]


def report_html(folder: Path, now: float) -> str:
    """The report as one document."""
    run, status = read_run(folder), StatusReader(folder).read(now)
    found = goodput(run.events, run.ledger, now if status.alive else None, status.phase)
    worlds = {record["attempt"]: record["world_size"] for record in run.ledger if record.get("world_size")}
    worlds[None] = run.environment.get("world_size")
    resumed = [(r["attempt"], r["step"]) for r in run.ledger if r.get("kind") == "start" and r.get("step")]
    precision = part(run.config, "parallel", "precision", "fp32")
    sections = [
        curves.loss_section(run.train, run.valid, resumed),
        curves.accuracy_section(run.train, run.valid),
        *_tables(run.tables),
        times.time_section(found, run.events),
        times.restarts_section(found),
        curves.speed_section(run.train, worlds, run.environment.get("device") or {}, precision),
        curves.data_section(run.train),
        curves.experts_section(run.train),
        curves.optimizer_section(run.train),
        times.checkpoints_section(run.ledger),
        _skips(run.skipped),
        _hangs(folder),
        _log(run.events),
        _setting(run),
    ]
    host = run.environment.get("host")
    subtitle = f"{status.headline}. {folder}" + (f", on {host}" if host else "")
    return page(status.run, subtitle, _tiles(run, status, found), sections)


def _tiles(run: RunData, status: RunStatus, found: Goodput) -> list[tuple[str, str]]:
    step = "-" if status.step is None else f"{status.step:,}"
    tiles = [("step" if status.steps is None else f"step of {status.steps:,}", step)]
    if run.train and run.train[-1].get("loss") is not None:
        tiles.append(("training loss", f"{run.train[-1]['loss']:.4f}"))
    if isinstance(run.best.get("value"), int | float):
        tiles.append((f"best {run.best.get('metric')}, step {run.best.get('step'):,}", f"{run.best['value']:.4f}"))
    if rates := [rate for record in run.train if (rate := record.get("samples_per_s")) is not None]:
        tiles.append(("samples/s (median)", f"{median(rates):,.0f}"))
    if found.ettr is not None:
        tiles += [("wall time", seconds_text(found.wall_s)), ("effective training time", f"{found.ettr:.1%}")]
        tiles.append(("restarts", str(len(found.restarts))))
    if run.skipped:
        tiles.append(("batches left out", str(len(run.skipped))))
    return tiles


def _tables(tables: Sequence[Record]) -> list[Section]:
    """The newest table of each name."""
    newest = {str(record.get("name")): record for record in tables}
    sections = []
    for name, record in newest.items():
        section = Section(name.replace("_", " ").capitalize())
        section.note(f"Of the model after step {record['step']:,}.")
        section.table([str(column) for column in record.get("columns", [])], record.get("rows", []))
        sections.append(section)
    return sections


def _skips(skipped: Sequence[Record]) -> Section:
    section = Section("Batches left out")
    if not skipped:
        section.note("None.")
        return section
    rows = []
    for record in skipped[-MOST_SKIPS:]:
        samples = record.get("samples") or {}
        named = "; ".join(f"{source}: {_ids(ids)}" for source, ids in samples.items())
        fields = [record.get(name) for name in ("attempt", "step", "position", "action", "reason", "value")]
        rows.append([*(value.replace("_", " ") if isinstance(value, str) else value for value in fields), named])
    section.table(["attempt", "step", "position", "action", "reason", "value", "samples"], rows)
    if len(skipped) > MOST_SKIPS:
        section.note(f"The last {MOST_SKIPS} of {len(skipped)}; skipped.jsonl has all.")
    return section


def _ids(ids: Sequence[Any]) -> str:
    shown = ", ".join(map(str, ids[:MOST_IDS]))
    return shown if len(ids) <= MOST_IDS else f"{shown} and {len(ids) - MOST_IDS:,} more"


def _hangs(folder: Path) -> Section:
    section = Section("Hangs")
    found = sorted(folder.glob("hang_*.txt"), key=lambda path: path.stat().st_mtime)
    if not found:
        section.note("No rank has hung.")
    for path in found:
        text = path.read_text(encoding="utf-8", errors="replace")
        cut = "" if len(text) <= MOST_TEXT else f"\n[cut off; {path} has all of it]"
        section.folded(path.name, text[:MOST_TEXT] + cut)
    return section


def _log(events: Sequence[Record]) -> Section:
    section = Section("Log")
    if not events:
        section.note("The run had no supervisor (torchrun, debug, or an older version), so there is no log of it.")
        return section
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(float(event['time'])))}  {event_text(dict(event))}"
        for event in events
    ]
    section.folded(f"{len(lines)} events of the supervisor", "\n".join(lines))
    return section


def _setting(run: RunData) -> Section:
    section = Section("Configuration and versions")
    environment = run.environment
    if environment:
        device, git = environment.get("device") or {}, environment.get("git") or {}
        names = device.get("names") or []
        commit = f"{git.get('commit')}{' with changes' if git.get('dirty') else ''}" if git else None
        packages = environment.get("packages") or {}
        rows: list[list[Any]] = [
            [
                "device",
                f"{', '.join(sorted(set(map(str, names))))} ({device.get('type')}), {len(names)} on the node of rank 0",
            ],
            ["ranks", str(environment.get("world_size", "-"))],
            ["host", f"{environment.get('host')}, {environment.get('cpus')} CPUs, {environment.get('platform', '')}"],
            ["onetrain", f"{packages.get('onetrain')}, commit {commit}" if commit else str(packages.get("onetrain"))],
            ["Python", str(environment.get("python"))],
            ["libraries", ", ".join(f"{name} {version}" for name, version in packages.items() if name != "onetrain")],
            ["command", " ".join(map(str, environment.get("command") or []))],
        ]
        section.table(["", "value"], rows)
    else:
        section.note("The run has no environment.json.")
    if run.config:
        section.folded("config.yaml, resolved", yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    else:
        section.note("The run has no config.yaml that can be read.")
    return section
