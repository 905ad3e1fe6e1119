"""Loaded by every Python process of a chaos run: traces what ranks train on, and makes the disk slow when asked to.

$CHAOS_FOLDER/slow: while that file exists, every fsync takes so many seconds. $CHAOS_STEP_S: by how much a step takes
longer, so that a fast machine is not done before all faults are. $CHAOS_FOLDER/trace/: for each training process, one
line a step: [step, fingerprints of the samples of this rank].
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path

FOLDER = Path(os.environ.get("CHAOS_FOLDER", "/nonexistent"))
TARGET = "onetrain.parallel.engine"
_fsync = os.fsync


def slow_fsync(descriptor: int) -> None:
    if (FOLDER / "slow").exists():
        time.sleep(float((FOLDER / "slow").read_text() or 1))
    _fsync(descriptor)


class TraceTraining(importlib.abc.MetaPathFinder):
    """Wraps Engine.train_step once its module is imported."""

    def find_spec(self, name, path, target=None):
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            trace(module.Engine)

        spec.loader.exec_module = exec_module
        return spec


def trace(engine_class) -> None:
    import xxhash

    def rows(batch):
        for row in range(batch.rows):
            if float(batch.weight_BT[row].sum()) == 0:  # padding
                continue
            digest = xxhash.xxh3_64()
            for name in sorted(batch.sequences):
                events = batch.sequences[name]
                digest.update(events.sid_BNL[row, : int(events.length_B[row])].contiguous().numpy().tobytes())
            real = batch.weight_BT[row] > 0
            digest.update(batch.target_sid_BTL[row][real].contiguous().numpy().tobytes())
            digest.update(batch.target_item_BT[row][real].contiguous().numpy().tobytes())
            yield digest.hexdigest()

    plain = engine_class.train_step
    (FOLDER / "trace").mkdir(exist_ok=True)
    from onetrain.cluster.beacon import BEACON

    def train_step(self, micro_batches, *args, **kwargs):
        time.sleep(float(os.environ.get("CHAOS_STEP_S", "0")))
        result = plain(self, micro_batches, *args, **kwargs)
        with (FOLDER / "trace" / f"{BEACON.attempt or 1:04d}_{os.getpid()}").open("a") as file:
            file.write(json.dumps([self.step, sorted(h for batch in micro_batches for h in rows(batch))]) + "\n")
        return result

    engine_class.train_step = train_step


if "CHAOS_FOLDER" in os.environ:
    os.fsync = slow_fsync
    sys.meta_path.insert(0, TraceTraining())
