"""`onetrain checkpoint`: list, verify, show and convert checkpoints."""

from typing import Annotated, Literal

import typer

from onetrain.launcher.cli_arguments import RunArgument
from onetrain.launcher.console import print_message, print_table

DAMAGED = 4  # the exit code of parallelism, checkpoints included

app = typer.Typer(
    name="checkpoint",
    help="List, verify, show and convert checkpoints. Places may be folders or URLs (s3://bucket/run).",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
CheckpointArgument = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="The folder or URL of one checkpoint.", show_default=False)
]


@app.command("list", epilog="Example: `onetrain checkpoint list runs/demo`")
def list_(run: RunArgument) -> None:
    """A run's checkpoints: step, size, age, which is the best, and whether every file has its size."""
    from onetrain.launcher.checkpoint_tools import list_rows, open_run

    store, best = open_run(run)
    columns = ["checkpoint", "step", "size", "age", "best", "intact"]
    notes = ["intact: by the sizes of the files; `onetrain checkpoint verify` reads them"]
    print_table(store.where("").rstrip("/"), columns, list_rows(store, best), notes)


@app.command(epilog="Example: `onetrain checkpoint verify runs/demo`")
def verify(
    place: Annotated[
        str,
        typer.Argument(metavar="CHECKPOINT|RUN", help="One checkpoint, or a run with all of its.", show_default=False),
    ],
) -> None:
    """Hold every file against its size and checksum. Ends with exit code 4 if one is damaged."""
    from onetrain.launcher.checkpoint_tools import verify_rows

    rows, whole = verify_rows(place)
    print_table("checksums", ["checkpoint", "state"], rows)
    if not whole:
        raise typer.Exit(DAMAGED)


@app.command(epilog="Example: `onetrain checkpoint show runs/demo/checkpoints/step_00000400 --tensors`")
def show(
    checkpoint: CheckpointArgument,
    tensors: Annotated[bool, typer.Option("--tensors", help="Also every tensor, with its norms.")] = False,
) -> None:
    """What a checkpoint holds: its state, where its configuration is not the default, and its tensors."""
    from onetrain.launcher.checkpoint_tools import config_rows, fetch_checkpoint, state_rows, tensor_rows

    folder, header = fetch_checkpoint(checkpoint)
    print_table(checkpoint, ["state", "value"], state_rows(header))
    print_table("configuration", ["key", "value", "default"], config_rows(header))
    if tensors:
        columns, rows = tensor_rows(folder, header)
        print_table("tensors", columns, rows)


@app.command(
    epilog="Example: `onetrain checkpoint convert runs/demo/checkpoints/step_00000400 s3://bucket/demo --weights-only`"
)
def convert(
    source: CheckpointArgument,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="The new one's folder or URL.", show_default=False)],
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave the optimizer's state out.")] = False,
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option("--dtype", help="Of the weights; bf16 goes with --weights-only.")
    ] = "fp32",
) -> None:
    """Copy a checkpoint elsewhere, after verifying it: between folders and URLs, whole or its weights alone."""
    from onetrain.launcher.checkpoint_tools import convert as run
    from onetrain.launcher.checkpoint_tools import format_bytes

    size = run(source, target, weights_only, dtype)
    print_message(f"saved: {target} ({format_bytes(size)})")
