"""What a reader hands to preparation: log, item file and user file as DuckDB queries with canonical columns."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Source:
    """One raw log, opened and checked for its columns, not yet read.

    `events` delivers user, item, timestamp, what the log has of behaviour, scenario, watch_ms, duration_ms, order and
    x_<extra>, and `file`; preparation casts them. `items` delivers id, and what the item file has of text, categories
    (VARCHAR[]) and embedding (FLOAT[]), and f_<name> (VARCHAR) of every attribute. `users` delivers id and u_<name>.
    """

    events: str
    names: dict[str, str]  # canonical event column -> column of the log, for messages
    timestamp_unit: Literal["s", "ms", "us", "iso"]
    files: tuple[str, ...]
    n_bytes: int  # size of all files
    items: str | None = None
    users: str | None = None
