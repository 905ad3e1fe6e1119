"""What Ray does not say at once about its nodes: that one is gone, or will be."""

import socket
from typing import Any

import ray
from ray._private import worker as ray_worker

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
