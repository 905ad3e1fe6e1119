"""The planted long-range task: what attention still knows of one event that lies 2,000 to 8,000 events back.

One model, three attentions in its lifelong pathway: summary attention, attention to the same window alone, and full
attention as the ceiling. All train on young users first and on old ones then, with the same steps, data and order.
Usage:

    python benchmarks/planted.py [--only ksa window full] [--out runs/planted.json] [--figure docs/figures/planted.svg]

Level-1 accuracy is that of a target's second code given its first: 1 / variants for who does not remember.
"""

import argparse
import json
from pathlib import Path

from lifelong_users import FOLDER, curve, outcome, train_stages
from plots import Panel, svg
from records import report

from onetrain.launcher.config import run_folder
from onetrain.launcher.job import PreparedData, build_model

KEY = "model.ksa.lifelong"
ARMS = {
    "ksa": ("summary attention", []),
    "window": ("sliding window", [f"{KEY}.summaries=0"]),
    "full": ("full attention", [f"{KEY}.summaries=0", f"{KEY}.layers=[full, full]", f"{KEY}.window=1025"]),
}
STAGES = [FOLDER / "young.yaml", FOLDER / "planted.yaml"]
EDGES = ((8, 16, 24, 32, 48, 64, 129), (2000, 3000, 4500, 8001))  # of distances, young and old
MAX_EVENTS = 8200  # 1025 chunks of 8: the full arm's decoder reads every state


def run_arm(arm: str, seed: int) -> dict:
    """Train one arm in both stages and measure it; what is there is not repeated."""
    young, old = train_stages(STAGES, arm, seed, ARMS[arm][1])
    path = run_folder(old) / "planted.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    of_young, before, after = outcome(young, young), outcome(young, old), outcome(old, old)
    model = build_model(old, PreparedData.open(old))
    record = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "targets": len(after.distance_M),
        "young": of_young.accuracy[1],
        "old_untrained": before.accuracy[1],
        "old": after.accuracy[1],
        "alone_in_chunk": {"young": of_young.shared(True), "old": after.shared(True)},
        "beside_another": {"young": of_young.shared(False), "old": after.shared(False)},
        "by_distance": [*of_young.by_distance(EDGES[0]), *after.by_distance(EDGES[1])],
        "curve_young": curve(young),
        "curve_old": curve(old),
        "steps_young": young.train.steps,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def figure(records: dict[str, dict], chance: float) -> str:
    """Accuracy against the step, and on held-out users against the distance."""
    border = max(record["steps_young"] for record in records.values())
    stretch = 4  # steps on old users are few and dear
    curves = {
        ARMS[arm][0]: [*record["curve_young"], *((border + stretch * s, y) for s, y in record["curve_old"])]
        for arm, record in records.items()
    }
    by_distance = {ARMS[arm][0]: record["by_distance"] for arm, record in records.items()}
    accuracy = "accuracy of the second code"
    left = Panel(
        "While training: young users, then old ones (dashed)",
        f"optimizer step (x {stretch} right of the line)",
        accuracy,
        curves,
        level=chance,
        mark=border,
        x_ticks=(0, border / 2, border),
    )
    right = Panel(
        "Held-out users",
        "events from the deciding event to the request",
        accuracy,
        by_distance,
        log_x=True,
        level=chance,
        x_ticks=(10, 100, 1000, 8000),
        dots=True,
    )
    return svg([left, right])


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", type=int, default=8, help="of every theme: chance is 1 / variants")
    parser.add_argument("--out", type=Path, default=Path("runs/planted.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/planted.svg"))
    options = parser.parse_args()
    records = {arm: run_arm(arm, options.seed) for arm in options.only}
    rows = [
        {
            "attention": ARMS[arm][0],
            "parameters": record["parameters"],
            "young_users": record["young"],
            "old_users,_before_training_on_them": record["old_untrained"],
            "old_users": record["old"],
        }
        for arm, record in records.items()
    ]
    report("Planted task: accuracy of the second code, test users", rows, options)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    options.figure.write_text(figure(records, 1 / options.variants), encoding="utf-8")


if __name__ == "__main__":
    main()
