"""Made-up runs: a clock that writes events and ledger as supervisor and training loop would, and knows the truth."""

import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

BEGAN = 1_790_000_000.0
CONFIG = {
    "name": "night",
    "seed": 0,
    "train": {"steps": 1200, "log_every": 10},
    "parallel": {"precision": "bf16", "expert_parallel": 2, "global_batch_size": 1024},
    "cluster": {"workers": 8},
    "recovery": {"silence_s": 30.0},
}
LAYERS = 6


class History:
    """Logs of one run; `truth` has the seconds that every label should get."""

    def __init__(self, time: float = BEGAN) -> None:
        self.time = time
        self.events: list[dict[str, Any]] = []
        self.ledger: list[dict[str, Any]] = []
        self.truth: Counter[str] = Counter()
        self.attempt = 0

    def spend(self, label: str, seconds: float) -> None:
        self.time += seconds
        self.truth[label] += seconds

    def event(self, event: str, **fields: Any) -> None:
        self.events.append({"time": self.time, "event": event, **fields})

    def entry(self, kind: str, **fields: Any) -> None:
        self.ledger.append({"time": self.time, "attempt": self.attempt, "kind": kind, **fields})

    @property
    def before_work(self) -> str:
        return "start_up" if self.attempt <= 1 else "restart"

    def begin(self, launch_s: float, supervised: bool = True, step: int = 0, furthest: int = 0, **fields: Any) -> None:
        """The next attempt, until train() is entered; an attempt without supervisor has no record of that time."""
        self.attempt += 1
        if supervised:
            self.event("attempt_started", attempt=self.attempt, **fields)
            self.spend(self.before_work, launch_s)
        self.entry("start", begun=self.time, world_size=fields.get("world_size", 2), step=step, furthest=furthest)

    def record(self, step: int, seconds: dict[str, float]) -> None:
        """A ledger record of the time since the one before; in the order in which the reader lays it out."""
        for label, length in seconds.items():
            self.spend(self.before_work if label == "start_up" else label, length)
        self.entry("time", step=step, position=step * 1024, seconds=seconds)

    def end(self, kind: str, **fields: Any) -> None:
        self.event("attempt_ended", attempt=self.attempt, kind=kind, **fields)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, records in (("events", self.events), ("ledger", self.ledger)):
            if records:
                write_lines(folder / f"{name}.jsonl", records)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def night(folder: Path, device: str = "NVIDIA H100 80GB HBM3", nasty: str = "", going: bool = False) -> History:
    """A run of three attempts with experts: one node lost, one hang, then finished, or in step 1150 if it is `going`.

    `nasty` is put into every free text.
    """
    chance = random.Random(0)
    history, metrics, done = History(), [], 0
    history.event("supervisor_started", pid=4242, node="10.0.0.1", restarted=False, workers=8, sizes=[2, 4, 6, 8])
    history.spend("start_up", 21.0)
    history.event("preflight", ok=True, problems=[])
    plans = [
        (8, 430, "node_lost", "node 10.0.0.4 is gone, and ranks 6 and 7 with it" + nasty, 6, 4.0, "first attempt"),
        (
            6,
            780,
            "hang",
            "rank 3 stood in step 783 for 300 s; the others wait for it in all_to_all" + nasty,
            3,
            300.0,
            "",
        ),
        (8, 1200, "finished", "", None, 0.0, "as many nodes as wanted are back"),
    ]
    for number, (world, until, kind, reason, rank, tail_s, why) in enumerate(plans, 1):
        furthest, done = done, done // 100 * 100
        nodes = [f"10.0.0.{1 + rank // 2}" for rank in range(world)]
        history.begin(
            9.0, step=done, furthest=furthest, world_size=world, wanted=8, nodes=nodes, reason=why or f"after {kind}"
        )
        history.event("ranks_running", attempt=number, seconds=9.0)
        pace = 3.2 * 8 / world
        first = True
        while done < (1150 if going and number == 3 else until):
            done += 10
            label = "recompute" if done <= furthest else "compute"
            seconds = {"start_up": 31.0} if first else {}
            seconds |= {"data_wait": abs(chance.gauss(0.4, 0.2)), label: 10 * pace * chance.uniform(0.95, 1.1)}
            if done % 100 == 0:
                seconds["checkpoint"] = 1.4
            if done % 400 == 0:
                seconds["validation"] = 42.0
            history.record(done, seconds)
            if first:
                history.event("training", attempt=number, step=done, seconds=48.0)
            first = False
            metrics.append(
                {"step": done, "time": history.time, "kind": "train", "attempt": number}
                | _metrics(done, world, pace, chance)
            )
            if done % 100 == 0:
                history.entry(
                    "checkpoint",
                    step=done,
                    bytes=14_300_000_000,
                    blocked_s=1.4,
                    mode="async",
                    write_s=chance.uniform(19, 33),
                    path=f"checkpoints/step_{done:08d}",
                )
            if done % 400 == 0:
                metrics.append(
                    {
                        "step": done,
                        "time": history.time,
                        "kind": "valid",
                        "attempt": number,
                        "loss": _loss(done) + 0.06,
                        "recall@10": 0.31 - 0.24 * math.exp(-done / 420),
                        "ndcg@10": 0.19 - 0.15 * math.exp(-done / 420),
                        "requests": 5000,
                    }
                )
        if kind == "finished" and going:
            continue
        if kind == "finished":
            history.entry("end", outcome="finished", step=done)
            history.spend("shut_down", 3.0)
            history.end(kind, reason="", rank=None, node=None, step=done, position=done * 1024)
            history.event("run_finished", step=done)
            continue
        history.spend("lost", tail_s + 6.0)
        history.end(kind, reason=reason, rank=rank, node=nodes[rank], step=done + 2, position=(done + 2) * 1024)
        history.event("waiting", seconds=2.0, reason="back-off after a failure")
        history.spend("restart", 7.0)
        history.event("nodes", alive=nodes, free=0)
    history.write(folder)
    write_lines(folder / "metrics.jsonl", metrics)
    skipped = {"attempt": 1, "step": 213, "position": 218112, "action": "skip", "reason": "spike", "value": 9.31}
    write_lines(folder / "skipped.jsonl", [{"time": BEGAN + 800, **skipped, "samples": {"shop" + nasty: [17, 4711]}}])
    (folder / "hang_2.txt").write_text(
        "attempt 2: rank 3 on 10.0.0.2 has been in phase step for 300 s"
        + nasty
        + "\n\nrank 3: all_to_all 5120 of 5121\n"
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"name": "night" + nasty}))
    packages = {"onetrain": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "ray": "2.60.0"}
    details = {"host": "node-1", "python": "3.11.7", "packages": packages, "cpus": 96, "world_size": 8}
    details |= {"git": {"commit": "0123abc" * 5, "dirty": False}, "command": ["onetrain", "train" + nasty]}
    details |= {"device": {"type": "cpu" if device == "x86_64" else "cuda", "names": [device] * 2}}
    (folder / "environment.json").write_text(json.dumps(details))
    state = beats(history) if going else beats(history, "done") | {"ranks": []}
    (folder / "heartbeats.json").write_text(json.dumps(state))
    (folder / "best.json").write_text(json.dumps({"step": 1200, "metric": "recall@10", "value": 0.296}))
    return history


def beats(history: History, state: str = "running", age_s: float = 0.4, late: float = 0.0) -> dict[str, Any]:
    """heartbeats.json of that run: eight ranks in a step; the last one is `late` seconds in its phase."""
    ranks = [
        {
            "rank": rank,
            "node": f"10.0.0.{1 + rank // 2}",
            "pid": 1000 + rank,
            "phase": "step",
            "in_phase_s": 0.7 + (late if rank == 7 else 0.0),
            "step": 1150,
            "position": 1150 * 1024,
            "collectives": {"default_pg": 5120 - (rank == 7), "ep": 640},
            "age_s": age_s,
        }
        for rank in range(8)
    ]
    head = {"time": history.time, "state": state, "attempt": history.attempt, "world_size": 8, "wanted": 8}
    return {**head, "ranks": ranks}


def _loss(step: int) -> float:
    return 2.9 + 5.2 * math.exp(-step / 260)


def _metrics(step: int, world: int, pace: float, chance: random.Random) -> dict[str, float]:
    numbers = {
        "loss": _loss(step) + chance.gauss(0, 0.04),
        "grad_norm": 0.6 + 2 * math.exp(-step / 120) + abs(chance.gauss(0, 0.1)),
        "learning_rate": 2e-4 * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * min(step, 1200) / 1200)),
        "samples_per_s": 1024 / pace,
        "targets_per_s": 5 * 1024 / pace,
        "tokens_per_s": 15 * 1024 / pace,
        "step_s": pace,
        "data_wait": abs(chance.gauss(0.012, 0.006)),
        "padding": 0.11 + chance.gauss(0, 0.01),
        "model_gflops_per_s": world * 182_000 * chance.uniform(0.9, 1.0),
    }
    for level, (floor, tau) in enumerate(((0.42, 300), (0.61, 200), (0.35, 500))):
        numbers[f"accuracy_level_{level}"] = floor * (1 - math.exp(-step / tau)) + chance.gauss(0, 0.006)
        numbers[f"loss_level_{level}"] = _loss(step) * (1.2 - 0.2 * level)
    for layer in range(2, 2 + LAYERS):
        imbalance = 1 + (4 - layer / 3) * math.exp(-step / 200) + abs(chance.gauss(0, 0.05))
        name = f"experts/layer_{layer:02d}"
        numbers |= {f"{name}/load_max": 1.1 * imbalance, f"{name}/load_p50": 1 / imbalance}
        numbers |= {f"{name}/dead": 0.2 * math.exp(-step / 90) if layer > 5 else 0.0}
        numbers |= {f"{name}/entropy": 2.9, f"{name}/entropy_share": 0.93 - 0.02 * layer * math.exp(-step / 300)}
        numbers |= {f"{name}/bias_range": 0.001 * step * imbalance / 10}
    return numbers | {"experts/load_max": 1.3, "experts/dead": 0.01, "experts/entropy_share": 0.9}
