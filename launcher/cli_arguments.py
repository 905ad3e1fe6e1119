"""Arguments that several verbs of the command line have in common."""

import json
from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The job's YAML file.", show_default=False)]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one key of the file, the value in YAML, e.g. `train.steps=100`. May be repeated.",
        show_default=False,
    ),
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to join; short for `--set cluster.address=...`.", show_default=False),
]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="The run's folder, or the YAML file of its job.",
        show_default=False,
    ),
]


def cluster_overrides(workers: int | None, address: str | None) -> list[str]:
    """--workers and --address as overrides of the configuration."""
    given = {"cluster.workers": workers, "cluster.address": address}
    return [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
