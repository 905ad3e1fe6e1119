"""The curves of a report: loss, accuracy, validation, optimizer, speed, data and experts, over optimizer steps."""

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from onetrain.launcher.device_peaks import peak_of
from onetrain.launcher.report_page import BLUE, GREY, LINES, VERMILION, Section

Record = Mapping[str, Any]
MOST_POINTS = 3000  # of a curve
MOST_COLUMNS = 400  # of a heat map
OF_LAYERS = {
    "load_max": "largest load of an expert, times the ideal",
    "load_p50": "median load of an expert, times the ideal",
    "dead": "share of experts without a token",
    "entropy_share": "router entropy, share of the largest possible",
    "bias_range": "largest balancing bias less the smallest",
}
VALID_METRICS = ("recall@", "ndcg@", "hr@", "mrr@")


def thinned(records: Sequence[Record], most: int) -> list[Record]:
    """At most about `most` of them, evenly, the last one included."""
    stride = -(-len(records) // most) if records else 1
    kept = list(records[::stride])
    return kept if not records or kept[-1] is records[-1] else [*kept, records[-1]]


def loss_section(train: Sequence[Record], valid: Sequence[Record], resumed: Sequence[tuple[int, int]]) -> Section:
    """Training and validation loss. `resumed`: (attempt, step it went on from)."""
    section = Section("Loss")
    if not _has(train, "loss"):
        section.note("No training loss has been logged yet.")
        return section
    figure = go.Figure(_line(train, "loss", "training", BLUE))
    if _has(valid, "loss"):
        figure.add_trace(_line(valid, "loss", "validation", VERMILION, markers=True))
    for attempt, step in resumed:
        text = f"attempt {attempt}"
        figure.add_vline(x=step, line={"dash": "dot", "color": GREY, "width": 1}, annotation_text=text,
                         annotation_font={"size": 11, "color": GREY})  # fmt: skip
    figure.update_layout(height=380, hovermode="x unified", xaxis_title="optimizer step", yaxis_title="loss (nats)")
    dotted = " Dotted lines: the checkpoint from which an attempt went on." if resumed else ""
    section.figure(figure, f"Mean cross-entropy of a target, between two log lines.{dotted}")
    if not _has(valid, "loss"):
        section.note("No validation has been made yet, so there is no validation loss.")
    return section


def accuracy_section(train: Sequence[Record], valid: Sequence[Record]) -> Section:
    """Accuracy of every SID level in training, and the ranking metrics of validations."""
    section = Section("Accuracy")
    levels = _names(train, re.compile(r"accuracy_level_\d+"))
    if levels:
        figure = go.Figure([
            _line(train, name, f"level {int(name.rsplit('_', 1)[1]) + 1}", LINES[i % len(LINES)], factor=100)
            for i, name in enumerate(levels)
        ])  # fmt: skip
        figure.update_layout(height=340, hovermode="x unified", xaxis_title="optimizer step")
        figure.update_yaxes(title="targets with the right code (%)")
        section.figure(figure, "Of each level of the semantic ID in training, given the right codes of earlier levels.")
    else:
        section.note("No accuracy by level has been logged.")
    found = sorted(name for record in valid[-1:] for name in record if name.startswith(VALID_METRICS))
    at = {name.rpartition("@")[2] for name in found}
    shown = [name for name in found if name.endswith("@10") or "10" not in at][: len(LINES)]
    if not shown:
        section.note("No validation has been made yet, so there are no ranking metrics.")
        return section
    figure = go.Figure([_line(valid, name, name, LINES[i], markers=True) for i, name in enumerate(shown)])
    figure.update_layout(height=320, hovermode="x unified", xaxis_title="optimizer step", yaxis_title="ranking metric")
    section.figure(figure, "Ranking metrics on the validation split.")
    return section


def optimizer_section(train: Sequence[Record]) -> Section:
    """Learning rate and gradient norm."""
    section = Section("Optimizer")
    _grid(section, train, [("learning_rate", "learning rate", 1, False), ("grad_norm", "gradient norm", 1, True)],
          "The norm is that before clipping, on a logarithmic axis.")  # fmt: skip
    return section


def speed_section(
    train: Sequence[Record], worlds: Mapping[Any, int], device: Mapping[str, Any], precision: str
) -> Section:
    """Throughput and MFU. `worlds`: attempt -> world size, None -> that of attempts nobody knows."""
    section = Section("Speed")
    large = max((record.get("model_gflops_per_s") or 0 for record in train), default=0) >= 1e4
    rates: list[tuple[str, str, float, bool]] = [("samples_per_s", "samples/s", 1, False)]
    rates.append(("tokens_per_s", "target tokens/s", 1, False))
    rates.append(("model_gflops_per_s", "model TFLOP/s" if large else "model GFLOP/s", 1e-3 if large else 1, False))
    names = device.get("names") or ["unknown device"]
    peak = peak_of(str(names[0])) if device.get("type") == "cuda" else None
    records: Sequence[Record] = train
    caption = "All ranks together; validations and checkpoints are left out."
    if peak is not None and _has(train, "model_gflops_per_s"):
        limit = peak.flops(precision)
        records = [_with_mfu(record, limit, worlds) for record in train]
        rates.append(("mfu", "MFU (%)", 100, False))
        caption += (
            f" MFU: model FLOP/s over {limit / 1e12:,.0f} TFLOP/s for each rank, the dense {precision} peak of "
            f"{names[0]} ({peak.source}); recomputation does not count."
        )
    _grid(section, records, rates, caption)
    if peak is None:
        kind = "a CPU has no published peak" if device.get("type") == "cpu" else "its dense peak is not in our table"
        section.note(f"No MFU: the run was on {names[0]}, and {kind}.")
    shares = [value for record in records if (value := record.get("mfu")) is not None]
    if shares:
        section.note(f"Median MFU over the run: {median(shares):.1%}.")
    return section


def data_section(train: Sequence[Record]) -> Section:
    """What data costs: waiting and padding, imbalance and latency."""
    section = Section("Data")
    _grid(
        section,
        train,
        [
            ("data_wait", "time waiting for data (%)", 100, False),
            ("padding", "padding in batches (%)", 100, False),
            ("data/imbalance", "dearest rank over mean (%)", 100, False),
            ("data/latency_p99_ms", "p99 of building a step (ms)", 1, False),
        ],
        "Between two log lines, mean over ranks; the dearest rank by padded work, p99 of the slowest rank.",
    )
    return section


def experts_section(train: Sequence[Record]) -> Section:
    """Heat maps, layer by step, of what the routers do."""
    section = Section("Experts")
    pattern = re.compile(r"experts/layer_(\d+)/(\w+)")
    layers = sorted({int(m[1]) for record in train[-1:] for name in record if (m := pattern.fullmatch(name))})
    if not layers:
        section.note("No expert metrics: the model has no experts, or nothing has been logged yet.")
        return section
    records = thinned(train, MOST_COLUMNS)
    shown = [name for name in OF_LAYERS if _has(records, f"experts/layer_{layers[0]:02d}/{name}")]
    if "dead" in shown and not any(record.get(f"experts/layer_{z:02d}/dead") for record in records for z in layers):
        shown.remove("dead")
        section.note("No expert was without a token between two log lines.")
    if not shown:
        return section
    rows = -(-len(shown) // 2)
    height = 90 + rows * (170 + 14 * len(layers))
    figure = make_subplots(rows=rows, cols=2, subplot_titles=[OF_LAYERS[name] for name in shown],
                           horizontal_spacing=0.17, vertical_spacing=85 / (height - 90))  # fmt: skip
    for index, name in enumerate(shown):
        row, column = index // 2 + 1, index % 2 + 1
        values = [[record.get(f"experts/layer_{layer:02d}/{name}") for record in records] for layer in layers]
        domain = figure.get_subplot(row, column).yaxis.domain
        right = figure.get_subplot(row, column).xaxis.domain[1]
        bar = {"len": domain[1] - domain[0], "y": sum(domain) / 2, "x": right + 0.005, "thickness": 12}
        heat = go.Heatmap(
            z=values,
            x=[record["step"] for record in records],
            y=[str(layer) for layer in layers],
            colorscale="Cividis",
            colorbar=bar,
            hovertemplate="step %{x}, layer %{y}: %{z:.4g}<extra></extra>",
        )
        figure.add_trace(heat, row=row, col=column)
    figure.update_xaxes(title="optimizer step")
    figure.update_yaxes(title="layer", type="category")
    figure.update_annotations(font_size=13)
    figure.update_layout(height=height)
    section.figure(figure, "Every expert would have a load of 1 if tokens were spread evenly.")
    return section


def _with_mfu(record: Record, limit: float, worlds: Mapping[Any, int]) -> Record:
    world, rate = worlds.get(record.get("attempt"), worlds.get(None)), record.get("model_gflops_per_s")
    return {**record, "mfu": None if rate is None or not world else rate * 1e9 / (limit * world)}


def _grid(
    section: Section, records: Sequence[Record], wanted: Sequence[tuple[str, str, float, bool]], caption: str
) -> None:
    """One small plot for every (metric, axis title, factor, logarithmic) that was logged, two in a row."""
    shown = [entry for entry in wanted if _has(records, entry[0])]
    if not shown:
        section.note(f"Nothing of this has been logged yet: {', '.join(name for name, *_ in wanted)}.")
        return
    rows = -(-len(shown) // 2)
    figure = make_subplots(rows=rows, cols=2, horizontal_spacing=0.1, vertical_spacing=0.3 / rows)
    for index, (name, title, factor, logarithmic) in enumerate(shown):
        row, column = index // 2 + 1, index % 2 + 1
        figure.add_trace(_line(records, name, title, BLUE, factor=factor), row=row, col=column)
        axis = {"type": "log"} if logarithmic else {"rangemode": "tozero"}
        figure.update_yaxes(title=title, row=row, col=column, **axis)
        figure.update_xaxes(title="optimizer step", row=row, col=column)
    figure.update_layout(height=60 + 250 * rows, showlegend=False)
    section.figure(figure, caption)


def _line(
    records: Sequence[Record], name: str, label: str, colour: str, factor: float = 1, markers: bool = False
) -> go.Scatter:
    points = [record for record in thinned(records, MOST_POINTS) if name in record]
    values = [None if record[name] is None else record[name] * factor for record in points]
    return go.Scatter(
        x=[record["step"] for record in points],
        y=values,
        name=label,
        mode="lines+markers" if markers or len(points) == 1 else "lines",
        line={"color": colour, "width": 1.8},
        hovertemplate="%{y:.5g}" if label else None,
    )


def _has(records: Sequence[Record], name: str) -> bool:
    return any(record.get(name) is not None for record in records)


def _names(records: Sequence[Record], pattern: re.Pattern[str]) -> list[str]:
    return sorted({name for record in records[-1:] for name in record if pattern.fullmatch(name)})
