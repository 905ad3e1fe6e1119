"""Starting, joining and leaving Ray; Ctrl-C in the driver leaves nothing behind."""

import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray

from onetrain.cluster.errors import ClusterError
from onetrain.cluster.local_ray import ray_session
from onetrain.cluster.options import ClusterOptions

DRIVER = """
import os, sys, time
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.worker_group import run_on_workers

def train():
    import subprocess
    subprocess.Popen(["sleep", "600"])  # as a data loader would
    print("training", flush=True)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(0.3)
        print("saved", flush=True)
        if sys.argv[1] == "stubborn":
            time.sleep(600)
        raise

try:
    run_on_workers(train, (), ClusterOptions(workers=2), 1, on_message=lambda line: print(line, flush=True))
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_a_local_ray_has_cpus_for_all_workers_and_leaves_nothing_behind():
    before = set(psutil.Process().children(recursive=True))
    with ray_session(ClusterOptions(workers=5)):
        assert ray.cluster_resources()["CPU"] >= 5
        session = Path(ray.get_runtime_context().get_session_name())
        folder = Path("/tmp/ray") / session
        assert folder.is_dir()
        started = set(psutil.Process().children(recursive=True)) - before
        with ray_session(ClusterOptions()):  # an inner session uses the outer one ...
            assert ray.is_initialized()
        assert ray.is_initialized()  # ... and does not end it
    assert not ray.is_initialized()
    assert started
    assert psutil.wait_procs(started, timeout=20)[1] == []
    assert not folder.exists()


def test_a_local_ray_that_does_not_start(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match=r"a local Ray did not start: The current node timed out.*onetrain doctor"):
        ray_session(ClusterOptions()).__enter__()


def test_an_address_where_nothing_listens():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        address = f"127.0.0.1:{held.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(ClusterError, match=f"no Ray answers at cluster.address '{address}'"):
            ray_session(ClusterOptions(address=address)).__enter__()
    assert time.monotonic() - started < 20


def test_an_address_where_something_else_listens():
    def answer(server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(1024)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match="no Ray answers"):
            ray_session(ClusterOptions(address=address)).__enter__()


@pytest.mark.parametrize(
    ("address", "message"), [("nonsense", "could not join|no Ray answers"), ("ray://head:10001", "Ray Client")]
)
def test_an_address_of_another_form(address, message):
    with pytest.raises(ClusterError, match=message):
        ray_session(ClusterOptions(address=address)).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("manner", ["polite", "stubborn"])
def test_ctrl_c_stops_the_workers_and_leaves_no_process(manner, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    driver = subprocess.Popen([sys.executable, script, manner], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "training\n"
        children = psutil.Process(driver.pid).children(recursive=True)
        assert sum(child.name().startswith("sleep") for child in children) >= 1
        interrupted = time.monotonic()
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=60)
    finally:
        driver.kill()
    assert output == "saved\n"
    assert driver.returncode == 130
    assert time.monotonic() - interrupted < 30
    assert psutil.wait_procs(children, timeout=20)[1] == []
