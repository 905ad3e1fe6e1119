"""The figures of `onetrain plan` as tables for the console."""

from collections.abc import Callable
from typing import Any

from onetrain.launcher.plan import HistoryPlan, Plan
from onetrain.launcher.plan_memory import GIB
from onetrain.model.paper_flops import BATCH, PaperFigures

MIB = 1024**2
Table = tuple[str, list[str], list[list[Any]], list[str]]  # title, columns, rows, notes


def plan_tables(plan: Plan) -> list[Table]:
    """Parameters, FLOPs, context and activations, batches, memory."""
    tables = [_parameters(plan), _flops(plan), _context(plan)]
    if plan.histories:
        tables.append(_histories(plan.histories))
    if plan.paper is not None and plan.nominal_parameters is not None:
        tables.append(_convention(plan, plan.paper, plan.nominal_parameters))
    tables.append(_batches(plan))
    return tables if plan.memory is None else [*tables, _memory(plan)]


def _parameters(plan: Plan) -> Table:
    counts = plan.parameters
    rows: list[list[Any]] = [
        [part, total, counts.active_by_part[part], _share(total, counts.total)]
        for part, total in counts.total_by_part.items()
        if total
    ]
    rows.append(["decoder blocks (cross, self, ffn)", counts.blocks, counts.active_blocks, None])
    rows.append(["all", counts.total, counts.active, _share(1, 1)])
    codes = " x ".join(map(str, plan.vocabulary.codes))
    notes = [f"sizes from {plan.source}; {codes} codes", "active: of the routed experts only those that a token uses"]
    title = f"parameters of {plan.name}" + ("" if plan.preset is None else f" (preset {plan.preset})")
    return title, ["part", "total", "active", "share"], rows, notes


def _flops(plan: Plan) -> Table:
    rows: list[list[Any]] = [
        [part, count / 1e9, 3 * count / 1e9, _share(count, plan.forward_flops)]
        for part, count in plan.flops_by_part.items()
    ]
    rows.append(["all, as built", plan.forward_flops / 1e9, plan.training_flops / 1e9, _share(1, 1)])
    notes = [
        f"a request has {plan.positions} context positions, shared by {plan.targets_per_request:g} targets",
        "training: forward and backward, three times the forward; recomputation is not counted",
    ]
    return "GFLOPs per target", ["part", "forward", "training", "share"], rows, notes


def _context(plan: Plan) -> Table:
    width = plan.element_bytes
    lengths = ", ".join(f"{name} {length}" for name, length in plan.vocabulary.pathways.items())
    rows: list[list[Any]] = [
        ["context positions", plan.positions],
        ["key and value elements", round(plan.kv_elements)],
        ["key and value MiB", plan.kv_elements * width / MIB],
        *([f"activations of {part}, MiB", size / MIB] for part, size in plan.saved_by_part.items() if size),
        ["activations, MiB", plan.saved_bytes / MIB],
    ]
    notes = [
        f"sequences at full length ({lengths}; 1 static position), {plan.targets_per_request:g} targets",
        f"elements of {width} bytes; probabilities of the cross-entropy in fp32",
    ]
    return "one request: context and activations", ["", "value"], rows, notes


def _histories(histories: dict[str, HistoryPlan]) -> Table:
    def row(title: str, value: Callable[[HistoryPlan], Any]) -> list[Any]:
        return [title, *map(value, histories.values())]

    rows = [
        row("events", lambda one: one.events),
        row("positions that the decoder reads", lambda one: one.text_read + one.summaries_read),
        row("summaries among them", lambda one: one.summaries_read),
        row("score pairs of a head, millions", lambda one: one.pairs / 1e6),
        row("of those of full attention", lambda one: _share(one.pairs, one.full_pairs)),
        row("rows of keys and values in a cache", lambda one: one.cache_rows),
        row("of those of full attention", lambda one: _share(one.cache_rows, one.full_cache_rows)),
        row("cache, MiB", lambda one: one.cache_bytes / MIB),
    ]
    notes = ["pairs and rows of all layers of the pathway's stack, full attention in as many layers"]
    notes += [
        f"{name}: its window holds the whole history, so that no summary is ever read"
        for name, one in histories.items()
        if one.summaries_read == 0
    ]
    return "one full history of each lifelong pathway", ["", *histories], rows, notes


def _convention(plan: Plan, paper: PaperFigures, nominal: float) -> Table:
    requests = BATCH / plan.targets_per_request
    rows: list[list[Any]] = [
        ["parameters, billions", plan.parameters.active / 1e9, nominal / 1e9],
        ["training GFLOPs per target", plan.training_flops / 1e9, paper.gflops],
        [f"KV elements of {BATCH} targets, millions", requests * plan.kv_elements / 1e6, paper.kv_elements / 1e6],
        [
            f"activation elements of {BATCH} targets, billions",
            requests * plan.saved_bytes / plan.element_bytes / 1e9,
            paper.activations / 1e9,
        ],
    ]
    notes = [
        "the convention of OneRec-V2's Tables 2 to 4: nominal parameters (of experts the active ones) for each target "
        "token, attention scores, and the context linear that the targets of a request share; no heads"
    ]
    return "as built, and in OneRec-V2's convention", ["", "as built", "convention"], rows, notes


def _batches(plan: Plan) -> Table:
    targets = plan.global_batch_size * plan.targets_per_request
    rows: list[list[Any]] = [["ranks", plan.workers], ["samples (requests) per step", plan.global_batch_size]]
    if plan.mesh is not None:
        rows += [
            ["samples per rank and step, on average", plan.global_batch_size / plan.mesh.data_parallel],
            ["samples per micro batch, if rows are even", plan.mesh.micro_batch_size],
            ["micro batches accumulated", plan.mesh.accumulation_steps],
        ]
    rows += [
        ["targets per step", round(targets)],
        ["target tokens per step", round(targets * plan.vocabulary.levels)],
        ["TFLOPs per step", targets * plan.training_flops / 1e12],
        ["TFLOPs per step and rank", targets * plan.training_flops / 1e12 / plan.workers],
    ]
    notes = []
    if plan.train_events is not None:
        rows.append(["steps per pass over the training events, at most", plan.train_events / targets])
        notes.append("every training event a target; fewer with batch.target_behaviours or batch.min_context")
    return "global batch", ["", "value"], rows, notes


def _memory(plan: Plan) -> Table:
    assert plan.memory is not None
    total = plan.memory.total
    rows: list[list[Any]] = [[part, size / GIB, _share(size, total)] for part, size in plan.memory.device.items()]
    rows.append(["all", total / GIB, _share(1, 1)])
    verdict = "fits" if total <= plan.device_memory_gib * GIB else "does not fit"
    notes = [
        f"{plan.workers} ranks, ZeRO stage {plan.zero_stage}, {plan.element_bytes} bytes a weight",
        f"{total / GIB:.1f} of {plan.device_memory_gib:g} GiB: {verdict}",
    ]
    notes += plan.layout
    if plan.memory.host:
        notes.append(
            f"{plan.memory.host / GIB:.2f} GiB of offloaded optimizer state in the host's memory for each rank"
        )
    return "memory of a rank, GiB", ["part", "GiB", "share"], rows, notes


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
