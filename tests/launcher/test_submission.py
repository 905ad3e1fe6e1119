"""What `onetrain submit` sends and refuses; nothing is contacted and no Ray is started."""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from onetrain.cluster.options import ClusterOptions
from onetrain.launcher import cli, job_entry, submission, supervised
from onetrain.launcher.config import load_config
from onetrain.launcher.environment import PACKAGES
from onetrain.launcher.errors import ConfigError
from onetrain.launcher.options import RunConfig

PROJECT = Path(__file__).parents[2]
JOB = """
name: tiny
storage_path: /shared/runs
data: {prepared: /shared/prepared, source: {events: logs/events.parquet}}
cluster: {workers: 16, gpus_per_worker: 1}
kubernetes: {image: "registry/onetrain:1", storage_claim: shared, storage_mount: /shared}
"""


@pytest.fixture
def job_file(tmp_path, monkeypatch):
    """A configuration beside the current folder, which is not the project's."""
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "NCCL_", "GLOO_", "TORCH_NCCL_", "RAY_")):
            monkeypatch.delenv(name)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    (tmp_path / "job.yaml").write_text(JOB)

    def refuse(*args, **kwargs):
        raise AssertionError("something was contacted")

    monkeypatch.setattr(socket, "create_connection", refuse)
    return tmp_path / "job.yaml"


def submit(*arguments):
    return CliRunner().invoke(cli.app, ["submit", *map(str, arguments)])


def test_all_source_and_nothing_else_is_sent(tmp_path):
    files = submission.stage("name: a\n", tmp_path)
    source = {
        f"onetrain/{file.relative_to(PROJECT).as_posix()}"
        for room in submission.ROOMS
        for file in (PROJECT / room).rglob("*.py")
    }
    version = next(name for name in files if "dist-info" in name)
    assert set(files) == source | {"onetrain/__init__.py", "config.yaml", "submission.json", version}
    assert files == {
        path.relative_to(tmp_path).as_posix(): path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()
    }
    assert all(
        (tmp_path / name).read_bytes() == (PROJECT / name.removeprefix("onetrain/")).read_bytes() for name in source
    )
    assert sum(files.values()) < 4 * 2**20


def test_the_staged_source_wins_over_the_installed_one(tmp_path):
    submission.stage("name: a\n", tmp_path)
    script = """
import json
from onetrain.cluster import options
from onetrain.launcher import environment, submission
version, git = environment.package_version("onetrain"), environment._submitted_git()
print(json.dumps([submission.__file__, options.__file__, submission.source_hash(), version, git]))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    *modules, digest, version, git = json.loads(done.stdout)
    assert [Path(module).is_relative_to(tmp_path) for module in modules] == [True, True]
    facts = submission.facts()
    assert (digest, version, git) == (facts["source"], facts["packages"]["onetrain"], facts["git"])


def test_installed_sends_no_source(tmp_path):
    assert set(submission.stage("name: a\n", tmp_path, installed=True)) == {"config.yaml", "submission.json"}


def test_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(submission, "LARGEST_BYTES", 10_000)
    with pytest.raises(ConfigError, match=r"more than 10,000; the largest files are onetrain/.*--installed"):
        submission.stage("name: a\n", tmp_path)


def test_the_hash_sees_every_change(tmp_path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    files = {"onetrain/a.py": tmp_path / "a.py", "onetrain/b.py": tmp_path / "b.py"}
    first = submission.source_hash(files)
    assert submission.source_hash(dict(files)) == first
    (tmp_path / "b.py").write_text("x = 2\n")
    assert submission.source_hash(files) != first
    (tmp_path / "b.py").write_text("x = 1\n")
    assert submission.source_hash({"onetrain/a.py": tmp_path / "a.py", "onetrain/c.py": tmp_path / "b.py"}) != first


def test_exactly_the_versions_that_matter_are_compared():
    random_, facts = random.Random(3), submission.facts()
    names = [*PACKAGES, "python", "source"]
    for _ in range(100):
        changed = set(random_.sample(names, random_.randint(0, 4)))
        here = json.loads(json.dumps(facts))
        for name in changed & set(PACKAGES):
            here["packages"][name] = random_.choice([None, "0.0.1"])
        if "python" in changed:
            here["python"] = "2.7.18"
        if "source" in changed:
            here["source"] = "0"
        rows = submission.differences({**facts, "must_match": submission.MUST_MATCH}, here)
        assert {row[0] for row in rows} == changed & set(submission.MUST_MATCH)
        assert all(len(row) == 4 and all(row) for row in rows)


def test_another_build_or_micro_version_is_no_difference():
    here = json.loads(json.dumps(submission.facts()))
    here["packages"]["torch"] = here["packages"]["torch"].split("+")[0] + "+cu130"
    here["python"] = ".".join([*here["python"].split(".")[:2], "99"])
    assert submission.differences(submission.submission(), here) == []


def test_the_environment_that_travels(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("WANDB_", "NCCL_", "GLOO_", "TORCH_NCCL_")):
            monkeypatch.delenv(name)
    wanted = {"WANDB_API_KEY": "secret", "WANDB_MODE": "offline", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0"}
    for name, value in {**wanted, "WANDB_DIR": "/home/me", "MY_TOKEN": "t", "OTHER": "o"}.items():
        monkeypatch.setenv(name, value)
    assert submission.job_environment([], {}) == wanted
    given = submission.job_environment(
        ["MY_TOKEN", "NCCL_DEBUG=WARN", "EMPTY=", "EQUALS=a=b"], {"OWN": "1", "EMPTY": "2"}
    )
    assert given == wanted | {"MY_TOKEN": "t", "NCCL_DEBUG": "WARN", "EMPTY": "", "EQUALS": "a=b", "OWN": "1"}
    masked = submission.masked(given)
    assert {name for name in given if masked[name] != given[name]} == {"WANDB_API_KEY", "MY_TOKEN"}


@pytest.mark.parametrize("wrong", ["NOT_SET_ANYWHERE", "9A=1", "=x", "RAY_AUTH_TOKEN=x"])
def test_variables_that_cannot_travel(wrong):
    with pytest.raises(ConfigError, match="--env"):
        submission.job_environment([wrong], {})


def test_a_dry_run_shows_everything_but_secrets_and_contacts_nothing(job_file, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123secret")
    done = submit(
        job_file, "--address", "head:8265", "--dry-run", "--set", "train.steps=7", "--env", "A_PASSWORD=hidden"
    )
    assert done.exit_code == 0, done.output
    assert "http://head:8265" in done.stdout
    assert "onetrain.launcher.job_entry config.yaml" in done.stdout
    assert "storage_path: /shared/runs" in done.stdout
    assert re.search(r"onetrain/launcher/submission.py\W+\d+,\d+", done.stdout)
    assert "WANDB_API_KEY" in done.stdout
    assert "0123secret" not in done.output
    assert "hidden" not in done.output


def test_relative_paths_of_a_run_are_refused_by_name(job_file):
    done = submit(job_file, "--address", "head", "--dry-run", "--set", "storage_path=runs", "--set", "stream.cache=~/c")
    assert done.exit_code == 2
    assert "storage_path: given 'runs', which is relative" in done.output
    assert f"--set storage_path={Path.cwd()}/runs" in done.output
    assert "stream.cache" not in done.output  # absolute by ~
    assert submit(job_file, "--address", "head", "--dry-run", "--set", "data.prepared=s3://b/p").exit_code == 0


def test_the_configuration_that_is_sent_is_the_resolved_one(job_file, tmp_path):
    config = load_config(job_file, ["train.steps=7", "data.split.kind=leave_one_out"], elsewhere=True)
    from onetrain.launcher.config import config_text

    submission.stage(config_text(config), tmp_path / "staged")
    assert load_config(tmp_path / "staged" / "config.yaml") == config


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [([], 5, "--address"), (["--address", "head:6379"], 5, "8265"), (["--address", "h", "--env", "x y"], 2, "--env")],
)
def test_command_lines_that_cannot_be(job_file, arguments, code, message):
    done = submit(job_file, *arguments)
    assert done.exit_code == code
    assert message in done.output


def test_the_manifest_carries_the_configuration(job_file, tmp_path):
    done = submit(job_file, "--kuberay", tmp_path / "rayjob.yaml", "--set", "train.steps=7")
    assert done.exit_code == 0, done.output
    manifest = yaml.safe_load((tmp_path / "rayjob.yaml").read_text())
    (head,) = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable.get("value", "").replace("$$", "$") for variable in head["env"]}
    (tmp_path / "sent.yaml").write_text(variables[job_entry.CONFIG_VARIABLE])
    assert load_config(tmp_path / "sent.yaml") == load_config(job_file, ["train.steps=7"])
    assert submission.differences(json.loads(variables[job_entry.SUBMISSION_VARIABLE]), submission.facts()) == []
    assert yaml.safe_load(submit(job_file, "--kuberay", "-", "--set", "train.steps=7").stdout) == manifest
    refused = submit(job_file, "--kuberay", "-", "--set", "storage_path=/elsewhere")
    assert refused.exit_code == 2
    assert "storage_mount" in refused.output


@pytest.fixture
def trained(monkeypatch):
    """The command lines that the entrypoint hands to the `train` verb."""
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append([*sys.argv]))
    monkeypatch.setattr(sys, "argv", [])
    return seen


def test_the_entrypoint_trains_where_versions_are_equal(tmp_path, trained):
    submission.stage("name: a\n", tmp_path)
    assert job_entry.main([str(tmp_path / "config.yaml")]) == 0
    assert trained == [["onetrain", "train", str(tmp_path / "config.yaml"), "--address", "auto"]]


def test_the_entrypoint_refuses_other_versions_with_a_table(tmp_path, trained, capsys):
    submission.stage("name: a\n", tmp_path)
    path = tmp_path / "submission.json"
    submitted = json.loads(path.read_text())
    submitted["packages"] |= {"torch": "1.0.0", "wandb": "0.0.1"}
    path.write_text(json.dumps(submitted))
    assert job_entry.main([str(tmp_path / "config.yaml")]) == 2
    table = capsys.readouterr().out
    assert re.search(r"torch +1\.0\.0 +\d+\.\d+.* +pip install torch==1\.0\.0 on every node", table)
    assert "wandb" not in table
    assert trained == []


def test_the_entrypoint_reads_a_manifest(trained, monkeypatch):
    monkeypatch.setenv(job_entry.CONFIG_VARIABLE, "name: from-manifest\n")
    monkeypatch.setenv(job_entry.SUBMISSION_VARIABLE, json.dumps(submission.submission(submission.IMAGE_MUST_MATCH)))
    assert job_entry.main(["--from-environment"]) == 0
    assert Path(trained[0][2]).read_text() == "name: from-manifest\n"


def test_a_stopped_job_stops_its_run_although_ray_handles_sigterm_too(monkeypatch):
    """Ray's jobs stop their driver by SIGTERM, for which `ray.init` installs a handler that only ends the process."""

    @contextlib.contextmanager
    def session(*args):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        yield

    def supervise(job, say):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(supervised, "job_of", lambda config: None)
    monkeypatch.setattr(supervised, "ray_session", session)
    monkeypatch.setattr(supervised, "supervise", supervise)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt):
            supervised.run_supervised(RunConfig("a", cluster=ClusterOptions(address="auto")))
    finally:
        signal.signal(signal.SIGTERM, before)
