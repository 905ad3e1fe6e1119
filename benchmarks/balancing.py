"""Loss-free balancing from a skewed router: expert load and loss with and without it, over seeds, on simulated data.

Every router starts with a preference for some experts: the mean of its input, times a factor that grows from expert to
expert, is added to its weights. Arms differ in model.moe.bias_rate alone. Usage:

    python benchmarks/balancing.py [configs/experts.yaml] [--seeds 0 1 2] [--steps 600] [--rates 0 0.001 0.003]

Writes runs/benchmarks/balancing.json with versions and machine, and prints the table: the largest load over the ideal
one (worst layer) at the start, at the end, and the step from which it stays below 1.2; training loss of the last 100
steps and loss on the validation split, mean and standard deviation over seeds.
"""

import argparse
import itertools
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from onetrain.data.cursor import Cursor
from onetrain.data.prepare import prepare
from onetrain.data.samples import SampleIndex
from onetrain.data.steps import StepBuilder
from onetrain.data.stream import LocalStream, Step
from onetrain.launcher.batch_loss import loss_of_batch
from onetrain.launcher.config import load_config
from onetrain.launcher.console import print_message, print_table
from onetrain.launcher.environment import environment
from onetrain.launcher.job import PreparedData, build_model, model_inputs, set_numerics
from onetrain.launcher.options import RunConfig
from onetrain.launcher.stream import stream_spec
from onetrain.launcher.tokenize import tokenize
from onetrain.model.moe import Router, routers
from onetrain.parallel import process_group
from onetrain.parallel.engine import Engine
from onetrain.parallel.mesh import Mesh
from onetrain.parallel.process_group import Ranks

WINDOW = 20  # steps whose loads are added up for one point of the curve
BALANCED = 1.2  # largest load over the ideal one
STRENGTH = 2.0  # of the skew: logits of the first and the last expert differ by about twice as much


def skew(model: nn.Module, step: Step, ranks: Ranks) -> None:
    """Makes every router prefer its last experts, whatever the token."""

    def lean(router: Router, inputs: tuple[Tensor]) -> None:
        mean_D = inputs[0].detach().flatten(0, -2).mean(0)
        factor_E = torch.linspace(-STRENGTH, STRENGTH, len(router.weight))
        with torch.no_grad():
            router.weight += factor_E[:, None] * mean_D / mean_D.square().sum()

    hooks = [router.register_forward_pre_hook(lean) for router in routers(model)]
    with torch.no_grad():
        model(*model_inputs(step.micro_batches[0], ranks.device))
    for hook in hooks:
        hook.remove()


def run(config: RunConfig, data: PreparedData, ranks: Ranks) -> dict[str, object]:
    """Trains one arm; its curves."""
    steps = StepBuilder(stream_spec(config, data, Mesh.plan(ranks.world_size, config.parallel)))
    stream, cursor = LocalStream(steps, 0), Cursor().updated(steps.sources.newest())
    model = build_model(config, data)
    skew(model, next(iter(stream.steps(1, cursor))), ranks)
    engine = Engine(model, config.parallel, config.optimizer, ranks, config.train.steps)
    losses, loads, curve = [], [], []
    for step in stream.steps(config.train.steps, cursor):
        result = engine.train_step(
            step.micro_batches, partial(loss_of_batch, device=ranks.device), lambda batch: batch.weight
        )
        losses.append(result.loss)
        loads.append(result.stats["expert_load"].sum(1))
        if len(loads) % WINDOW == 0:
            load_ZE = torch.stack(loads[-WINDOW:]).sum(0)
            curve.append(float((load_ZE.amax(1) / load_ZE.mean(1)).max()))
    engine.module.eval()
    valid = SampleIndex(data.reader, "valid", config.batch)
    total = weight = 0.0
    with torch.no_grad():
        for start in range(0, len(valid), 256):
            rows = valid.rows(range(start, min(start + 256, len(valid))))
            parts = loss_of_batch(engine.module, steps.builder.build(rows), ranks.device)
            total, weight = total + float(parts[0]), weight + float(parts[1])
    engine.close()
    return {"loss": losses, "load": curve, "valid_loss": total / weight}


def balanced_from(curve: list[float]) -> int | None:
    """The step from which the curve stays below BALANCED."""
    above = [point for point, value in enumerate(curve) if value >= BALANCED]
    point = above[-1] + 1 if above else 0
    return None if point == len(curve) else (point + 1) * WINDOW


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.4f}"


def main() -> None:
    """Runs every arm and seed, then reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/experts.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.001, 0.003])
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    base = load_config(arguments.config)
    if not (Path(base.data.prepared) / "sids").exists():
        prepare(base.data)
        tokenize(base)
    moe = replace(base.model.moe, sequence_loss=0.0, z_loss=0.0)
    parallel = replace(base.parallel, zero_stage=0, expert_parallel=1, micro_batch_size=None)
    base = replace(base, parallel=parallel, train=replace(base.train, steps=arguments.steps))
    set_numerics(base)
    data = PreparedData.open(base)
    ranks = process_group.start(60)
    arms: dict[float, list[dict]] = {}
    for rate, seed in itertools.product(arguments.rates, arguments.seeds):
        model = replace(base.model, moe=replace(moe, bias_rate=rate))
        result = run(replace(base, model=model, seed=seed), data, ranks)
        arms.setdefault(rate, []).append(result)
        load = result["load"]
        assert isinstance(load, list)
        print_message(f"bias_rate {rate}, seed {seed}: load {load[0]:.2f} to {load[-1]:.2f}")
    process_group.stop()
    rows: list[list[str | float]] = []
    for rate, results in arms.items():
        froms = [balanced_from(result["load"]) for result in results]
        rows.append(
            [
                rate,
                spread([result["load"][0] for result in results]),
                spread([result["load"][-1] for result in results]),
                ", ".join("never" if step is None else str(step) for step in froms),
                spread([statistics.mean(result["loss"][-100:]) for result in results]),
                spread([result["valid_loss"] for result in results]),
            ]
        )
    columns = ["bias_rate", "load, first steps", "load, last steps", f"below {BALANCED} from", "train loss"]
    print_table(
        f"{base.name}: largest expert load over the ideal, {arguments.steps} steps", [*columns, "valid loss"], rows
    )
    folder = Path("runs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    record = {"arms": {str(rate): results for rate, results in arms.items()}, "environment": environment()}
    (folder / "balancing.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
