"""Rank order and rendezvous on two Ray nodes (both on this machine, under two addresses)."""

import os
import shutil
import sys

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.worker_group import run_on_workers

cloudpickle.register_pickle_by_value(sys.modules[__name__])
SECOND_ADDRESS = "127.0.0.2"


@pytest.fixture(scope="module")
def two_nodes():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    session_folder = cluster.head_node.get_session_dir_path()
    try:
        cluster.add_node(num_cpus=1, num_gpus=1, node_ip_address=SECOND_ADDRESS)
        yield cluster
    finally:
        cluster.shutdown()
        shutil.rmtree(session_folder, ignore_errors=True)


def where():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, torch.tensor([dist.get_rank()]))
    dist.destroy_process_group()
    names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES")
    return ray.util.get_node_ip_address(), [int(rank) for rank in gathered], {n: os.environ.get(n) for n in names}


@pytest.mark.parametrize("gpus", [0, 1])
def test_ranks_follow_node_addresses_and_rank_0_is_the_master(two_nodes, gpus):
    options = ClusterOptions(workers=2, address=two_nodes.address, gpus_per_worker=gpus)
    (node_0, ranks_0, env_0), (node_1, ranks_1, env_1) = run_on_workers(where, (), options, 1)
    assert ranks_0 == ranks_1 == [0, 1]
    assert node_0 == SECOND_ADDRESS  # below the head's address, so the head is not rank 0
    assert node_1 == two_nodes.address.split(":")[0]
    assert env_0["MASTER_ADDR"] == env_1["MASTER_ADDR"] == SECOND_ADDRESS
    assert (env_0["RANK"], env_1["RANK"]) == ("0", "1")
    assert env_0["LOCAL_RANK"] == env_1["LOCAL_RANK"] == "0"
    assert env_0["LOCAL_WORLD_SIZE"] == env_1["LOCAL_WORLD_SIZE"] == "1"
    if gpus:
        assert env_0["CUDA_VISIBLE_DEVICES"] == env_1["CUDA_VISIBLE_DEVICES"] == "0"
    assert not ray.is_initialized()  # the driver left the cluster ...


def test_the_joined_cluster_goes_on(two_nodes):
    assert len([node for node in two_nodes.list_all_nodes() if node.any_processes_alive()]) == 2
