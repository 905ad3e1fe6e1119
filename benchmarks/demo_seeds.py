"""The demo over several seeds: does the model beat the best counting floor by the promised factor every time?

Each seed simulates another shop, initialises another model and draws another order. Usage:

    python benchmarks/demo_seeds.py [--seeds 0 1 2] [--config configs/demo.yaml] [--folder runs/demo_seeds]

Writes <folder>/summary.json with versions and machine, and prints the table.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from onetrain.launcher.console import print_table
from onetrain.launcher.environment import environment

METRIC = "recall@10"
PROMISED = 1.2


def run_seed(config: str, folder: Path, seed: int) -> dict[str, float]:
    """One whole job, raw logs to table; returns seconds and the metric of every row of the evaluation."""
    name = f"seed_{seed}"
    settings = {
        "name": name,
        "seed": seed,
        "storage_path": folder,
        "data.prepared": folder / name / "prepared",
        "data.source.events": folder / name / "logs",
        "data.source.simulator.seed": seed,
        "tracking.wandb": "disabled",
    }
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    started = time.perf_counter()
    for verb in ("prepare", "tokenize", "train", "evaluate"):
        subprocess.run([sys.executable, "-m", "onetrain.launcher.cli", verb, config, *overrides], check=True)
    seconds = time.perf_counter() - started
    record = json.loads((folder / name / "evaluation_test.json").read_text())
    return {"seconds": seconds, **{who: subsets["all"][METRIC] for who, subsets in record["results"].items()}}


def main() -> None:
    """Run all seeds and print one row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_seeds"))
    options = parser.parse_args()
    results = {seed: run_seed(options.config, options.folder, seed) for seed in options.seeds}
    rows: list[list[float]] = []
    for seed, result in results.items():
        floor = max(result["popularity"], result["last-item transitions"])
        result["ratio"] = result["model"] / floor
        rows.append([seed, floor, result["model"], result["oracle (ceiling)"], result["ratio"], result["seconds"]])
    ratios = [result["ratio"] for result in results.values()]
    summary = {"metric": METRIC, "promised": PROMISED, "seeds": results, "environment": environment()}
    (options.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    notes = [f"model over best floor: {min(ratios):.2f} at least, {statistics.mean(ratios):.2f} ± {spread:.2f}"]
    print_table(
        f"{options.config}, {METRIC}", ["seed", "best floor", "model", "ceiling", "ratio", "seconds"], rows, notes
    )
    if min(ratios) < PROMISED:
        raise SystemExit(f"a seed stays below {PROMISED} times its best floor")


if __name__ == "__main__":
    main()
