"""The parts of a report about time: the timeline with its restarts, the seconds of every label, checkpoints."""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from onetrain.launcher.goodput import LABELS, Goodput, Span
from onetrain.launcher.report_page import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW, Section, in_figure
from onetrain.launcher.run_records import bytes_text, place, seconds_text

Record = Mapping[str, Any]
COLOURS = {
    "compute": BLUE,
    "recompute": SKY,
    "data_wait": YELLOW,
    "checkpoint": GREEN,
    "validation": PURPLE,
    "start_up": GREY,
    "restart": ORANGE,
    "lost": VERMILION,
    "shut_down": "#C4C4C4",
    "idle": "#EEF1F4",
}
MEANING = {
    "compute": "optimizer steps made for the first time",
    "recompute": "steps made again after a restart",
    "data_wait": "ranks stood still for data",
    "checkpoint": "training stood still for a checkpoint",
    "validation": "ranking metrics of the validation split",
    "start_up": "before the first attempt worked; waiting for nodes included",
    "restart": "between an attempt's end and the work of the next",
    "lost": "steps nobody recorded, hanging, and noticing it",
    "shut_down": "after the last attempt's work",
    "idle": "nothing ran until the user started it again; not part of the wall time",
}
OF_WORK = ("data_wait", "recompute", "compute", "checkpoint", "validation")
MOST_SPANS = 120  # drawn; finer ones of the same attempt are drawn together, else they blur
MOST_LANES = 12
MOST_CHECKPOINTS = 2000


def time_section(found: Goodput, events: Sequence[Record]) -> Section:
    """The timeline, and the table of labels."""
    section = Section("Where the time went")
    if found.ettr is None:
        section.note("The run has neither events.jsonl nor ledger.jsonl, so nobody knows where its time went.")
        return section
    section.figure(_timeline(found, events), "One lane for each attempt; hover for reasons.")
    shown = [label for label in LABELS if found.seconds[label] > 0]
    rows = [[label.replace("_", " "), *_amount(label, found), MEANING[label]] for label in shown]
    rows.append(["wall time", seconds_text(found.wall_s), "100.0%", "everything but idle"])
    swatches = [*(COLOURS[label] for label in shown), "#ffffff"]
    section.table(["label", "time", "share", "what it is"], rows, swatches, right=(1, 2))
    section.note(f"Effective training time ratio: {found.ettr:.1%} = compute / wall time.")
    return section


def restarts_section(found: Goodput) -> Section:
    """Every end of an attempt that was not the end of the run."""
    section = Section("Restarts")
    if not found.restarts:
        section.note("No attempt has ended before the run did.")
        return section
    rows = [
        [
            restart.attempt,
            _clock(restart.time),
            restart.kind.replace("_", " "),
            place({"rank": restart.rank, "node": restart.node}) or None,
            restart.step,
            restart.resumed_from,
            "not yet" if restart.seconds is None else seconds_text(restart.seconds),
            restart.reason,
        ]
        for restart in found.restarts
    ]
    columns = ["attempt", "ended", "kind", "where", "at step", "went on from", "fault to training", "reason"]
    section.table(columns, rows, right=(6,))
    known = [restart.seconds for restart in found.restarts if restart.seconds is not None]
    text = f"Median from fault to training: {seconds_text(median(known))}. " if known else ""
    if found.mtbf_s is not None:
        over = seconds_text(found.wall_s)
        text += f"Mean time between failures: {seconds_text(found.mtbf_s)} ({found.failures} in {over})."
    if text:
        section.note(text)
    return section


def checkpoints_section(ledger: Sequence[Record]) -> Section:
    """Sizes and times of checkpoints, and what went wrong with them."""
    section = Section("Checkpoints")
    saved = [record for record in ledger if record.get("kind") == "checkpoint"][-MOST_CHECKPOINTS:]
    if not saved:
        section.note("The ledger has no checkpoint yet.")
    else:
        figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.1)
        for name, label, colour in (("blocked_s", "training stood still", VERMILION), ("write_s", "writing", BLUE)):
            points = [record for record in saved if record.get(name) is not None]
            figure.add_trace(_dots(points, [record[name] for record in points], label, colour), row=1, col=1)
        points = [record for record in saved if record.get("bytes") is not None]
        unit, factor = _size_unit(max((record["bytes"] for record in points), default=0))
        sizes = [record["bytes"] / factor for record in points]
        figure.add_trace(_dots(points, sizes, "size", GREEN), row=1, col=2)
        figure.update_xaxes(title="optimizer step")
        figure.update_yaxes(title="seconds", rangemode="tozero", row=1, col=1)
        figure.update_yaxes(title=f"size ({unit})", rangemode="tozero", row=1, col=2)
        figure.update_layout(height=290)
        section.figure(figure)
        modes = Counter(str(record.get("mode")) for record in saved)
        rows = [["checkpoints", ", ".join(f"{count} {mode}" for mode, count in modes.items())]]
        last = saved[-1]
        rows.append(["last", f"step {last.get('step')}, {bytes_text(last.get('bytes'))}, {_clock(last['time'])}"])
        for name, label in (("blocked_s", "training stood still"), ("write_s", "writing")):
            values = [record[name] for record in saved if record.get(name) is not None]
            if values:
                rows.append([label, f"median {seconds_text(median(values))}, longest {seconds_text(max(values))}"])
        section.table(["", "value"], rows)
    for record in ledger:
        if record.get("kind") == "checkpoint_failed":
            section.note(f"{_clock(record['time'])}: saving step {record.get('step')} failed: {record.get('problem')}")
        elif record.get("kind") == "fallback":
            used, problem = record.get("used"), record.get("problem")
            section.note(f"{_clock(record['time'])}: {record.get('damaged')} was damaged ({problem}); {used} was used")
    return section


def condensed(spans: Sequence[Span], most: int = MOST_SPANS) -> list[Span]:
    """About `most` spans: where they are more, those of work in a stretch of one attempt are put together by label.

    What was no work keeps its place. Sums of labels stay the same.
    """
    if len(spans) <= most:
        return list(spans)
    length = (spans[-1].end - spans[0].begin) / most * len(OF_WORK)
    first = spans[0].begin

    def bucket(span: Span) -> tuple[Any, ...]:
        if span.label not in OF_WORK:
            return (span.begin, span.label)
        return (span.attempt, int((span.begin - first) // length))

    drawn: list[Span] = []
    for _, group in itertools.groupby(spans, bucket):
        together = list(group)
        begin, step = together[0].begin, together[-1].step
        of_label: Counter[str] = Counter()
        for span in together:
            of_label[span.label] += span.seconds  # type: ignore[assignment]
        for label in of_label:  # in the order in which they came
            drawn.append(Span(begin, begin + of_label[label], label, together[0].attempt, step))
            begin += of_label[label]
    return drawn


def _timeline(found: Goodput, events: Sequence[Record]) -> go.Figure:
    attempts = sorted({span.attempt for span in found.spans if span.attempt is not None})
    lanes: dict[int | None, str] = {
        attempt: f"attempt {attempt}" if len(attempts) <= MOST_LANES else "run" for attempt in attempts
    }
    first = found.spans[0].begin
    unit, seconds = _unit(found.spans[-1].end - first)
    reasons = {restart.attempt: restart for restart in found.restarts}
    why = {event.get("attempt"): event for event in events if event.get("event") == "attempt_started"}
    figure = go.Figure()
    drawn = condensed(found.spans)
    for label in LABELS:
        own = [span for span in drawn if span.label == label]
        if not own:
            continue
        outline = {"color": "#8c959f", "width": 1} if label in ("idle", "shut_down") else {"width": 0}
        figure.add_trace(
            go.Bar(
                orientation="h",
                base=[(span.begin - first) / seconds for span in own],
                x=[span.seconds / seconds for span in own],
                y=[lanes.get(span.attempt, next(iter(lanes.values()), "run")) for span in own],
                name=label.replace("_", " "),
                marker={"color": COLOURS[label], "line": outline},
                hovertext=[_hover(span, reasons, why) for span in own],
                hovertemplate="%{hovertext}<extra></extra>",
            )
        )
    order = list(dict.fromkeys(lanes.values())) or ["run"]
    figure.update_layout(
        barmode="overlay", height=150 + 38 * len(order), bargap=0.25, xaxis_title=f"{unit} since the start"
    )
    figure.update_yaxes(categoryorder="array", categoryarray=order[::-1])
    return figure


def _hover(span: Span, reasons: Mapping[Any, Any], why: Mapping[Any, Record]) -> str:
    lines = [f"<b>{span.label.replace('_', ' ')}</b>, {seconds_text(span.seconds)}"]
    lines.append(
        f"{_clock(span.begin)} to {_clock(span.end)}" + ("" if span.step is None else f", to step {span.step}")
    )
    cause = reasons.get(span.attempt if span.label == "lost" else (span.attempt or 0) - 1)
    if cause is not None and span.label in ("lost", "restart", "idle"):
        where = place({"rank": cause.rank, "node": cause.node})
        lines.append(
            in_figure(f"attempt {cause.attempt} {cause.kind.replace('_', ' ')}{f' ({where})' if where else ''}")
        )
        lines.append(in_figure(cause.reason))
    if span.label in ("start_up", "restart") and span.attempt in why:
        start = why[span.attempt]
        lines.append(in_figure(f"attempt {span.attempt}: {start.get('world_size')} ranks; {start.get('reason') or ''}"))
    return "<br>".join(line for line in lines if line)


def _amount(label: str, found: Goodput) -> tuple[str, str | None]:
    seconds = found.seconds[label]
    return seconds_text(seconds), None if label == "idle" else f"{seconds / found.wall_s:.1%}"


def _dots(points: Iterable[Record], values: Sequence[float], label: str, colour: str) -> go.Scatter:
    steps = [record.get("step") for record in points]
    return go.Scatter(x=steps, y=values, name=label, mode="lines+markers", line={"color": colour, "width": 1})


def _size_unit(largest: float) -> tuple[str, float]:
    return ("GB", 1e9) if largest >= 1e10 else ("MB", 1e6) if largest >= 1e7 else ("kB", 1e3)


def _unit(length: float) -> tuple[str, float]:
    return ("hours", 3600.0) if length > 3 * 3600 else ("minutes", 60.0) if length > 180 else ("seconds", 1.0)


def _clock(when: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(when))
