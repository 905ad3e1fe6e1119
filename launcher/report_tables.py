"""The reports of `onetrain prepare` and `onetrain tokenize` as tables for the console."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onetrain.data.append import Appended
    from onetrain.data.manifest import Manifest
    from onetrain.model.codebook_report import CodebookReport

Rows = list[list[Any]]


def preparation_rows(manifest: "Manifest") -> Rows:
    """(name, value) of what was prepared and of what the raw logs held."""
    rows: Rows = [
        ["users", manifest.users],
        ["items", manifest.items.rows],
        ["events", manifest.events],
        ["train events", manifest.n_train_events],
        ["validation events", manifest.n_valid_events],
        ["test events", manifest.n_test_events],
        ["behaviours", ", ".join(manifest.behaviours)],
        ["scenarios", ", ".join(manifest.scenarios)],
    ]
    rows += [[name.replace("_", " "), count] for name, count in manifest.report.items()]
    return [*rows, ["fingerprint", manifest.fingerprint]]


def appended_rows(appended: "Appended") -> Rows:
    """(name, value) of what a version holds and of what the new logs held."""
    rows: Rows = []
    if appended.manifest is not None:
        rows += [["rows", appended.manifest.users], ["new events", appended.manifest.n_train_events]]
        rows += [["events with their context", appended.manifest.events]]
    rows += [[name.replace("_", " "), count] for name, count in asdict(appended.report).items()]
    return rows if appended.manifest is None else [*rows, ["fingerprint", appended.manifest.fingerprint]]


def codebook_rows(report: "CodebookReport") -> Rows:
    """(measure, before the collision rule, after it); a level that only one side has is None on the other."""
    before, after = report.before, report.after
    rows: Rows = [["items", before.items, after.items]]
    for name in ("sizes", "utilisation", "entropy"):
        first, second = getattr(before, name), getattr(after, name)
        for level in range(max(len(first), len(second))):
            cells = [values[level] if level < len(values) else None for values in (first, second)]
            label = "codes" if name == "sizes" else name
            rows.append([f"{label}, level {level + 1}", *cells])
    for name in (
        "pair_utilisation",
        "reconstruction_error",
        "distinct_sids",
        "sid_collision_rate",
        "item_collision_rate",
        "largest_collision",
    ):
        rows.append([name.replace("_", " ").replace("sid", "SID"), getattr(before, name), getattr(after, name)])
    return rows
