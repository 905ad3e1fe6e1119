"""A training run on a Ray cluster of several nodes on this machine, and what a fault needs to know of it."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from onetrain.cluster.event_log import read_log
from onetrain.launcher.config import run_folder, save_config
from onetrain.launcher.options import RunConfig
from onetrain.parallel.testing import free_port

INJECT = Path(__file__).parent / "inject"
CPUS_PER_NODE = 2
WAIT_S = 240.0
STEP_S = 0.1  # added to every step: all faults must be done before the run is


class Scene:
    """The cluster, the driver process and the run's files."""

    def __init__(self, config: RunConfig, folder: Path, nodes: int, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        folder.mkdir(parents=True, exist_ok=True)
        self._environment = dict(os.environ)
        os.environ |= {"CHAOS_FOLDER": str(folder), "PYTHONPATH": injected(), "CHAOS_STEP_S": str(STEP_S)}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.session = self.cluster.head_node.get_session_dir_path()
        self._hosts = 1
        self.nodes = [self.add_node() for _ in range(nodes)]
        cluster = replace(config.cluster, address=self.cluster.address)
        self.config = replace(config, cluster=cluster, storage_path=str(folder / "runs"))
        self.run = run_folder(self.config)
        save_config(self.config, folder / "job.yaml")
        self.driver: subprocess.Popen[bytes] | None = None

    def add_node(self) -> Any:
        """One more node, under an address of its own."""
        self._hosts += 1
        node = self.cluster.add_node(num_cpus=CPUS_PER_NODE, node_ip_address=f"127.0.0.{self._hosts}")
        return node

    def start_driver(self) -> None:
        """`onetrain train` in a process of its own; its output is appended to driver.log."""
        with (self.folder / "driver.log").open("ab") as log:
            command = [sys.executable, "-m", "onetrain.launcher.cli", "train", str(self.folder / "job.yaml")]
            self.driver = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """The supervisor's log, or those records of it."""
        return [record for record in read_log(self.run / "events.jsonl") if record["event"] == name or not name]

    def ranks(self) -> list[dict[str, Any]]:
        """The newest heartbeats that show all ranks."""
        self.wait(lambda: self._heartbeats()["ranks"], "heartbeats")
        return self._heartbeats()["ranks"]

    def step(self) -> int:
        """Steps done, as heartbeats say."""
        return max((rank["step"] or 0 for rank in self._heartbeats()["ranks"]), default=0)

    def checkpoints(self) -> list[Path]:
        """Whole ones, oldest first."""
        return sorted(path.parent for path in (self.run / "checkpoints").glob("step_*[0-9]/state.json"))

    def ledger(self, kind: str) -> list[dict[str, Any]]:
        """Those records of the training loop."""
        return [record for record in read_log(self.run / "ledger.jsonl") if record["kind"] == kind]

    def wait_for_training(self, attempts: int) -> None:
        """Until the first step of the attempt after so many endings is done."""
        self.wait(lambda: len(self.events("training")) > attempts and self.step() > 0, "training")

    def wait_for_checkpoint(self, after: float) -> dict[str, Any]:
        """The first one that the ledger tells of after this moment."""
        self.wait(lambda: any(r["time"] > after for r in self.ledger("checkpoint")), "a checkpoint")
        return next(r for r in self.ledger("checkpoint") if r["time"] > after)

    def wait(self, condition: Callable[[], Any], what: str, seconds: float = WAIT_S) -> None:
        """Poll until it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.driver is not None and self.driver.poll() is not None:
                raise AssertionError(f"the run ended while waiting for {what}:\n{self.log()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"no {what} after {seconds:.0f} s:\n{self.log()}")
            time.sleep(0.1)

    def finish(self, seconds: float = 600) -> None:
        """Until the driver has returned well."""
        assert self.driver is not None
        code = self.driver.wait(timeout=seconds)
        assert code == 0, f"exit code {code}:\n{self.log()}"

    def log(self) -> str:
        """The end of the driver's output."""
        return (self.folder / "driver.log").read_text(errors="replace")[-6000:]

    def close(self) -> None:
        """End driver and cluster."""
        if self.driver is not None and self.driver.poll() is None:
            self.driver.kill()
            self.driver.wait()
        self.cluster.shutdown()
        shutil.rmtree(self.session, ignore_errors=True)
        os.environ.clear()
        os.environ.update(self._environment)

    def _heartbeats(self) -> dict[str, Any]:
        try:
            return json.loads((self.run / "heartbeats.json").read_text())
        except FileNotFoundError:
            return {"ranks": []}


def injected() -> str:
    """PYTHONPATH with the folder of sitecustomize.py before all else."""
    return os.pathsep.join([str(INJECT), *filter(None, [os.environ.get("PYTHONPATH")])])


def undisturbed(config: RunConfig, folder: Path, ranks: int) -> RunConfig:
    """The same run without cluster, supervisor and faults, under torchrun; returns its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = replace(config.stream, service=replace(config.stream.service, actors=0))
    config = replace(config, storage_path=str(folder / "runs"), stream=stream)
    save_config(config, folder / "job.yaml")
    environment = os.environ | {"CHAOS_FOLDER": str(folder), "PYTHONPATH": injected(), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
    command = [*launch, str(free_port()), "-m", "onetrain.launcher.cli", "train", str(folder / "job.yaml")]
    with (folder / "driver.log").open("wb") as log:
        subprocess.run(command, stdout=log, stderr=log, env=environment, check=True, cwd=folder)
    return config


def samples_by_step(folder: Path) -> dict[int, list[str]]:
    """Fingerprints of the samples of each step, over all ranks of the last attempt that did it."""
    found: dict[int, tuple[str, list[str]]] = {}
    for path in sorted((folder / "trace").iterdir()):
        attempt = path.name.partition("_")[0]
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            before, known = found.get(step, ("", []))
            found[step] = (attempt, known + samples if before == attempt else samples)
    return {step: sorted(samples) for step, (_, samples) in found.items()}
