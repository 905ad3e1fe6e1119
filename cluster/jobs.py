"""Ray's Jobs API: connect, submit, follow the log of a job, stop it, and say how it ended."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from onetrain.cluster.errors import ClusterError

RUN_KEY = "onetrain_run"  # of a job's metadata
CONNECT_TIMEOUT_S = 5.0
PATIENCE_S = 60.0  # how long the cluster may be out of reach while a job is followed
QUIET_S = 15.0  # without a line of the log, before the job is asked how it is
RETRY_S = 1.0
STOP_WAIT_S = 60  # between SIGTERM and SIGKILL for the driver of a job that is stopped; Ray's own default is 3
STOP_WAIT_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"
TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")  # of uploads, closed connections
NO_SUCH_JOB = "does not exist"  # Ray's words


def jobs_address(given: str | None) -> str:
    """The address of the Jobs API as http(s)://host:port.

    Raises:
        ClusterError: there is none, or it is another kind of address.
    """
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or ""
    if not address:
        raise ClusterError(
            "no address to submit to: give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS. It is that of "
            "Ray's dashboard, which `ray start --head --dashboard-host 0.0.0.0` prints"
        )
    parts = urlsplit(address if "://" in address else f"http://{address}")
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or port in (0, 6379, 10001):
        raise ClusterError(
            f"{address!r} is not the address of the Jobs API: give http://HEAD:8265 (the port of Ray's dashboard, not "
            "6379, which is for nodes, nor 10001, which is Ray Client's)"
        )
    return f"{parts.scheme}://{parts.netloc}" if port else f"{parts.scheme}://{parts.netloc}:8265"


def connect(address: str) -> JobSubmissionClient:
    """A client of the Jobs API at `address`, with the token if there is one.

    Raises:
        ClusterError: nobody answers, the token is missing or wrong, or the cluster runs another version of Ray.
    """
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 8265), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ClusterError(
            f"nobody answers at {address}: {error}. Check host and port; the head's dashboard listens to other "
            "machines only if Ray was started with --dashboard-host 0.0.0.0"
        ) from error
    own = token()
    for name in ("ray", *TALKATIVE):
        logging.getLogger(name).setLevel(logging.WARNING)
    client = _asking(address, JobSubmissionClient, address, headers={"Authorization": f"Bearer {own}"} if own else {})
    there = _asking(address, client._do_request, "GET", "/api/version").json()["ray_version"]
    if there != ray.__version__:
        raise ClusterError(
            f"the cluster at {address} runs Ray {there}, this environment Ray {ray.__version__}. Install ray=={there} "
            "here, or the same version on all of its nodes"
        )
    return client


def token() -> str | None:
    """Ray's order: the variable, the file that a variable names, the file in the home folder."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    if mode == "disabled":
        return None
    if found := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return found
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        found = path.read_text(encoding="utf-8").strip()
    except OSError:
        found = ""
    if not found and (named or mode == "token"):
        raise ClusterError(
            "token authentication is on (RAY_AUTH_MODE=token or RAY_AUTH_TOKEN_PATH), but there is no token: neither "
            f"RAY_AUTH_TOKEN nor {path} has one. Copy it from the head node: `ray get-auth-token` prints it there"
        )
    return found or None


def _asking(address: str, ask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`ask(...)`, with Ray's many exceptions made one."""
    try:
        return ask(*args, **kwargs)
    except ray.exceptions.AuthenticationError as error:
        if "Authentication required" in str(error):
            problem = (
                "asks for a token, and none was found here. Set RAY_AUTH_TOKEN, or write it to ~/.ray/auth_token; "
                "`ray get-auth-token` prints it on the head node"
            )
        else:
            problem = "refuses this token. `ray get-auth-token` on the head node prints the right one"
        raise ClusterError(f"the cluster at {address} {problem}") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ClusterError(f"the Jobs API at {address} failed: {str(error).strip()[:2000]}") from error


def submit(
    client: JobSubmissionClient, entrypoint: str, runtime_env: dict[str, Any], run: str, job: str, **metadata: str
) -> str:
    """Upload and start a job; its id.

    Raises:
        ClusterError: the cluster refused it.
    """
    return str(
        _asking(
            client.get_address(),
            client.submit_job,
            entrypoint=entrypoint,
            submission_id=job,
            runtime_env=runtime_env,
            metadata={RUN_KEY: run, **metadata},
        )
    )


def running_job(client: JobSubmissionClient, run: str) -> JobDetails | None:
    """The newest job of this run that has not ended."""
    jobs = _asking(client.get_address(), client.list_jobs)
    open_ = [job for job in jobs if (job.metadata or {}).get(RUN_KEY) == run and not job.status.is_terminal()]
    return max(open_, key=lambda job: job.start_time or 0, default=None)


def stop(client: JobSubmissionClient, job: str) -> JobDetails:
    """Stop a job and wait until it has ended; its driver gets SIGTERM, and SIGKILL after STOP_WAIT_S."""
    address = client.get_address()
    _asking(address, client.stop_job, job)
    deadline = time.monotonic() + STOP_WAIT_S + 30
    while not (details := _asking(address, client.get_job_info, job)).status.is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(f"job {job} did not end within {STOP_WAIT_S + 30} s after it was asked to")
        time.sleep(RETRY_S)
    return details


def exit_code(job: JobDetails) -> int:
    """What `onetrain submit` ends with: the driver's own exit code, or 5 where a job ended in another way."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code
    return code if job.status == JobStatus.FAILED and code and 0 < code < 128 else ClusterError.exit_code


def follow(client: JobSubmissionClient, job: str, on_line: Callable[[str], None]) -> JobDetails:
    """Hand over every line of a job's log until the job has ended.

    A connection that is lost is made again for PATIENCE_S; lines come once.

    Raises:
        ClusterError: the cluster cannot be reached any more, or does not know the job any more.
    """
    return asyncio.run(_follow(client, job, _Lines(on_line)))


class _Lines:
    """Whole lines from a log that is read again from its start after each lost connection."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._taken = 0  # characters handed on
        self.at = 0  # characters read since the connection was made
        self._begun = ""

    def restart(self) -> None:
        self.at = 0

    def add(self, text: str) -> None:
        new = text[max(0, self._taken - self.at) :]
        self.at += len(text)
        self._taken = max(self._taken, self.at)
        *whole, self._begun = (self._begun + new).split("\n")
        for line in whole:
            self._on_line(line)

    def end(self) -> None:
        if self._begun:
            self.add("\n")


async def _follow(client: JobSubmissionClient, job: str, lines: _Lines) -> JobDetails:
    lost_at: float | None = None
    while True:
        try:
            await _tail(client, job, lines)
            details = await _details(client, job)
            if details.status.is_terminal():
                lines.restart()  # a connection that ended in good order need not have told everything
                lines.add((await _get(client, f"/api/jobs/{job}/logs"))["logs"])
                lines.end()
                return details
            lost_at = None
        except ray.exceptions.AuthenticationError as error:
            raise ClusterError(f"the cluster refuses the token while job {job} is followed: {error}") from error
        except Exception as error:  # aiohttp's, requests' and Ray's own; what they have in common is that some pass
            if NO_SUCH_JOB in str(error):
                raise ClusterError(
                    f"the cluster does not know job {job} any more: its head was started anew, and the job ended with "
                    "it. Submit again; the run goes on from its newest checkpoint"
                ) from error
            now = time.monotonic()
            lost_at = now if lost_at is None or lines.at else lost_at
            if now - lost_at > PATIENCE_S:
                raise ClusterError(
                    f"no connection to {client.get_address()} for {PATIENCE_S:.0f} s ({error}); job {job} goes on if "
                    "the cluster does. Follow it again with --attach"
                ) from error
        lines.restart()
        await asyncio.sleep(RETRY_S)


async def _tail(client: JobSubmissionClient, job: str, lines: _Lines) -> None:
    """Read the log until its end; a quiet one is looked after, since a dead connection is quiet too."""
    tail = client.tail_job_logs(job)
    step: asyncio.Task[str] | None = None
    try:
        while True:
            step = step or asyncio.ensure_future(anext(tail))
            if not (await asyncio.wait({step}, timeout=QUIET_S))[0]:
                if (await _details(client, job)).status.is_terminal() and not (
                    await asyncio.wait({step}, timeout=RETRY_S)
                )[0]:
                    return
                continue
            done, step = step, None
            try:
                lines.add(done.result())
            except StopAsyncIteration:
                return
    finally:
        if step is not None:
            step.cancel()
            await asyncio.wait({step}, timeout=RETRY_S)
        with contextlib.suppress(RuntimeError, AttributeError):  # it is still waiting, or no generator
            await tail.aclose()  # type: ignore[attr-defined]


async def _details(client: JobSubmissionClient, job: str) -> JobDetails:
    return JobDetails(**await _get(client, f"/api/jobs/{job}"))


async def _get(client: JobSubmissionClient, path: str) -> dict[str, Any]:
    """As the client's own methods, which have no time limit and could hold up the end of this process."""
    response = await asyncio.to_thread(client._do_request, "GET", path, timeout=QUIET_S)
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text}")
    return dict(response.json())
