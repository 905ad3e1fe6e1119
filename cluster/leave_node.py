"""Take this node out of its Ray cluster in good order: `python -m onetrain.cluster.leave_node SECONDS`.

Tells Ray that the node will be preempted, which the supervisor of a run answers with a checkpoint and another attempt
on the nodes that stay, and waits until no rank runs here any more, or the seconds are over. It is the pre-stop hook of
KubeRay pods, and what to run by hand before a machine is switched off.
"""

import subprocess
import sys
import time

import psutil

POLL_S = 0.5
RANK = "ray::Worker"  # how Ray names the process of an actor of cluster/worker.py


def ranks_here() -> list[int]:
    """Process ids of the ranks on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"]
        if command and command[0].split(".")[0].split("(")[0] == RANK:
            found.append(process.pid)
    return found


def leave(seconds: float) -> bool:
    """Announce the end of this node and wait for its ranks; whether they ended in time."""
    deadline = time.monotonic() + seconds
    announced = subprocess.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "leave_node"),
            *("--deadline-remaining-seconds", str(int(seconds))),
        ],
        capture_output=True,
        text=True,
    )
    if announced.returncode:
        print(f"Ray did not take the announcement: {announced.stderr.strip()}", file=sys.stderr)
        return False
    while ranks_here():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


if __name__ == "__main__":
    sys.exit(0 if leave(float(sys.argv[1])) else 1)
