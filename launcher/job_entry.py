"""The entrypoint of a submitted job, on a node of the cluster: compare versions, then run `onetrain train` here.

    python -m onetrain.launcher.job_entry config.yaml          # beside its submission.json (Ray Jobs)
    python -m onetrain.launcher.job_entry --from-environment   # both in environment variables (KubeRay)

Ends with the exit code of `onetrain train`, or with 2 where a version is another than where it was submitted.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

from onetrain.cluster.kubernetes_options import CONFIG_VARIABLE, SUBMISSION_VARIABLE
from onetrain.launcher.submission import SUBMISSION, differences, facts

REFUSED = 2


def main(arguments: list[str]) -> int:
    """Run the job; returns only where it is refused."""
    if arguments == ["--from-environment"]:
        folder = Path(tempfile.mkdtemp(prefix="onetrain-job-"))
        config = folder / "config.yaml"
        config.write_text(os.environ[CONFIG_VARIABLE], encoding="utf-8")
        submitted: dict[str, Any] = json.loads(os.environ[SUBMISSION_VARIABLE])
    else:
        config = Path(arguments[0]).resolve()
        submitted = json.loads((config.parent / SUBMISSION).read_text(encoding="utf-8"))
    rows = differences(submitted, facts())
    if rows:
        print(
            f"error: node {socket.gethostname()} differs from where this job was submitted:\n{_table(rows)}", flush=True
        )
        return REFUSED

    from onetrain.launcher import cli  # after the comparison: it imports what may be missing

    sys.argv = ["onetrain", "train", str(config), "--address", "auto"]
    cli.main()
    return 0


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    """Plain text; Rich could be what is missing."""
    whole = [("", "submitted from", "this node", "what to do"), *rows]
    widths = [max(len(row[column]) for row in whole) for column in range(3)]
    cells = [[*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]] for row in whole]
    return "\n".join("  " + "  ".join(row) for row in cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
