"""What a benchmark measured, arm by arm: printed as a table, and written with versions and machine."""

import argparse
import json

from onetrain.launcher.console import print_table
from onetrain.launcher.environment import environment


def report(title: str, records: list[dict], options: argparse.Namespace) -> None:
    """One row a record, all with the same keys; the file is `options.out`."""
    rows = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in record.values()] for record in records]
    print_table(title, [name.replace("_", " ") for name in records[0]], rows)
    summary = {"options": {k: str(v) for k, v in vars(options).items()}, "records": records}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**summary, "environment": environment()}, indent=1) + "\n", encoding="utf-8")
