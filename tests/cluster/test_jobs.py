"""Addresses, tokens, exit codes, and following a log over a connection that breaks; no Ray is started."""

import asyncio
import json
import random
from types import SimpleNamespace

import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.job_submission import JobDetails, JobStatus

from onetrain.cluster import jobs
from onetrain.cluster.errors import ClusterError


def details(status, code=None):
    return JobDetails(type="SUBMISSION", submission_id="j", status=status, entrypoint="e", driver_exit_code=code)


@pytest.mark.parametrize(
    ("given_", "address"),
    [
        ("http://head:8265", "http://head:8265"),
        ("head", "http://head:8265"),
        ("https://ray.example.org/", "https://ray.example.org:8265"),
        ("10.0.0.1:9000", "http://10.0.0.1:9000"),
    ],
)
def test_addresses(given_, address, monkeypatch):
    assert jobs.jobs_address(given_) == address
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", given_)
    assert jobs.jobs_address(None) == address


@pytest.mark.parametrize("wrong", ["head:6379", "ray://head:10001", "head:port", "ftp://head", "auto:6379"])
def test_other_kinds_of_addresses_are_refused(wrong):
    with pytest.raises(ClusterError, match="not the address of the Jobs API"):
        jobs.jobs_address(wrong)


def test_no_address(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ClusterError, match="--address"):
        jobs.jobs_address(None)


def test_the_token_is_looked_for_in_rays_order(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert jobs.token() is None
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(ClusterError, match=r"no token.*ray get-auth-token"):
        jobs.token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("home\n")
    assert jobs.token() == "home"
    (tmp_path / "named").write_text("named")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert jobs.token() == "named"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "variable")
    assert jobs.token() == "variable"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert jobs.token() is None


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 1, 1),
        ("FAILED", 2, 2),
        ("FAILED", 7, 7),
        ("FAILED", None, 5),  # the runtime environment, or the head
        ("FAILED", -9, 5),
        ("FAILED", 137, 5),
        ("STOPPED", None, 5),
    ],
)
def test_exit_codes(status, driver, code):
    assert jobs.exit_code(details(status, driver)) == code


def test_the_newest_open_job_of_a_run_is_found():
    def job(name, run, status, start):
        return details(status).model_copy(
            update={"submission_id": name, "metadata": run and {jobs.RUN_KEY: run}, "start_time": start}
        )

    listed = [
        job("old", "a", "RUNNING", 1),
        job("new", "a", "PENDING", 2),
        job("done", "a", "SUCCEEDED", 3),
        job("other", "b", "RUNNING", 4),
        job("strange", None, "RUNNING", 5),
    ]
    client = SimpleNamespace(list_jobs=lambda: listed, get_address=lambda: "http://head:8265")
    assert jobs.running_job(client, "a").submission_id == "new"
    assert jobs.running_job(client, "c") is None


class Cluster:
    """A job whose log grows while it is followed, over connections that break at random."""

    def __init__(self, log, random_, faults, quiet=False):
        self.log, self.random, self.faults, self.quiet = log, random_, faults, quiet
        self.asked = 0

    def get_address(self):
        return "http://head:8265"

    async def tail_job_logs(self, job):
        at, end = 0, len(self.log)
        breaks = None
        if self.faults:
            self.faults -= 1
            breaks = self.random.randint(0, end)
        while at < end:
            size = self.random.randint(1, 7)
            if breaks is not None and at + size > breaks:
                if self.random.random() < 0.3:
                    return  # as where the head is started anew: a log that ends without an error
                raise RuntimeError("connection closed unexpectedly")
            yield self.log[at : at + size]
            at += size
        if self.quiet:
            await asyncio.sleep(3600)

    def _do_request(self, method, path, timeout):
        assert method == "GET"
        if path == "/api/jobs/j/logs":
            return SimpleNamespace(status_code=200, json=lambda: {"logs": self.log})
        assert path == "/api/jobs/j"
        self.asked += 1
        over = self.faults == 0
        body = {"type": "SUBMISSION", "status": "SUCCEEDED" if over else "RUNNING", "entrypoint": "e"}
        return SimpleNamespace(status_code=200, json=lambda: body, text=json.dumps(body))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(jobs, "RETRY_S", 0.001)
    monkeypatch.setattr(jobs, "QUIET_S", 0.05)


lines_of_a_log = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), max_size=9))


@pytest.mark.usefixtures("quick")
@settings(max_examples=40)
@given(lines=lines_of_a_log, seed=st.integers(0, 10**6), faults=st.integers(0, 4), whole=st.booleans())
def test_every_line_comes_once_whatever_the_connection_does(lines, seed, faults, whole):
    log = "\n".join(lines) + ("\n" if whole and lines else "")
    seen = []
    ended = jobs.follow(Cluster(log, random.Random(seed), faults), "j", seen.append)
    assert ended.status == JobStatus.SUCCEEDED
    assert seen == log.split("\n")[:-1] + ([log.split("\n")[-1]] if log.split("\n")[-1] else [])


@pytest.mark.usefixtures("quick")
def test_a_dead_connection_does_not_hide_the_end_of_the_job():
    seen = []
    cluster = Cluster("a\nb", random.Random(0), 0, quiet=True)
    assert jobs.follow(cluster, "j", seen.append).status == JobStatus.SUCCEEDED
    assert seen == ["a", "b"]
    assert cluster.asked >= 1


@pytest.mark.usefixtures("quick")
def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.05)

    class Gone(Cluster):
        async def tail_job_logs(self, job):
            raise ConnectionError("refused")
            yield ""

    with pytest.raises(ClusterError, match=r"no connection.*refused.*--attach"):
        jobs.follow(Gone("", random.Random(0), 1), "j", print)


@pytest.mark.usefixtures("quick")
def test_a_head_that_was_started_anew_knows_no_job():
    class New(Cluster):
        async def tail_job_logs(self, job):
            raise RuntimeError("Job j does not exist.")
            yield ""

    with pytest.raises(ClusterError, match=r"does not know job j any more.*Submit again"):
        jobs.follow(New("", random.Random(0), 1), "j", print)


def test_another_version_of_ray_is_refused_before_anything_is_sent(monkeypatch):
    class Old:
        def __init__(self, address, headers):
            pass

        def _do_request(self, method, path):
            return SimpleNamespace(json=lambda: {"ray_version": "2.9.0"})

    monkeypatch.setattr(jobs, "JobSubmissionClient", Old)
    monkeypatch.setattr(jobs.socket, "create_connection", lambda *a, **k: SimpleNamespace(close=lambda: None))
    with pytest.raises(ClusterError, match=rf"runs Ray 2\.9\.0, this environment Ray {ray.__version__}"):
        jobs.connect("http://head:8265")
