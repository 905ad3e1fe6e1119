"""The same DataLoader over Parquet with all ids of a user in one binary column: nothing is left to decode."""

from collections.abc import Iterator
from pathlib import Path

from . import parquet
from .histories import Block
from .tables import write_parquet

RESUME = parquet.RESUME
SETTINGS = parquet.SETTINGS | {"layout": "packed", "use_dictionary": False}
VARIANTS = [
    {"workers": 0},
    {"workers": 1},
    {"prefetch_factor": 16},
    {"compression": "lz4"},
    {"groups_per_buffer": 2},
    {"groups_per_buffer": 8},
]


def write(folder: Path, blocks: Iterator[Block]) -> None:
    """One binary column; one row group a block of users."""
    write_parquet(folder, blocks, **{name: SETTINGS[name] for name in ("layout", "compression", "use_dictionary")})


class Loader(parquet.Loader):
    """Batches of one epoch, from the state on if there is one."""

    settings = SETTINGS
