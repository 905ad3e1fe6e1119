"""The connection to Ray: join a running cluster, or start a local Ray that lives as long as the `with` block."""

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import ray

from onetrain.cluster.errors import ClusterError
from onetrain.cluster.options import ClusterOptions

CONNECT_TIMEOUT_S = 5.0
OBJECT_STORE_BYTES = 128 * 2**20  # ranks talk through torch.distributed; a group sends a function and its results


@contextmanager
def ray_session(options: ClusterOptions, service_cpus: float = 0.0, object_store_gib: float = 0.0) -> Iterator[None]:
    """Hold a connection to Ray, and undo at the end exactly what was done here.

    A connection that this process already has is used and kept. Otherwise `options.address`, or else the
    environment's RAY_ADDRESS (which Ray sets inside a submitted job), is joined. Without an address a local Ray is
    started, with CPUs enough for all workers and `service_cpus` more, with so much memory for objects beside what
    worker groups need, and stopped at the end, its sockets and session folder removed (the logs stay when the block
    raised an error other than a user-facing one, which has an `exit_code`).

    Raises:
        ClusterError: the address is wrong or unreachable, or Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = options.address or os.environ.get("RAY_ADDRESS")
    session_folder = None
    if address:
        _join(address)
    else:
        session_folder = _start(options, service_cpus, object_store_gib)
    keep_logs = False
    try:
        yield
    except Exception as error:
        keep_logs = not hasattr(error, "exit_code")
        raise
    finally:
        ray.shutdown()
        if session_folder is not None:
            shutil.rmtree(session_folder / "sockets" if keep_logs else session_folder, ignore_errors=True)


def _join(address: str) -> None:
    """Connect to the cluster at `address` ("host:port" or "auto")."""
    if "://" in address:
        raise ClusterError(
            f"{address!r} (cluster.address, or RAY_ADDRESS of the environment) is the address of Ray Client or of the "
            "dashboard, which worker groups cannot use. Give host:port of the head node (usually port 6379), unset "
            "RAY_ADDRESS for a local Ray, or send the job to the cluster with `onetrain submit`."
        )
    if address != "auto":
        _probe(address)
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(
            f"could not join Ray at cluster.address {address!r}: {error}. If that cluster asks for a token, set "
            "RAY_AUTH_MODE=token, with its token in RAY_AUTH_TOKEN or in ~/.ray/auth_token."
        ) from error


def _probe(address: str) -> None:
    """Fail within seconds where nothing speaks gRPC; `ray.init` itself would try for two minutes, then exit."""
    if os.environ.get("RAY_USE_TLS", "0") not in ("0", ""):
        return
    with grpc.insecure_channel(address) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise ClusterError(
                f"no Ray answers at cluster.address {address!r} within {CONNECT_TIMEOUT_S:.0f} s. Check host and port "
                "(`ray status` on the head node prints them), or leave cluster.address out to start a local Ray."
            ) from None


def _start(options: ClusterOptions, service_cpus: float, object_store_gib: float) -> Path:
    """Start a local Ray and return its session folder.

    Token authentication is on, as Ray has it by default: Ray makes the token in ~/.ray/auth_token by itself.
    """
    wanted_cpus = math.ceil(options.workers * options.cpus_per_worker + service_cpus)
    try:
        context = ray.init(
            address="local",  # never another Ray that happens to run on this machine
            num_cpus=max(wanted_cpus, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES + int(object_store_gib * 2**30),
            include_dashboard=False,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:  # a node that starts too slowly is a bare Exception of Ray
        ray.shutdown()
        raise ClusterError(
            f"a local Ray did not start: {error}. `onetrain doctor` checks what it needs: a writable home folder "
            "(for its token) and /tmp, enough shared memory and open files."
        ) from error
    return Path(context.address_info["session_dir"])  # type: ignore[attr-defined]
