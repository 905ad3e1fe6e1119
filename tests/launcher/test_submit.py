"""`onetrain submit` against a real Ray head with its dashboard, Jobs API and token authentication."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from train_cases import changed
from typer.testing import CliRunner

from onetrain.cluster import jobs
from onetrain.launcher import cli, submission
from onetrain.launcher.config import run_folder, save_config
from onetrain.parallel.testing import free_port

TOKEN = "a-token-for-the-tests-of-submit-0123456789"
START_S = 120  # on a busy machine


@pytest.fixture(scope="module")
def head():
    """Address of the Jobs API of a Ray that ends with the module."""
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # a short path: Ray's sockets are below
    port = free_port()
    flags = ["--head", "--block", "--include-dashboard=true", "--disable-usage-stats", "--num-cpus=2", "--num-gpus=0"]
    flags += [f"--dashboard-port={port}", f"--temp-dir={folder}", f"--object-store-memory={80 * 2**20}"]
    flags += [f"--{name}={free_port()}" for name in ("port", "ray-client-server-port", "dashboard-agent-listen-port")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    with open(f"{folder}/start.log", "w") as log:
        started = psutil.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *flags], env=own, stdout=log, stderr=log, cwd=folder
        )
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"http://127.0.0.1:{port}/api/version"):
            assert started.poll() is None, Path(f"{folder}/start.log").read_text()
            assert time.monotonic() < deadline, Path(f"{folder}/start.log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        processes = [*started.children(recursive=True), started]
        started.terminate()
        _, alive = psutil.wait_procs(processes, timeout=10)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=10)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url):
    try:
        urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == 401  # it wants a token
    except OSError:
        return False
    raise AssertionError("Ray answers without a token")


@pytest.fixture
def job_file(tiny, tmp_path, monkeypatch):
    """The tiny job with one rank, below a current folder that is not the project's."""
    for name in [*os.environ]:
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    config = changed(tiny, name="sent", cluster__workers=1, train__steps=2, train__log_every=1, evaluation__max_users=8)
    save_config(config, tmp_path / "job.yaml")
    return config


def submit(*arguments):
    return CliRunner().invoke(cli.app, ["submit", "job.yaml", *arguments])


@pytest.mark.slow
def test_a_job_trains_and_its_log_and_exit_code_arrive(head, job_file, tmp_path):
    command = [sys.executable, "-m", "onetrain.launcher.cli", "submit", "job.yaml", "--address", head]
    command += ["--installed"]  # whose compiled loops are there; a new copy of the source compiles them for seconds
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2/2" in done.stdout
    assert done.stdout.count("step 1/2") == 1
    assert "succeeded" in done.stderr
    assert (run_folder(job_file) / "metrics.jsonl").exists()


WHERE = """
import ray
from onetrain.launcher import submission

def where():
    from onetrain.cluster import beacon
    return beacon.__file__

ray.init("auto", log_to_driver=False)
print("driver", submission.__file__)
print("worker", ray.get(ray.remote(where).remote()))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("job_file")
def test_driver_and_workers_run_the_source_that_was_sent(head, tmp_path):
    submission.stage("name: where\n", tmp_path / "staged")
    (tmp_path / "staged" / "where.py").write_text(WHERE)
    client = jobs.connect(head)
    job = jobs.submit(
        client, f"exec {sys.executable} where.py", {"working_dir": str(tmp_path / "staged")}, "where", "w-1"
    )
    lines = []
    assert jobs.exit_code(jobs.follow(client, job, lines.append)) == 0, lines
    places = dict(line.split() for line in lines if line.startswith(("driver ", "worker ")))
    assert set(places) == {"driver", "worker"}
    assert all("/working_dir_files/_ray_pkg_" in place for place in places.values())


@pytest.mark.slow
def test_other_versions_end_with_a_table_and_code_2(head, job_file, monkeypatch):
    facts = submission.facts()
    facts["packages"]["deepspeed"] = "0.0.1"
    monkeypatch.setattr(submission, "facts", lambda: facts)
    done = submit("--address", head)
    assert done.exit_code == 2, done.output
    assert "differs from where this job was submitted" in done.output
    assert "pip install deepspeed==0.0.1 on every node" in done.output
    assert not run_folder(job_file).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("job_file")
def test_a_run_has_one_job_at_a_time_which_can_be_followed_and_stopped(head):
    client = jobs.connect(head)
    assert "no job of run sent" in submit("--address", head, "--attach").output
    script = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (print('told to stop', flush=True), exit(0))); "
    )
    script += "print('began', flush=True); time.sleep(600)"
    job = jobs.submit(client, f'exec {sys.executable} -c "{script}"', {}, "sent", "sent-1")
    refused = submit("--address", head)
    assert refused.exit_code == 2
    assert "sent-1" in refused.output

    def stop_when_it_runs():
        while "began" not in client.get_job_logs(job):
            time.sleep(0.2)
        jobs.stop(client, job)

    stopping = threading.Thread(target=stop_when_it_runs)
    stopping.start()
    followed = submit("--address", head, "--attach")
    stopping.join()
    assert followed.exit_code == 5, followed.output
    assert "told to stop" in followed.output
    assert "stopped" in followed.output


@pytest.mark.parametrize(("token", "message"), [("", "asks for a token"), ("wrong", "refuses this token")])
def test_a_missing_or_wrong_token_is_told(head, job_file, monkeypatch, tmp_path, token, message):
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("HOME", str(tmp_path))  # without ~/.ray/auth_token
    command = [sys.executable, "-m", "onetrain.launcher.cli", "submit", "job.yaml", "--address", head]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)  # Ray remembers tokens in a process
    assert done.returncode == 5
    assert message in done.stderr
    assert "ray get-auth-token" in done.stderr
