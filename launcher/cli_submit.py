"""The verb `submit`: send a job to a Ray cluster and follow it, or write a KubeRay manifest."""

import getpass
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from onetrain.launcher import submission
from onetrain.launcher.cli_arguments import ConfigArgument, SetOption
from onetrain.launcher.config import config_text, load_config, run_folder
from onetrain.launcher.console import print_message, print_result, print_table
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig

HEAD_LINES = 20  # of the configuration, in a dry run
STOPPED = 130


def submit(
    config: ConfigArgument,
    overrides: SetOption = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="URL",
            help="Ray's dashboard, such as http://head:8265; RAY_API_SERVER_ADDRESS unless told.",
            show_default=False,
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log until it ends.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be sent; contact nothing.")] = False,
    attach: Annotated[
        bool, typer.Option("--attach", help="Follow the job of this run that is running; start none.")
    ] = False,
    installed: Annotated[
        bool, typer.Option("--installed", help="Send no source: the cluster has the same onetrain, which is checked.")
    ] = False,
    variables: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="Environment variable of the job, its value from here unless told. May be repeated.",
            show_default=False,
        ),
    ] = None,
    kuberay: Annotated[
        str | None,
        typer.Option(
            "--kuberay",
            metavar="FILE",
            help="Write a RayJob manifest for Kubernetes here (- for standard output) instead of submitting.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Send a training job to a Ray cluster, from any machine and folder, and follow it until it ends.

    Uploads the resolved configuration and this installation's source (no data, no .git), has the versions of the
    cluster compared with those here, and ends with the job's exit code. Ctrl-C asks whether to stop the job, which
    otherwise goes on. Paths of the configuration are those of the cluster's nodes: absolute, or URLs.
    """
    options = load_config(config, overrides or (), elsewhere=True)
    if kuberay is not None:
        _write_manifest(options, kuberay)
        return
    from onetrain.cluster import jobs

    where = jobs.jobs_address(address)
    own = {jobs.STOP_WAIT_VARIABLE: str(jobs.STOP_WAIT_S)}
    environment = submission.job_environment(variables or (), own)
    with tempfile.TemporaryDirectory(prefix="onetrain-submit-") as folder:
        files = submission.stage(config_text(options), Path(folder), installed)
        if dry_run:
            _print_dry_run(options, where, environment, files)
            return
        client = jobs.connect(where)
        running = jobs.running_job(client, options.name)
        if attach and running is None:
            raise ConfigError(f"no job of run {options.name} is running at {where}; leave --attach out to start one")
        if running is not None and not attach:
            raise ConfigError(
                f"job {running.submission_id} of run {options.name} is {running.status.value.lower()} at {where}; "
                "follow it with --attach, stop it, or give the new run another name (--set name=...)"
            )
        if running is not None:
            job = str(running.submission_id)
        else:
            print_message(f"uploading {len(files)} files, {sum(files.values()) / 2**20:.2f} MiB, to {where}")
            job = jobs.submit(
                client,
                submission.ENTRYPOINT,
                {"working_dir": folder, "env_vars": environment},
                options.name,
                submission.job_id(options.name, time.strftime("%Y%m%d-%H%M%S")),
                onetrain_folder=str(run_folder(options)),
                onetrain_user=getpass.getuser(),
            )
    print_message(f"job {job}; run folder on the cluster: {run_folder(options)}")
    how = (
        f"follow it: onetrain submit {config} {_again(overrides)}--address {where} --attach\n"
        f"stop it:   {'RAY_AUTH_MODE=token ' if jobs.token() else ''}ray job stop --address {where} {job}"
    )
    if not wait:
        print_message(how)
        return
    _follow(client, job, how)


def _follow(client: Any, job: str, how: str) -> None:
    """Print the job's log until it ends, and leave with its exit code."""
    from onetrain.cluster import jobs

    try:
        ended = jobs.follow(client, job, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        try:
            if not _wants_to_stop(job):
                print_message(f"job {job} goes on\n{how}")
                raise typer.Exit(STOPPED) from None
            print_message(f"stopping job {job}, for which it has {jobs.STOP_WAIT_S} s")
            ended = jobs.stop(client, job)
        except KeyboardInterrupt:
            print_message(f"left; job {job} may go on\n{how}")
            raise typer.Exit(STOPPED) from None
        print_message(f"job {job}: {ended.status.value.lower()}")
        raise typer.Exit(STOPPED) from None
    code = jobs.exit_code(ended)
    told = "" if code == 0 or ended.driver_exit_code == code else f": {(ended.message or '').strip().splitlines()[0]}"
    print_message(f"job {job}: {ended.status.value.lower()}{told}")
    raise typer.Exit(code)


def _wants_to_stop(job: str) -> bool:
    if not sys.stdin.isatty():
        return False
    try:
        return input(f"\nstop job {job}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _again(overrides: list[str] | None) -> str:
    return "".join(f"--set '{override}' " for override in overrides or ())


def _print_dry_run(options: RunConfig, where: str, environment: dict[str, str], files: dict[str, int]) -> None:
    runtime_env = {"working_dir": "the files below", "env_vars": submission.masked(environment)}
    print_result(f"address:     {where}\nentrypoint:  {submission.ENTRYPOINT}")
    print_result(f"runtime_env: {json.dumps(runtime_env, indent=2)}")
    title = f"{len(files)} files, {sum(files.values()) / 2**20:.2f} MiB"
    print_table(title, ["file", "bytes"], [[name, size] for name, size in files.items()])
    lines = config_text(options).splitlines()
    print_result("\n".join([f"{submission.CONFIG}, {len(lines)} lines:", *lines[:HEAD_LINES], "..."]))


def _write_manifest(options: RunConfig, file: str) -> None:
    from onetrain.cluster.kuberay import Job, dump, render
    from onetrain.launcher.environment import package_version

    service = options.stream.service
    paths: dict[str, str | None] = {"storage_path": options.storage_path, "data.prepared": options.data.prepared}
    paths |= {f"stream.mixture.{name}.prepared": part.prepared for name, part in options.stream.mixture.items()}
    paths["train.warm_start"] = options.train.warm_start
    job = Job(
        name=options.name,
        config=config_text(options),
        submission=json.dumps(submission.submission(submission.IMAGE_MUST_MATCH)),
        ray_version=str(package_version("ray")),
        paths={key: path for key, path in paths.items() if path},
        builder_cpus=math.ceil(service.cpus_per_actor * (service.max_actors or service.actors)),
    )
    try:
        text = dump(render(job, options.cluster, options.recovery, options.kubernetes))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if file == "-":
        print(text, end="")
        return
    Path(file).write_text(text, encoding="utf-8")
    print_message(f"saved: {file}; start it with: kubectl create -f {file}")
