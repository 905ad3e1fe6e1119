"""Chaos: faults at random moments of a run on several Ray nodes, and the proof that nothing came of them.

`make chaos` runs 20 faults, and a run whose nodes go and come back: `python tests/chaos/chaos.py --help`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from faults import FAULTS
from safetensors.torch import load_file
from scene import Scene, samples_by_step, undisturbed

from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions
from onetrain.data.options import BatchOptions, DataOptions, SimulatorOptions, SourceOptions
from onetrain.data.prepare import prepare
from onetrain.data.stream_options import ServiceOptions, StreamOptions
from onetrain.launcher.config import run_folder
from onetrain.launcher.options import EvaluationOptions, RunConfig, TrackingOptions, TrainOptions
from onetrain.launcher.tokenize import tokenize
from onetrain.model.options import ModelOptions, TokenizerOptions
from onetrain.parallel.options import OptimizerOptions, ParallelOptions

STEPS_PER_FAULT = 20
SAVE_EVERY = 5
SILENCE_S = 6.0
TMPFS_MIB = 48  # of the run's checkpoints, so that a disk can be full


@dataclass(frozen=True)
class Recovery:
    """One fault, and the seconds until training went on: from the fault, or from a hang's deadline."""

    fault: str
    step: int
    detected_s: float | None  # until the attempt had ended; None where training never stopped
    started_s: float | None  # from there until the ranks of the next attempt ran
    first_step_s: float | None  # from there until its first step was done
    total_s: float


def make_job(folder: Path, workers: int, steps: int, builders: int = 1) -> RunConfig:
    """A simulated shop and a small model, dropout on; a step takes a tenth of a second on two cores."""
    shop = SimulatorOptions(users=400, items=120, events_per_user=12, themes=12, embedding_dim=8)
    config = RunConfig(
        name="chaos",
        storage_path=str(folder / "runs"),
        data=DataOptions(
            prepared=str(folder / "prepared"),
            source=SourceOptions(reader="simulator", events=str(folder / "logs"), simulator=shop),
        ),
        tokenizer=TokenizerOptions(codebook=(8, 8, 8), iterations=10),
        batch=BatchOptions(max_context=12),
        stream=StreamOptions(service=ServiceOptions(actors=builders, cpus_per_actor=0.5, memory_gib=0.1)),
        model=ModelOptions(d_model=48, n_layers=2, n_heads=2, embed_dim=16, features=("sid", "behaviour"), dropout=0.1),
        optimizer=OptimizerOptions(learning_rate=2e-3, warmup_steps=5),
        parallel=ParallelOptions(global_batch_size=48, micro_batch_size=6, zero_stage=1),
        cluster=ClusterOptions(workers=workers, cpus_per_worker=1.0),
        recovery=RecoveryOptions(silence_s=SILENCE_S, grow_every_s=3.0),
        train=TrainOptions(steps=steps, log_every=1, checkpoint_every=SAVE_EVERY, keep_last=3),
        evaluation=EvaluationOptions(ks=(5, 10), beam_size=12, max_users=20),
        tracking=TrackingOptions(wandb="disabled"),
    )
    prepare(config.data)
    tokenize(config)
    return config


def run_faults(folder: Path, faults: list[str], seed: int) -> list[Recovery]:
    """Train on 2 ranks through all faults; raises AssertionError unless the end equals the undisturbed run's."""
    config = make_job(folder / "data", workers=2, steps=STEPS_PER_FAULT * len(faults) + 20)
    calm = undisturbed(config, folder / "calm", ranks=2)
    scene = Scene(config, folder / "stormy", nodes=2, seed=seed)
    recoveries = []
    try:
        with small_disk(scene.run / "checkpoints", wanted="fill_disk" in faults):
            scene.start_driver()
            for number, name in enumerate(faults, start=1):
                recoveries.append(suffer(scene, name))
                print(f"{number}/{len(faults)}  {describe(recoveries[-1])}", flush=True)
            scene.finish()
            assert_equal(calm, scene.config)
            assert samples_by_step(folder / "calm") == samples_by_step(folder / "stormy"), "other samples"
    finally:
        scene.close()
    return recoveries


def suffer(scene: Scene, name: str) -> Recovery:
    """One fault at a random moment of training, and the wait until it is over."""
    attempts = len(scene.events("attempt_ended"))
    scene.wait_for_training(attempts)
    scene.wait_for_checkpoint(time.time() - 30)
    time.sleep(scene.random.uniform(0, 1))
    step, begun = scene.step(), time.time()
    cost = FAULTS[name](scene)
    if cost == 0:
        scene.wait_for_checkpoint(time.time())
        return Recovery(name, step, None, None, None, round(time.time() - begun, 1))
    scene.wait(lambda: len(scene.events("training")) > attempts + cost, "training after the fault")
    ended = scene.events("attempt_ended")[attempts]["time"]
    running, training = (scene.events(event)[attempts + cost]["time"] for event in ("ranks_running", "training"))
    allowed = SILENCE_S if name == "stop_rank" else 0.0
    parts = (ended - begun - allowed, running - ended, training - running)
    return Recovery(name, step, *(round(part, 1) for part in parts), round(training - begun - allowed, 1))


def run_resizes(folder: Path, seed: int) -> dict[str, Any]:
    """4 ranks, then 2 of them with their node gone, then 4 again; the same samples, and the same losses to 1e-4."""
    config = make_job(folder / "data", workers=4, steps=120, builders=0)
    config = replace(config, recovery=replace(config.recovery, min_workers=2))
    config = replace(config, model=replace(config.model, dropout=0.0))  # its draws depend on the rank
    calm = undisturbed(config, folder / "calm", ranks=4)
    scene = Scene(config, folder / "stormy", nodes=2, seed=seed)
    try:
        scene.start_driver()
        scene.wait_for_training(0)
        scene.wait_for_checkpoint(0.0)
        victim = scene.nodes.pop()
        scene.cluster.remove_node(victim, allow_graceful=False)
        scene.wait_for_training(1)
        scene.wait_for_checkpoint(time.time())
        scene.nodes.append(scene.add_node())
        scene.finish()
        sizes = [record["world_size"] for record in scene.events("attempt_started")]
        assert sizes == [4, 2, 4], sizes
        assert samples_by_step(folder / "calm") == samples_by_step(folder / "stormy"), "other samples"
        ours, theirs = losses(scene.config), losses(calm)
        assert ours.keys() == theirs.keys()
        worst = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
        assert worst < 1e-4, worst
        return {"sizes": sizes, "steps": len(samples_by_step(folder / "stormy")), "largest relative difference": worst}
    finally:
        scene.close()


def assert_equal(calm: RunConfig, stormy: RunConfig) -> None:
    """Every tensor of the last checkpoint, and every loss of the log, bit for bit."""
    assert losses(calm) == losses(stormy), "other losses"
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(last_checkpoint(config) / name) for config in (stormy, calm))
        assert ours.keys() == theirs.keys()
        different = [tensor for tensor in theirs if not torch.equal(ours[tensor], theirs[tensor])]
        assert not different, f"{name}: {different[:3]}"


def last_checkpoint(config: RunConfig) -> Path:
    return run_folder(config) / "checkpoints" / f"step_{config.train.steps:08d}"


def losses(config: RunConfig) -> dict[int, float]:
    """Of the log, which has one value a step."""
    lines = (run_folder(config) / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    found = {record["step"]: record["loss"] for record in records}
    assert len(found) == len(records), "two values for one step"
    return found


@contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """A file system of its own in this folder, which can be full; needs root."""
    folder.mkdir(parents=True, exist_ok=True)
    if wanted:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if wanted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def describe(recovery: Recovery) -> str:
    """A line of the table."""
    begin = f"{recovery.fault:16} at step {recovery.step:4}"
    if recovery.detected_s is None:
        return f"{begin}: training went on; the next checkpoint after {recovery.total_s} s"
    return (
        f"{begin}: training again after {recovery.total_s:5.1f} s (noticed "
        f"{recovery.detected_s:.1f}, ranks started {recovery.started_s:.1f}, first step {recovery.first_step_s:.1f})"
    )


def main() -> None:
    """Runs faults in a seeded order, each kind as often as the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=list(FAULTS), help="these kinds instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-resizes", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    import random

    kinds = options.only or list(FAULTS)
    faults = [kinds[number % len(kinds)] for number in range(options.faults)]
    random.Random(options.seed).shuffle(faults)
    begun = time.time()
    with tempfile.TemporaryDirectory(prefix="onetrain-chaos-") as folder:
        recoveries = run_faults(Path(folder) / "faults", faults, options.seed) if faults else []
        resizes = None if options.no_resizes else run_resizes(Path(folder) / "resizes", options.seed)
    restarts = [recovery.total_s for recovery in recoveries if recovery.detected_s is not None]
    if restarts:
        print(
            f"{len(recoveries)} faults, {len(restarts)} restarts: training again after "
            f"{statistics.median(restarts):.1f} s in the median, {max(restarts):.1f} s at worst; losses, weights, "
            "moments and samples equal the undisturbed run's bit for bit"
        )
    if resizes:
        print(
            f"ranks {resizes['sizes']}: the same samples, losses equal to {resizes['largest relative difference']:.1e}"
        )
    print(f"{time.time() - begun:.0f} s in all")
    if options.json:
        figures = {"recoveries": [asdict(recovery) for recovery in recoveries], "resizes": resizes}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
