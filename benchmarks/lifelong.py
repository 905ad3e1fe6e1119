"""What a lifelong pathway is worth on simulated lifelong users, over several seeds.

Targets need both ends of a history: the themes are those seen last, the variant was told once, long ago. Three models:
the short pathway alone, beside it a lifelong pathway of summary attention, and beside it a Query-Former over the same
events with as many FLOPs. All train on young users first and on old ones then, with the same steps, data and order.
Usage:

    python benchmarks/lifelong.py [--seeds 0 1 2] [--only short ksa query_former] [--out runs/lifelong.json]

Mean and standard deviation over seeds, on held-out old users.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from lifelong_users import FOLDER, outcome, train_stages

from onetrain.launcher.checkpoints import find_checkpoint
from onetrain.launcher.config import load_config, run_folder
from onetrain.launcher.console import print_table
from onetrain.launcher.environment import environment
from onetrain.launcher.evaluator import Evaluator
from onetrain.launcher.job import PreparedData, build_model
from onetrain.launcher.options import RunConfig
from onetrain.model.flops import forward_flops
from onetrain.model.ksa.sizes import stack_work
from onetrain.parallel import checkpoint as checkpoints
from onetrain.parallel import process_group

STAGES = [FOLDER / "pathways_young.yaml", FOLDER / "pathways.yaml"]
QUERY_FORMER = "{width: 64, heads: 4, blocks: 2, queries: QUERIES}"
QUERIES = 153  # as many FLOPs as the summary attention, at 3,000 events
METRICS = ("recall@4", "recall@8", "ndcg@8", "loss")


def changes(arm: str, queries: int) -> list[str]:
    """Of the configuration, which has the short pathway beside one of summary attention."""
    if arm == "short":
        return ["batch.pathways={short: {length: 24}}", "model.ksa={}"]
    if arm == "query_former":
        former = QUERY_FORMER.replace("QUERIES", str(queries))
        return ["model.ksa={}", "model.query_formers={lifelong: " + former + "}"]
    return []


def forward_mflops(config: RunConfig, data: PreparedData, events: int) -> float:
    """Of one request whose history has so many events, with its targets."""
    model, targets = config.model, config.data.source.lifelong.rebuys
    counts = {name: min(events, length) for name, length in data.vocabulary(config).pathways.items()}
    read = 1
    for name, count in counts.items():
        if name in model.ksa:
            read += stack_work(count, model.ksa[name]).read
        else:
            read += model.query_formers[name].queries if name in model.query_formers else count
    flops = forward_flops(model, data.vocabulary(config)).training(
        targets=targets, target_positions=targets * read, rows=1, events=counts
    )
    return flops / 3e6


def run_arm(arm: str, seed: int, queries: int, events: int) -> dict:
    """Train one arm in both stages and measure it; what is there is not repeated."""
    young, old = train_stages(STAGES, arm, seed, changes(arm, queries))
    path = run_folder(old) / "lifelong.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    data = PreparedData.open(old)
    model = build_model(old, data)
    checkpoints.load_weights(model, find_checkpoint(run_folder(old), "latest"))
    model.eval()
    evaluator = Evaluator(data, old, "test")
    cpu = torch.device("cpu")
    alone = process_group.Ranks(rank=0, world_size=1, local_rank=0, device=cpu, timeout_s=0)
    means = evaluator.run(evaluator.model_ranker(model, cpu), alone)["all"].means
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "mflops": forward_mflops(old, data, events),
        "young": outcome(young, young).accuracy,
        "old": outcome(old, old).accuracy,
        "means": means,
        "seconds": [json.loads((run_folder(config) / "seconds.json").read_text()) for config in (young, old)],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def mean_and_spread(values: list[float]) -> str:
    """Over seeds."""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"


def report(records: dict[str, list[dict]], options: argparse.Namespace) -> None:
    """Print the table, and write all records with versions and machine."""
    columns = [
        "pathways",
        "seeds",
        "parameters",
        "MFLOPs",
        "theme",
        "variant",
        *METRICS,
        "young: variant",
        "CPU s",
        "wall s",
    ]
    rows: list[list[str | float]] = []
    for arm, runs in records.items():
        values = {metric: [run["means"][metric] for run in runs] for metric in METRICS}
        values = {"theme": [run["old"][0] for run in runs], "variant": [run["old"][1] for run in runs], **values}
        values["young: variant"] = [run["young"][1] for run in runs]
        row: list[str | float] = [arm, len(runs), runs[0]["parameters"], f"{runs[0]['mflops']:.1f}"]
        row += [mean_and_spread(numbers) for numbers in values.values()]
        for clock in ("cpu", "wall"):
            row.append(f"{statistics.mean(sum(stage[clock] for stage in run['seconds']) for run in runs):.0f}")
        rows.append(row)
    print_table("Held-out old users", columns, rows)
    summary = {"options": {k: str(v) for k, v in vars(options).items()}, "records": records}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**summary, "environment": environment()}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = ("short", "ksa", "query_former")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=arms, default=list(arms))
    parser.add_argument("--queries", type=int, default=QUERIES, help="of the Query-Former")
    parser.add_argument("--events", type=int, default=3000, help="of the history whose FLOPs are counted")
    parser.add_argument("--out", type=Path, default=Path("runs/lifelong.json"))
    parser.add_argument("--flops", action="store_true", help="print the FLOPs alone")
    options = parser.parse_args()
    if options.flops:
        for arm in options.only:
            config = load_config(STAGES[-1], changes(arm, options.queries))
            print(arm, round(forward_mflops(config, PreparedData.open(config), options.events), 2))
        return
    runs = {
        (arm, seed): run_arm(arm, seed, options.queries, options.events)
        for seed in options.seeds  # all arms of a seed before the next
        for arm in options.only
    }
    report({arm: [runs[arm, seed] for seed in options.seeds] for arm in options.only}, options)


if __name__ == "__main__":
    main()
