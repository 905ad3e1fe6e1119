"""Golden runs: every parallel mix against one process, step by step, in one table. Usage:

    python benchmarks/golden.py [--only "EP2 x DP2" ...]

30 steps in fp32 on CPU with gloo, dropout 0, AdamW and SGD with active clipping, from the same initial weights and the
same global batches; the cases and what is compared are in tests/parallel/golden.py. Writes
runs/benchmarks/golden.json with versions and machine, prints the table, and ends with 1 where a bound is broken.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from onetrain.launcher.console import print_message, print_table
from onetrain.launcher.environment import environment

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parallel"))

from golden import OPTIMIZERS, Row
from golden_table import BOUND, broken, table

COLUMNS = ["run", "model", "optimizer", "ranks", "loss", "gradient norm", "weights", "bound", "routing decisions"]


def cells(row: Row) -> list[str | float]:
    """One line of the table."""
    routing = f"{row.flips} of {row.decisions}" if row.decisions else "-"
    figures = [f"{value:.1e}" for value in (row.loss, row.norm, row.weights, row.tolerance.weights)]
    return [row.run, row.model, row.optimizer, row.ranks, *figures, routing]


def worst(rows: list[Row]) -> list[list[str | float]]:
    """One line for every run: the largest deviation over its models, weights by optimizer."""
    lines: list[list[str | float]] = []
    for run in dict.fromkeys(row.run for row in rows):
        own = [row for row in rows if row.run == run]
        figures = [max(row.loss for row in own), max(row.norm for row in own)]
        figures += [max(row.weights for row in own if row.optimizer == name) for name in OPTIMIZERS]
        decisions = sum(row.decisions for row in own)
        routing = f"{sum(row.flips for row in own)} of {decisions}" if decisions else "-"
        lines.append([own[0].ranks, run, *(f"{value:.1e}" for value in figures), routing])
    return lines


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/golden.json"))
    options = parser.parse_args()
    started = time.perf_counter()
    rows = table(options.only)
    title = f"worst deviation from one process over 30 steps; loss and gradient norm relative, bound {BOUND:.0e}"
    print_table(title, COLUMNS, [cells(row) for row in rows])
    columns = [
        "ranks",
        "run",
        "loss",
        "gradient norm",
        *(f"weights, {name}" for name in OPTIMIZERS),
        "routing decisions",
    ]
    print_table("worst over the models of a run", columns, worst(rows))
    for reason in dict.fromkeys(f"bound {row.tolerance.weights:.0e}: {row.tolerance.reason}" for row in rows):
        print_message(reason)
    print_message(f"{len(rows)} runs, {time.perf_counter() - started:.0f} s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"rows": [row._asdict() for row in rows], "environment": environment()}
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    problems = [problem for row in rows for problem in broken(row)]
    for problem in problems:
        print_message(problem)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
