"""How long training stands still for a checkpoint, and how much it slows down while one is written beside it.

Two ranks on CPU train a stack of linear layers with AdamW at ZeRO stage 1. In every repetition, in a new order,
each arm saves once: `onetrain` in the foreground and in the background, and the peer `torch.distributed.checkpoint`
(save and async_save) with the same tensors, every rank its own partitions of masters and moments: as many bytes,
but of this world size only. `blocked` is how long the call kept training waiting. Then steps are made until the
write has ended, and some after it: `step writing` and `step alone` are their means. `write` is from the call to the
end. All files go to one folder, whose disk is part of the machine. Usage:

    python benchmarks/async_save.py [--parameters 60] [--repetitions 3] [--folder FOLDER]

Writes every figure with versions and machine, and prints the table: means, with the extremes of `blocked`.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from records import report
from torch import Tensor, nn

from onetrain.parallel.checkpoint_saver import CheckpointSaver, snapshot_of
from onetrain.parallel.checkpoint_store import FolderStore
from onetrain.parallel.engine import Engine
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks, all_reduce_max
from onetrain.parallel.testing import WorkerPool

WIDTH, ROWS = 1024, 16
STEPS_ALONE = 5
FILES = ("model.safetensors", "optimizer.safetensors")
Arm = Callable[[Path, int], Callable[[], bool]]  # saves, and returns whether the write has ended


class Stack(nn.Module):
    """So many linear layers with residuals."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, width) to the same."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def step(engine: Engine) -> float:
    """Seconds of one step, of the slower rank."""
    generator = torch.Generator().manual_seed(engine.step * 2 + engine.ranks.rank)
    batch = torch.randn(ROWS, WIDTH, generator=generator)
    begun = time.perf_counter()
    engine.train_step(
        [batch], lambda m, b: (m(b).square().mean(1).sum(), torch.tensor(float(ROWS)), {}), lambda b: ROWS
    )
    return all_reduce_max(time.perf_counter() - begun, engine.ranks)


def arms(engine: Engine) -> dict[str, Arm]:
    """What saves, by name."""
    savers: dict[Path, CheckpointSaver] = {}

    def ours(mode: Any) -> Arm:
        def save(folder: Path, number: int) -> Callable[[], bool]:
            saver = savers.setdefault(folder, CheckpointSaver(engine, FolderStore(folder)))
            saver.save(f"{mode}{number}", {}, mode)
            told: list = []

            def ended() -> bool:
                told.extend(saver.outcomes())
                if any(outcome.problem for outcome in told):
                    raise RuntimeError(told[-1].problem)
                return bool(told)

            return ended

        return save

    group = dist.new_group(backend="gloo")

    def peer(background: bool) -> Arm:
        def save(folder: Path, number: int) -> Callable[[], bool]:
            rank, flats = engine.ranks.rank, snapshot_of(engine).flats
            state = {f"{kind}.{i}.{rank}": t for i, f in enumerate(flats) for kind, t in f.tensors(engine).items()}
            place = folder / f"peer{background}{number}"
            if not background:
                dcp.save(state, checkpoint_id=place)
                return lambda: True
            return dcp.async_save(state, checkpoint_id=place, process_group=group).done

        return save

    return {
        "onetrain, foreground": ours("sync"),
        "onetrain, background": ours("async"),
        "torch.distributed.checkpoint.save": peer(False),
        "torch.distributed.checkpoint.async_save": peer(True),
    }


def measure(ranks: Ranks, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every save of every arm; the result of rank 0 counts."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    model = Stack(round(options.parameters * 1e6 / (WIDTH * WIDTH)))
    parallel = ParallelOptions(global_batch_size=2 * ROWS, zero_stage=1)
    engine = Engine(model, parallel, OptimizerOptions("adamw", 1e-4, warmup_steps=1), ranks, 10_000)
    for _ in range(3):
        step(engine)
    measured, own = [], arms(engine)
    for number in range(-1, options.repetitions):  # the first one makes buffers, and is told apart
        order = list(own)
        random.Random(number).shuffle(order)
        for name in order:
            dist.barrier()
            begun = time.perf_counter()
            ended = own[name](options.folder, number)
            blocked = all_reduce_max(time.perf_counter() - begun, ranks)
            writing: list[float] = []
            while all_reduce_max(0.0 if ended() else 1.0, ranks):
                writing.append(step(engine))
            write = all_reduce_max(time.perf_counter() - begun, ranks)
            alone = [step(engine) for _ in range(STEPS_ALONE)]
            measured.append({"arm": name, "number": number, "blocked": blocked, "write": write})
            measured[-1] |= {"writing": writing, "alone": alone}
            if ranks.is_main:  # all have ended, and begin the next one together: the disk needs room for one only
                for folder in options.folder.iterdir():
                    shutil.rmtree(folder)
    # the same state in both ways, to the same bytes
    saver = CheckpointSaver(engine, FolderStore(options.folder))
    for mode in ("sync", "async"):
        saver.save(f"equal_{mode}", {}, mode)  # type: ignore[arg-type]
    saver.finish()
    engine.close()
    return measured


def mean(values: list[float]) -> float:
    """NaN of none."""
    return sum(values) / len(values) if values else float("nan")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parameters", type=float, default=60, help="millions")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="to write the checkpoints in; a temporary one")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/async_save.json"))
    options = parser.parse_args()
    options.folder = Path(tempfile.mkdtemp(prefix="async_save.", dir=options.folder))
    try:
        with WorkerPool(2, timeout_s=3600) as pool:
            measured = pool.run(measure, options)[0]
        folders = [options.folder / f"equal_{mode}" for mode in ("sync", "async")]
        headers = [json.loads((folder / "state.json").read_text())["files"] for folder in folders]
        size = sum(file["bytes"] for file in headers[0].values())
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    foreground = mean([m["blocked"] for m in measured if m["number"] >= 0 and m["arm"] == "onetrain, foreground"])
    records = []
    for name in dict.fromkeys(m["arm"] for m in measured):
        own = [m for m in measured if m["arm"] == name and m["number"] >= 0]
        blocked = [m["blocked"] for m in own]
        alone, writing = mean([s for m in own for s in m["alone"]]), mean([s for m in own for s in m["writing"]])
        records.append(
            {
                "arm": name,
                "blocked_s": mean(blocked),
                "least": min(blocked),
                "most": max(blocked),
                "of_foreground": mean(blocked) / foreground,
                "first_s": next(m["blocked"] for m in measured if m["arm"] == name and m["number"] < 0),
                "write_s": mean([m["write"] for m in own]),
                "step_alone_s": alone,
                "step_writing_s": writing,
                "MB": size / 1e6,
                "same_bytes": headers[0] == headers[1] if name.startswith("onetrain") else None,
            }
        )
    report("saving a checkpoint", sorted(records, key=lambda record: record["arm"]), options)


if __name__ == "__main__":
    main()
