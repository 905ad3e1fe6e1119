"""The verbs that watch a run from outside: status and report. Both read files only."""

from pathlib import Path
from typing import Annotated

import typer

from onetrain.launcher.cli_arguments import RunArgument, SetOption


def status(
    run: RunArgument,
    overrides: SetOption = None,
    once: Annotated[bool, typer.Option("--once", help="Print one look and exit.")] = False,
    json_out: Annotated[bool, typer.Option("--json", help="Print one look as JSON and exit.")] = False,
) -> None:
    """Show how a run is doing: state, step, speed, time left, the last checkpoint, restarts, and every rank.

    Reads the run's folder only, so it works from any machine that sees it, and needs no Ray. On a terminal the table is
    renewed every 2 s until Ctrl-C or the end of the run.
    """
    from onetrain.launcher.run_records import find_run
    from onetrain.launcher.status import StatusReader
    from onetrain.launcher.status_table import show

    reader = StatusReader(find_run(run, overrides or ()))
    if json_out:
        import json

        typer.echo(json.dumps(reader.read().as_json(), indent=1))
        return
    show(reader, live=not once)


def report(
    run: RunArgument,
    overrides: SetOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Where to; report.html in the run's folder unless told."),
    ] = None,
) -> None:
    """Write one HTML file about a run: curves, experts, speed, where the time went, restarts, hangs, configuration.

    It needs neither a server nor a network, and may be made while the run goes on.
    """
    from onetrain.launcher.console import print_message
    from onetrain.launcher.report import write_report
    from onetrain.launcher.run_records import find_run

    print_message(f"saved: {write_report(find_run(run, overrides or ()), output)}")
