"""Quality of every architecture at one budget: each configuration of a folder, over several seeds.

All runs read the same prepared data and train the same number of samples; a seed sets initial weights, data order and
dropout. Usage:

    python benchmarks/variants.py configs/simulator [--seeds 0 1 2] [--jobs 2] [--only onelive onemall]

A run whose result is there is not repeated. Writes <storage_path>/variants.json with versions and machine, and prints
the table: mean and standard deviation over seeds on the test split.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from onetrain.launcher.config import load_config, run_folder
from onetrain.launcher.console import print_message, print_table
from onetrain.launcher.environment import environment
from onetrain.launcher.options import RunConfig

METRICS = ("recall@10", "ndcg@10", "loss")
RESULT = "variant.json"
REQUESTS = 5000  # of the test split, at most: the first of a shuffle that is the same for all


def load_variant(path: Path, seed: int) -> RunConfig:
    """The configuration of one run, under a name of its own."""
    config = load_config(path)
    return replace(
        config,
        name=f"{config.name}_seed_{seed}",
        seed=seed,
        tracking=replace(config.tracking, wandb="disabled"),
    )


def prepare_data(path: Path) -> None:
    """Prepare and tokenize what all configurations of a folder share, unless it is there."""
    from onetrain.data.prepare import prepare
    from onetrain.launcher.tokenize import tokenize

    config = load_config(path)
    if not (Path(config.data.prepared) / "sids").exists():
        prepare(config.data)
        tokenize(config)


def run_one(path: Path, seed: int) -> None:
    """Train and test one run in this process; leaves its result in the run's folder."""
    from onetrain.launcher.evaluate import evaluate
    from onetrain.launcher.job import PreparedData, build_model
    from onetrain.launcher.train import train
    from onetrain.model.flops import forward_flops

    config = load_variant(path, seed)
    data = PreparedData.open(config)
    model = build_model(config, data)
    blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith(("blocks", "encoder", "mtp")))
    total = sum(p.numel() for p in model.parameters())
    lengths = data.vocabulary(config).pathways
    former = config.model.query_formers
    seen = 1 + sum(former[name].queries if name in former else length for name, length in lengths.items())
    flops = forward_flops(config.model, data.vocabulary(config)).training(
        targets=1, target_positions=seen, rows=1, events=lengths
    )
    started = time.perf_counter()
    train(config)
    seconds = time.perf_counter() - started
    table = evaluate(config, "latest", "test", max_requests=REQUESTS)
    table.save(config)
    results: dict = table.record["results"]  # type: ignore[assignment]
    record = {
        "parameters": total,
        "block_parameters": blocks,
        "gflops_per_sample": flops / 1e9,
        "seconds": seconds,
        "results": {who: subsets["all"] for who, subsets in results.items()},
    }
    (run_folder(config) / RESULT).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def spawn(path: Path, seed: int) -> None:
    """`run_one` in a process of its own with one thread; its output goes to the run's folder."""
    folder = run_folder(load_variant(path, seed))
    if (folder / RESULT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output.log").open("w") as log:
        command = [sys.executable, __file__, "--one", str(path), str(seed)]
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    state = "done" if done.returncode == 0 else f"FAILED, see {folder / 'output.log'}"
    print_message(f"{path.stem}, seed {seed}: {state}")


def report(paths: list[Path], seeds: list[int]) -> None:
    """Print mean and deviation over seeds, and write the summary."""
    rows: list[list[str | float]] = []
    summary: dict[str, object] = {}
    folder = Path()
    for path in paths:
        files = [run_folder(load_variant(path, seed)) / RESULT for seed in seeds]
        runs = [json.loads(file.read_text()) for file in files if file.exists()]
        folder = files[0].parent.parent
        if not runs:
            continue
        row: list[str | float] = [path.stem, len(runs), f"{runs[0]['block_parameters']:,}"]
        row.append(f"{runs[0]['gflops_per_sample']:.3f}")
        for metric in METRICS:
            values = [run["results"]["model"][metric] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.mean(values):.4f} ± {spread:.4f}")
        rows.append(row)
        summary[path.stem] = runs
    others = next(iter(summary.values()))[0]["results"] if summary else {}  # type: ignore[index]
    for who, means in others.items():
        if who != "model":
            rows.append([who, "", "", "", *(f"{means[metric]:.4f}" if metric in means else "" for metric in METRICS)])
    columns = ["variant", "seeds", "block parameters", "GFLOPs per sample", *METRICS]
    print_table(f"{folder.name}: test split, mean ± standard deviation", columns, rows)
    (folder / "variants.json").write_text(
        json.dumps({"variants": summary, "environment": environment()}, indent=1) + "\n", encoding="utf-8"
    )


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--one", nargs=2, metavar=("CONFIG", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(Path(options.one[0]), int(options.one[1]))
        return
    paths = sorted(path for path in options.folder.glob("*.yaml") if not options.only or path.stem in options.only)
    prepare_data(paths[0])
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in options.seeds:  # all variants of a seed before the next
            for path in paths:
                pool.submit(spawn, path, seed)
    report(paths, options.seeds)


if __name__ == "__main__":
    main()
