"""Peak tensor memory of real training steps on CPU, against what `onetrain plan` predicts.

Method: while the engine makes optimizer steps, a TorchDispatchMode sees every tensor that an operation makes or reads.
It adds up the bytes of their storages, each once, from when it first appears until it is freed (a weak reference to
the storage tells), and keeps the highest sum of the last step, of rank 0. What a kernel allocates and frees inside one
operation, and what gloo does in its own threads, is not seen; on one machine the offloaded state counts as well.

The plan is that of the same configuration with no reserve and the CPU's kernels. Usage:

    python benchmarks/memory.py [--only TEXT] [--out runs/benchmarks/memory.json]

Writes every figure with versions and machine, and prints the table.
"""

import argparse
import gc
import json
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from onetrain.data.options import BatchOptions
from onetrain.launcher.console import print_message, print_table
from onetrain.launcher.environment import environment
from onetrain.launcher.options import ClusterOptions, PlanOptions, RunConfig
from onetrain.launcher.plan_memory import rank_memory
from onetrain.model.build import build
from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.loss import LossParts, training_loss
from onetrain.model.options import ModelOptions, MoEOptions, Vocabulary
from onetrain.parallel.engine import Engine
from onetrain.parallel.options import ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

EVENTS, SLOTS, ROWS = 63, 4, 48  # of a pathway, targets of a row, rows of a micro batch
VOCABULARY = Vocabulary(codes=(4096, 4096, 4096), features={}, pathways={"history": EVENTS})
DENSE = ModelOptions(d_model=128, n_layers=6, n_heads=4, embed_dim=32)
SPARSE = replace(DENSE, moe=MoEOptions(experts=6, top_k=2, shared=1, d_expert=256, first_dense=1))
MODELS = {"dense": DENSE, "sparse": SPARSE}
BUCKET = 500_000  # elements; the default of 50 million is larger than these models
SMALL_BUCKETS = {
    "zero_optimization": {
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": BUCKET,
        "stage3_max_reuse_distance": BUCKET,
    }
}
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "checkpoint_blocks all": {"checkpoint_blocks": "all"},
    "loss_chunk 32": {"loss_chunk": 32},
    "both": {"checkpoint_blocks": "all", "loss_chunk": 32},
}
Batch = tuple[Context, Targets]


class PeakMemory(TorchDispatchMode):
    """Bytes of all live storages that operations have touched, and the most there have been since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def restart(self) -> None:
        """Counts everything that is alive, and forgets the peak."""
        gc.collect()
        for thing in gc.get_objects():
            if isinstance(thing, Tensor):
                self.note(thing)
                if thing.is_leaf and thing.grad is not None:
                    self.note(thing.grad)
        self.peak = self.live

    def note(self, tensor: Tensor) -> None:
        """Adds a tensor's storage, if it is new."""
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        size = storage.nbytes()
        self.known[key] = weakref.ref(storage, lambda _: self._forget(key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        del self.known[key]
        self.live -= size

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result


def random_batch() -> Batch:
    """Full histories, and no padding among the targets: what the plan counts."""
    codes = [torch.randint(size, (ROWS, EVENTS)) for size in VOCABULARY.codes]
    index_BN = torch.arange(EVENTS).repeat(ROWS, 1)
    events = Events(torch.stack(codes, -1), index_BN, torch.full((ROWS,), EVENTS), {})
    sid_BTL = torch.stack([torch.randint(size, (ROWS, SLOTS)) for size in VOCABULARY.codes], -1)
    targets = Targets(sid_BTL, torch.full((ROWS, SLOTS), EVENTS), torch.ones(ROWS, SLOTS))
    return Context({"history": events}), targets


def peak_of_step(ranks: Ranks, model: ModelOptions, options: ParallelOptions) -> int:
    """Bytes of rank 0 in the third optimizer step, of two micro batches."""
    warnings.simplefilter("ignore")
    gc.collect()
    torch.manual_seed(0)
    memory = PeakMemory()
    before = memory.live

    def loss_fn(module: nn.Module, batch: Batch) -> LossParts:
        assert isinstance(module, SidDecoder)
        return training_loss(module(*batch), model, options.loss_chunk)

    def weight_fn(batch: Batch) -> float:
        return float(batch[1].weight_BT.sum())

    memory.restart()
    before = memory.live  # of earlier cases: nothing that this one can free
    engine = Engine(build(model, VOCABULARY), options, run_config(model, options, 1).optimizer, ranks, 10)
    batches = [random_batch() for _ in range(engine.mesh.accumulation_steps)]
    engine.train_step(batches, loss_fn, weight_fn)
    engine.train_step(batches, loss_fn, weight_fn)
    with memory:
        memory.restart()
        engine.train_step(batches, loss_fn, weight_fn)
    engine.close()
    return memory.peak - before


def run_config(model: ModelOptions, options: ParallelOptions, workers: int) -> RunConfig:
    """What `onetrain plan` would be asked."""
    return RunConfig(
        name="memory",
        batch=BatchOptions(max_context=EVENTS),
        model=model,
        parallel=options,
        cluster=ClusterOptions(workers=workers),
        plan=PlanOptions(targets_per_request=SLOTS, reserve_gib=0),
    )


def cases() -> list[tuple[str, str, int, ParallelOptions]]:
    """(model, what is special, ranks, options)."""
    found = []

    def add(name: str, words: str, ranks: int, **changes: Any) -> None:
        options = ParallelOptions(
            global_batch_size=ranks * 2 * ROWS // changes.get("tensor_parallel", 1),
            micro_batch_size=ROWS,
            deepspeed=SMALL_BUCKETS if changes.get("zero_stage") else {},
            **changes,
        )
        found.append((name, words, ranks, options))

    for name in MODELS:
        for ranks in (1, 2):
            for stage in (0, 1, 2, 3):
                add(name, "", ranks, zero_stage=stage)
        for words, changes in list(CHANGES.items())[1:]:
            add(name, words, 1, zero_stage=0, **changes)
            add(name, words, 2, zero_stage=3, **changes)
        for stage in (1, 2, 3):
            add(name, "bf16", 2, zero_stage=stage, precision="bf16")
            add(name, "offload", 2, zero_stage=stage, offload_optimizer=True)
    for stage in (0, 1, 2, 3):
        add("sparse", "expert_parallel 2", 2, zero_stage=stage, expert_parallel=2)
        add("dense", "tensor_parallel 2", 2, zero_stage=stage, tensor_parallel=2)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose description contains this text")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/memory.json"))
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    with WorkerPool(1, timeout_s=600) as one, WorkerPool(2, timeout_s=600) as two:
        for name, words, ranks, options in cases():
            case = f"{name}, {ranks} rank(s), ZeRO {options.zero_stage}{', ' * bool(words)}{words}"
            if arguments.only not in case:
                continue
            measured = (one if ranks == 1 else two).run(peak_of_step, MODELS[name], options)[0]
            plan = rank_memory(run_config(MODELS[name], options, ranks), VOCABULARY, on_cpu=True)
            planned = plan.total + plan.host
            record = {"case": case, "measured": measured, "planned": planned, "off": planned / measured - 1}
            records.append({**record, "parts": {**plan.device, "host": plan.host}})
            print_message(f"{case}: measured {measured / 1e6:.1f} MB, planned {planned / 1e6:.1f} MB")
    rows = [[r["case"], f"{r['measured'] / 1e6:.1f}", f"{r['planned'] / 1e6:.1f}", f"{r['off']:+.1%}"] for r in records]
    print_table("peak tensor memory of a rank, MB", ["case", "measured", "planned", "off"], rows)
    worst = max(abs(record["off"]) for record in records)
    print_message(f"largest difference {worst:.1%}")
    summary = {"rows": ROWS, "slots": SLOTS, "events": EVENTS, "cases": records, "environment": environment()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print_message(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
