"""What Ray does not say at once about its nodes: that one is gone, or will be."""

import socket
from typing import Any

import ray
from ray._private import worker as ray_worker
from ray.util import placement_group_table

ANSWER_S = 1.0


def draining_nodes() -> set[str]:
    """Ids of nodes that Ray was told will be taken away."""
    connection: Any = ray_worker.global_worker
    return set(connection.gcs_client.get_draining_nodes())


def answers(node_id: str) -> bool:
    """Whether a node's raylet takes connections. Ray itself takes many seconds to find a node dead."""
    for node in ray.nodes():
        if node["NodeID"] == node_id:
            try:
                with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_S):
                    return bool(node["Alive"])
            except OSError:
                return False
    return False


def groups_that_wait() -> bool:
    """Whether anybody's reservation waits for resources."""
    return any(group["state"] in ("PENDING", "RESCHEDULING") for group in placement_group_table().values())
