"""How long a consumer that takes a fixed number of sequences a second waits for its data.

Reads the prepared folder that benchmarks/data_service.py made (or any of its kind), in process, as a rank does: the
consumer takes a step of 512 histories, "trains" until its time is up (asleep, or computing with `--busy`, which
competes with the builders for processors), and takes the next.

    OMP_NUM_THREADS=1 python benchmarks/data_wait.py runs/data_service/200000/ours [--per-second 20000] [--busy]
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from data_service_peers import ours
from data_service_peers.histories import BATCH

from onetrain.data.cursor import Cursor
from onetrain.data.steps import StepBuilder
from onetrain.data.stream import LocalStream


def main() -> None:
    """Print the share of time that was spent waiting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-second", type=float, default=20_000.0)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--busy", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = ours.spec(options.folder)
    spec = replace(spec, stream=replace(spec.stream, builder_threads=options.threads))
    builder, period = StepBuilder(spec), BATCH / options.per_second
    cursor, waits, work = Cursor().updated(builder.sources.newest()), [], torch.randn(64, 64)
    begun = time.perf_counter()
    for step in LocalStream(builder, 0).steps(options.steps, cursor):
        waits.append(step.waited_s)
        due = time.perf_counter() + period
        while (left := due - time.perf_counter()) > 0:
            if options.busy:
                work = torch.tanh(work @ work)
            else:
                time.sleep(left)
    seconds = time.perf_counter() - begun
    print(
        f"{options.per_second:,.0f} sequences/s wanted, {BATCH * len(waits) / seconds:,.0f} taken; waited "
        f"{sum(waits) / seconds:.2%} of {seconds:.1f} s, {sum(waits[1:]) / seconds:.2%} without the first step; "
        f"longest wait after it {1e3 * max(waits[1:]):.1f} ms"
    )


if __name__ == "__main__":
    main()
