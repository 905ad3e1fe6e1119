"""Where the time of an expert-parallel step goes: computing, exchanging tokens, waiting for the other ranks.

Ranks on this machine over gloo train a lazy decoder with sparse blocks, once plainly (the step time) and once with a
barrier before every all-to-all: the time in the barrier is waiting, that in the all-to-all is exchange, and the rest is
computing and the other collectives. Bytes are those that leave a rank, held against what the routing asks for. Beside
it the same model on as many data-parallel ranks, each with all experts, in the same run. Usage:

    python benchmarks/expert_parallel.py [--ranks 2] [--steps 10] [--targets 64 512] [--zero 0 2] [--precision fp32]

Writes runs/benchmarks/expert_parallel.json with versions and machine, and prints the table. Ranks share the cores of
one machine, one thread each: the shares are of this machine, not of a cluster's network.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from records import report
from torch import Tensor, nn

from onetrain.launcher.console import print_message
from onetrain.model.build import build
from onetrain.model.decoder import SidDecoder
from onetrain.model.inputs import Context, Events, Targets
from onetrain.model.loss import training_loss
from onetrain.model.options import ModelOptions, MoEOptions, Vocabulary
from onetrain.parallel.engine import Engine
from onetrain.parallel.options import OptimizerOptions, ParallelOptions
from onetrain.parallel.process_group import Ranks
from onetrain.parallel.testing import WorkerPool

EVENTS, SLOTS, WARM = 64, 4, 2
VOCABULARY = Vocabulary(codes=(256, 256, 256), features={"item": 5000}, pathways={"history": EVENTS})
OPTIONS = ModelOptions(
    d_model=256,
    n_layers=4,
    n_heads=8,
    g_kv=2,
    embed_dim=32,
    moe=MoEOptions(16, 2, shared=1, d_expert=256, first_dense=1),
)
Batch = tuple[Context, Targets]


@dataclass
class Exchange:
    """What the all-to-alls of some steps did on one rank."""

    wait_s: float = 0.0
    exchange_s: float = 0.0
    sent_bytes: int = 0  # to other ranks
    calls: int = 0
    steps: list[float] = field(default_factory=list)  # seconds of each step


@contextmanager
def watched(found: Exchange, ranks: Ranks) -> Iterator[None]:
    """Counts and times every all-to-all inside, each behind a barrier."""
    from deepspeed import comm

    original = comm.all_to_all_single

    def timed(output: Tensor, tokens: Tensor, *args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        dist.barrier()
        met = time.perf_counter()
        result = original(output, tokens, *args, **named)
        found.exchange_s += time.perf_counter() - met
        found.wait_s += met - started
        splits = named.get("input_split_sizes") or [len(tokens) // ranks.world_size] * ranks.world_size
        rows = sum(rows for rank, rows in enumerate(splits) if rank != ranks.rank)
        found.sent_bytes += rows * tokens[:1].numel() * tokens.element_size()
        found.calls += 1
        return result

    comm.all_to_all_single = timed
    try:
        yield
    finally:
        comm.all_to_all_single = original


def random_batch(rows: int, seed: int) -> Batch:
    """Full histories and targets that see all of them."""
    g = torch.Generator().manual_seed(seed)

    def sids(*shape: int) -> Tensor:
        return torch.stack([torch.randint(codes, shape, generator=g) for codes in VOCABULARY.codes], dim=-1)

    index_BN = torch.arange(EVENTS).repeat(rows, 1)
    item = {"item": torch.randint(5000, (rows, EVENTS), generator=g)}
    events = Events(sids(rows, EVENTS), index_BN, torch.full((rows,), EVENTS), item)
    targets = Targets(sids(rows, SLOTS), torch.full((rows, SLOTS), EVENTS), torch.ones(rows, SLOTS))
    return Context({"history": events}), targets


def loss_fn(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As the training loop's."""
    assert isinstance(module, SidDecoder)
    return training_loss(module(*batch), OPTIONS)


def weight_fn(batch: Batch) -> float:
    """Every target counts once."""
    return float(batch[1].weight_BT.sum())


def train(ranks: Ranks, parallel: ParallelOptions, rows: int, steps: int) -> tuple[Exchange, Exchange]:
    """(plain steps, watched steps) of this rank."""
    torch.manual_seed(0)
    engine = Engine(build(OPTIONS, VOCABULARY), parallel, OptimizerOptions(), ranks, 1000)
    plain, split = Exchange(), Exchange()
    for number in range(WARM + steps):
        for found, watch in ((plain, False), (split, True)):
            batch = random_batch(rows, 1000 * number + ranks.rank)
            dist.barrier()
            counted = Exchange() if number < WARM else found
            started = time.perf_counter()
            if watch:
                with watched(counted, ranks):
                    engine.train_step([batch], loss_fn, weight_fn)
            else:
                engine.train_step([batch], loss_fn, weight_fn)
            counted.steps.append(time.perf_counter() - started)
    engine.close()
    return plain, split


def measure(pool: WorkerPool, stage: int, targets: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """The lines of one ZeRO stage and batch: data parallel, then expert parallel."""
    rows = max(targets // SLOTS, 1)
    base = ParallelOptions(zero_stage=stage, precision=options.precision, global_batch_size=rows * options.ranks)  # type: ignore[arg-type]
    records: list[dict[str, object]] = []
    for degree in (1, options.ranks):
        parallel = ParallelOptions(**{**vars(base), "expert_parallel": degree})
        found = pool.run(partial(train), parallel, rows, options.steps)
        plain, split = found[0]
        step_s = statistics.median(plain.steps)
        watched_s = sum(split.steps)
        width = 2 if options.precision == "bf16" else 4
        choices = (
            rows * SLOTS * len(VOCABULARY.codes) * OPTIONS.moe.top_k * (OPTIONS.n_layers - OPTIONS.moe.first_dense)
        )
        asked = 4 * choices * OPTIONS.d_model * width * (degree - 1) / degree  # there and back, twice
        records.append(
            {
                "experts over": f"{degree} rank{'s' if degree > 1 else ''}",
                "zero": stage,
                "targets_per_rank": rows * SLOTS,
                "step_ms": step_s * 1e3,
                "spread_ms": (max(plain.steps) - min(plain.steps)) * 1e3,
                "compute_share": 1 - (split.wait_s + split.exchange_s) / watched_s,
                "exchange_share": split.exchange_s / watched_s,
                "wait_share": split.wait_s / watched_s,
                "all_to_alls": split.calls // options.steps,
                "sent_mib": statistics.mean(s.sent_bytes for _, s in found) / options.steps / 2**20,
                "even_routing_mib": asked / 2**20,
                "ep_over_dp": step_s / float(records[0]["step_ms"]) * 1e3 if records else 1.0,  # type: ignore[arg-type]
            }
        )
    return records


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 512], help="per rank")
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/expert_parallel.json"))
    options = parser.parse_args()
    records: list[dict[str, object]] = []
    with WorkerPool(options.ranks, timeout_s=1800) as pool:
        for stage in options.zero:
            for targets in options.targets:
                print_message(f"ZeRO {stage}, {targets} targets per rank")
                records += measure(pool, stage, targets, options)
    title = f"{options.ranks} ranks over gloo, one thread each, {options.precision}: median of {options.steps} steps"
    report(title, records, options)


if __name__ == "__main__":
    main()
