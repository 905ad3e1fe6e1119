"""Readers of the simulated shop and of simulated lifelong users: each writes its logs into the folder `source.events`
once, then reads them.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import duckdb

from onetrain.data.errors import DataError
from onetrain.data.options import LifelongOptions, SimulatorOptions, SourceOptions
from onetrain.data.readers import columns
from onetrain.data.readers.source import Source
from onetrain.data.store import local_folder

OPTIONS_FILE = "simulator.json"  # written last: what the logs of this folder were made from
VERSION = 2  # of the shop. 2: users.parquet, and the items' maker; logs of earlier versions are written again
LIFELONG_VERSION = 1


def read(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """Write the shop's logs unless they are there, and open them.

    Raises DataError when the folder holds something else, or logs of other simulator options.
    """
    from onetrain.data.simulate import write_logs

    wanted = options.simulator
    return _read(con, options, wanted, VERSION, lambda folder: write_logs(wanted, folder))


def read_lifelong(con: duckdb.DuckDBPyConnection, options: SourceOptions) -> Source:
    """The same for lifelong users."""
    from onetrain.data.simulate_lifelong import write_logs

    wanted = options.lifelong
    return _read(con, options, wanted, LIFELONG_VERSION, lambda folder: write_logs(wanted, folder))


def _read(
    con: duckdb.DuckDBPyConnection,
    options: SourceOptions,
    simulator: SimulatorOptions | LifelongOptions,
    version: int,
    write_logs: Callable[[str], None],
) -> Source:
    if not options.events:
        raise DataError("data.source.events is empty. Set it to the folder that the simulator writes its logs into.")
    folder = local_folder(options.events)
    wanted = dataclasses.asdict(simulator)
    marker = folder / OPTIONS_FILE
    written = 0
    if marker.is_file():
        found = json.loads(marker.read_text(encoding="utf-8"))
        written = found.pop("version", 1)
        if found != wanted:
            raise DataError(
                f"{folder} holds logs of other simulator options ({found}; wanted {wanted}). Remove the folder or "
                "name another in data.source.events."
            )
    if written != version:
        _prepare(folder)
        write_logs(str(folder))
        text = json.dumps({**wanted, "version": version}, indent=2) + "\n"
        marker.write_text(text, encoding="utf-8")
    return columns.read(
        con,
        dataclasses.replace(
            options,
            events=str(folder / "events-*.parquet"),
            items=str(folder / "items.parquet"),
            users=str(folder / "users.parquet"),
            columns={},
            item_columns={},
            user_columns={},
            timestamp_unit="ms",
        ),
    )


def _prepare(folder: Path) -> None:
    """Raises DataError unless the folder holds nothing but what an interrupted simulation, or one of an earlier
    version, may have left.
    """
    own = ("events-", "items.parquet", "users.parquet", "oracle.parquet", "truth.parquet", OPTIONS_FILE)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.source.events: {folder} is a file; the simulator needs a folder.")
    foreign = [path.name for path in folder.iterdir() if not path.name.startswith(own)] if folder.exists() else []
    if foreign:
        raise DataError(f"{folder} is not empty ({foreign[0]}). Name a new folder for the simulated logs.")
