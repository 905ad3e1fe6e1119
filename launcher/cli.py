"""The `onetrain` command. Every verb reads one YAML file; the work is imported when a verb runs, so that help is quick.

Under torchrun: `torchrun --nproc-per-node 2 -m onetrain.launcher.cli train CONFIG`.

Exit codes: 0 done, 2 configuration or command line, 3 data, 4 parallelism, 5 cluster, 6 no disk space, 130 Ctrl-C.
Anything else is a bug and keeps its traceback (exit code 1).
"""

import errno
import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from onetrain.launcher import cli_checkpoint, cli_run, cli_watch
from onetrain.launcher.cli_arguments import AddressOption, ConfigArgument, SetOption, cluster_overrides
from onetrain.launcher.cli_submit import submit
from onetrain.launcher.config import load_config, run_folder
from onetrain.launcher.console import print_error, print_message, print_result, print_table, print_warning, progress
from onetrain.launcher.environment import package_version
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.report_tables import appended_rows, codebook_rows, preparation_rows

NO_SPACE = 6
STOPPED = 130


class _Verbs(TyperGroup):
    """Ends a verb that failed for a reason the user can mend with one message and that reason's exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_message("stopped by Ctrl-C")
            raise typer.Exit(STOPPED) from None
        except Exception as error:
            reason = getattr(error, "cause", None) or error  # Ray carries a worker's exception as the cause of its own
            if isinstance(reason, OSError) and reason.errno in (errno.ENOSPC, errno.EDQUOT):
                where = f" for {reason.filename}" if reason.filename else ""
                print_error(f"no disk space left{where}; free some, or move data.prepared or storage_path")
                raise typer.Exit(NO_SPACE) from error
            if not type(reason).__module__.startswith("onetrain.") or not hasattr(reason, "exit_code"):
                raise
            print_error(str(reason))
            raise typer.Exit(reason.exit_code) from error


app = typer.Typer(
    name="onetrain",
    cls=_Verbs,
    help="Train generative recommenders of the OneRec family, from raw behaviour logs to an evaluated model.\n\n"
    "The usual order: plan, doctor, prepare, tokenize, debug, train, evaluate, all with the same YAML file. "
    "`onetrain VERB --help` shows an example of each.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onetrain {package_version('onetrain')}")
        raise typer.Exit()


@app.callback()
def _onetrain(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: `onetrain prepare configs/demo.yaml`")
def prepare(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Read raw logs into shards, an item table and a manifest, in the folder data.prepared.

    Reads the sections data.source and data.split. Prints what the logs held and what was dropped, by which rule.
    An interrupted run leaves nothing behind, and an earlier folder is replaced only after success.
    """
    options = load_config(config, overrides or ()).data
    from onetrain.data.prepare import prepare as run

    with progress() as report:
        manifest = run(options, report)
    print_table(f"prepared {options.prepared}", ["", "value"], preparation_rows(manifest))


@app.command(epilog="Example: `onetrain append configs/demo.yaml --events logs/2026-11-22.parquet`")
def append(
    config: ConfigArgument,
    overrides: SetOption = None,
    events: Annotated[
        str | None,
        typer.Option(
            "--events",
            metavar="FILE",
            help="The new logs (file, folder or glob); short for `--set data.source.events=...`.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Add new logs to a prepared folder as its next version, which a run that is going on picks up.

    Every new event trains in exactly one version: events that the folder has already are left out and counted, so that
    the same log may be given again, and so are events of items that the folder lacks. An interrupted append leaves
    nothing behind.
    """
    given = [] if events is None else [f"data.source.events={json.dumps(events)}"]
    options = load_config(config, [*(overrides or ()), *given]).data
    from onetrain.data.append import append as run

    with progress() as report:
        appended = run(options, report)
    if appended.version is None:
        print_message(f"nothing new for {options.prepared}: no version was made")
    title = "the logs" if appended.version is None else f"version {appended.version} of {options.prepared}"
    print_table(title, ["", "value"], appended_rows(appended))


@app.command(epilog="Example: `onetrain tokenize configs/demo.yaml --set tokenizer.iterations=100`")
def tokenize(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Give every prepared item its semantic ID (SID) by residual K-means over item embeddings.

    Reads the section tokenizer, writes the codebooks and the item-to-SID map into data.prepared/sids, and prints the
    codebook report: utilisation, entropy and collision rates of every level.
    """
    options = load_config(config, overrides or ())
    from onetrain.launcher.tokenize import tokenize as run

    with progress() as report:
        codebooks = run(options, report)
    title = f"codebooks of {options.data.prepared} (collisions: {codebooks.collisions})"
    columns = ["", "before the collision rule", "after"]
    print_table(title, columns, codebook_rows(codebooks), ["entropy in nats"])


@app.command(epilog="Example: `onetrain train configs/demo.yaml --workers 2`")
def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Ranks to start; short for `--set cluster.workers=N`.", show_default=False),
    ] = None,
    address: AddressOption = None,
) -> None:
    """Train on a Ray worker group under supervision; starts a local Ray unless an address is given.

    What fails is tried again, as the section recovery says. On a given cluster the run goes on when this command dies,
    and the same command finds it again; Ctrl-C stops it.

    The run writes into storage_path/name and goes on from its newest checkpoint, if there is one. Where RANK and
    WORLD_SIZE are set, as torchrun does, this process is one rank and Ray is not used:
    `torchrun --nproc-per-node 2 -m onetrain.launcher.cli train CONFIG`.
    """
    distributed = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if distributed and (workers is not None or address is not None):
        raise ConfigError("--workers and --address start a Ray worker group, but RANK and WORLD_SIZE are already set")
    options = load_config(config, [*(overrides or ()), *cluster_overrides(workers, address)])
    from onetrain.parallel.deepspeed_config import check_options

    world_size = int(os.environ["WORLD_SIZE"]) if distributed else options.cluster.workers
    mesh = check_options(options.parallel, world_size, options.model)  # before Ray, or any collective
    if world_size > 1 and os.environ.get("RANK", "0") == "0":
        print_message(mesh.picture())
    if distributed:
        from onetrain.launcher.train import train as run

        result = run(options)
        if os.environ["RANK"] != "0":
            return
    else:
        from onetrain.launcher.supervised import run_supervised

        result = run_supervised(options)
    rows = [[name, value] for name, value in result.items() if name.count("/") < 2]  # not those of single layers
    print_table(f"trained {options.name}", ["", "value"], rows)
    print_message(f"run folder: {run_folder(options)}")


@app.command(epilog="Example: `onetrain debug configs/demo.yaml --overfit 100`")
def debug(
    config: ConfigArgument,
    overrides: SetOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps to run (20 unless told).", show_default=False)
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(
            "--overfit",
            min=1,
            metavar="STEPS",
            help="Train on one batch for so many steps; its loss should fall towards 0.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a few steps inside this process, on CPU or one GPU: breakpoints work, nothing is started.

    Checks that every parameter receives a finite gradient.
    """
    if steps is not None and overfit is not None:
        raise ConfigError("--steps and --overfit both say how many steps to run; give one of them")
    options = load_config(config, overrides or ())
    from onetrain.launcher.debug import debug as run

    run(options, steps=overfit or steps or 20, overfit=overfit is not None)


@app.command(epilog="Example: `onetrain evaluate configs/demo.yaml --checkpoint best --split test`")
def evaluate(
    config: ConfigArgument,
    overrides: SetOption = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="`best`, `latest`, or the folder of a checkpoint.")
    ] = "best",
    split: Annotated[Literal["valid", "test"], typer.Option("--split", help="Which events to predict.")] = "test",
) -> None:
    """Rank items for every user of a split, and print Recall, NDCG, HR and MRR beside the floors.

    The floors are popularity and the last item's transitions. The table is kept in the run folder, as
    evaluation_test.json or evaluation_valid.json.
    """
    options = load_config(config, overrides or ())
    from onetrain.launcher.evaluate import evaluate as run

    with progress() as report:
        table = run(options, checkpoint, split, report)
    print_table(table.title, table.columns, table.rows, table.notes)
    print_message(f"saved: {table.save(options)}")


@app.command(epilog="Example: `onetrain plan configs/paper/onerec_v2.yaml --set model.preset=onerec_v2_8b`")
def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write every figure here.", show_default=False)
    ] = None,
) -> None:
    """Count what a job would cost: parameters, FLOPs, activations, memory of a rank, batches, and what does not fit.

    Builds nothing and needs neither a GPU nor prepared data: data.prepared may be absent, and plan.sizes then says how
    large the features are.
    """
    options = load_config(config, overrides or (), needs_data=False)
    from onetrain.launcher.plan import make_plan
    from onetrain.launcher.plan_tables import plan_tables

    made = make_plan(options)
    if made.mesh is not None and made.mesh.world_size > 1:
        print_result(made.mesh.picture())
    for title, columns, rows, notes in plan_tables(made):
        print_table(title, columns, rows, notes)
    for problem in made.problems:
        print_warning(problem)
    for suggestion in made.suggestions:
        print_message(f"this would fit: {suggestion}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(made.as_dict(), indent=2) + "\n", encoding="utf-8")
        print_message(f"saved: {json_file}")


@app.command(epilog="Example: `onetrain doctor configs/demo.yaml`")
def doctor(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="Also check what this job needs.", show_default=False)
    ] = None,
    overrides: SetOption = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Neither start Ray, nor import DeepSpeed, nor read whole shards.")
    ] = False,
) -> None:
    """Check versions, devices, Ray, shared memory and disk: what would fail, before it fails.

    Ends with exit code 1 if a check failed.
    """
    if config is None and overrides:
        raise ConfigError("--set changes a configuration; name its file too")
    options = None if config is None else load_config(config, overrides or ())
    from onetrain.launcher.doctor import checks

    results = checks(options, quick)
    rows = [[check.name, check.state, check.detail] for check in results]
    print_table("doctor", ["check", "state", "detail"], rows, [f"{c.name}: {c.fix}" for c in results if c.fix])
    if any(check.state == "fail" for check in results):
        raise typer.Exit(1)


app.command(epilog="Example: `onetrain stop configs/demo.yaml --address auto`")(cli_run.stop)
app.command(epilog="Example: `onetrain status configs/demo.yaml`")(cli_watch.status)
app.command(epilog="Example: `onetrain report runs/demo --output demo.html`")(cli_watch.report)
app.add_typer(cli_checkpoint.app)
app.command(epilog="Example: `onetrain submit configs/demo.yaml --address http://head:8265`")(submit)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
