"""A KubeRay RayJob that runs one configuration: `render` gives the manifest, `dump` its YAML.

The configuration travels inside the manifest, as an environment variable of the head's container: one object that
`kubectl create -f` makes and `kubectl delete` removes, and that Kueue's MultiKueue can move to another cluster. A
ConfigMap beside it would stay behind, and refuse (or feed an old configuration to) the next job of the same name.
"""

import hashlib
import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from onetrain.cluster.kubernetes_options import CONFIG_VARIABLE, SUBMISSION_VARIABLE, TAINT, KubernetesOptions
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions

ENTRYPOINT = "exec python -m onetrain.launcher.job_entry --from-environment"
LONGEST_NAME = 47  # KubeRay's limit for a RayJob, which makes longer names from it
LONGEST_VALUE = 128 * 1024  # Linux's limit for one environment variable
LEAVE_MARGIN_S = 10  # between the end of the pre-stop hook and the end of the pod's grace period


@dataclass(frozen=True)
class Job:
    """What the launcher knows of a run."""

    name: str
    config: str  # the resolved configuration, in YAML
    submission: str  # what the image is compared with, in JSON
    ray_version: str
    paths: dict[str, str] = field(default_factory=dict)  # key -> path that every pod must see
    builder_cpus: float = 0.0  # of the actors that build batches, in all


def render(job: Job, cluster: ClusterOptions, recovery: RecoveryOptions, options: KubernetesOptions) -> dict[str, Any]:
    """The RayJob.

    Raises:
        ValueError: the options do not go together; the message names the keys.
    """
    per_pod = _workers_per_pod(cluster, options)
    pods = math.ceil(cluster.workers / per_pod)
    fewest = pods if recovery.min_workers is None else min(pods, math.ceil(recovery.min_workers / per_pod))
    if not options.image:
        raise ValueError("kubernetes.image is empty; name an image that has onetrain and its dependencies installed")
    _check_paths(job.paths, options)
    for variable, value in ((CONFIG_VARIABLE, job.config), (SUBMISSION_VARIABLE, job.submission)):
        if len(value.encode()) >= LONGEST_VALUE:
            raise ValueError(f"the configuration is too long for {variable}: {len(value.encode()):,} bytes")
    environment = _environment(options)
    environment.append(_variable(SUBMISSION_VARIABLE, job.submission))  # everywhere: rank 0 records the commit
    spec: dict[str, Any] = {
        "entrypoint": ENTRYPOINT,
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,  # Kueue asks for it; GPUs are given back
        "ttlSecondsAfterFinished": options.keep_s,
        "backoffLimit": options.retries,
        "submitterPodTemplate": _submitter(options),
        "rayClusterSpec": {
            "rayVersion": job.ray_version,
            "enableInTreeAutoscaling": False,  # `replicas` is the wish; the supervisor uses the nodes there are
            **({"authOptions": {"mode": "token"}} if options.token_auth else {}),
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},
                "template": _head(options, [*environment, _variable(CONFIG_VARIABLE, job.config)]),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "workers",
                    "replicas": pods,
                    "minReplicas": fewest,
                    "maxReplicas": pods,
                    "rayStartParams": {"num-cpus": str(_cpus(job, cluster, options, per_pod, pods))},
                    "template": _worker(job, cluster, options, environment, per_pod, pods),
                }
            ],
        },
    }
    if options.deadline_s is not None:
        spec["activeDeadlineSeconds"] = options.deadline_s
    metadata: dict[str, Any] = {"name": resource_name(job.name), "labels": _labels(job, options)}
    if options.namespace:
        metadata["namespace"] = options.namespace
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": metadata, "spec": spec}


def dump(manifest: dict[str, Any]) -> str:
    """The manifest as YAML; texts of several lines stay readable."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def resource_name(run: str) -> str:
    """A name that Kubernetes takes; a name that had to be changed gets a hash, so that two runs never share it."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if name == run and len(name) <= LONGEST_NAME and name[:1].isalpha():
        return name
    digest = hashlib.sha256(run.encode()).hexdigest()[:6]
    return f"run-{name[: LONGEST_NAME - 11]}".rstrip("-") + f"-{digest}"


def _workers_per_pod(cluster: ClusterOptions, options: KubernetesOptions) -> int:
    gpus = int(cluster.gpus_per_worker)
    most = options.gpus_per_node // gpus if gpus else None
    if most == 0:
        raise ValueError(
            f"cluster.gpus_per_worker is {gpus}, but kubernetes.gpus_per_node only {options.gpus_per_node}; one node "
            "holds at least one rank"
        )
    per_pod = options.workers_per_node or most or 1
    if most is not None and per_pod > most:
        raise ValueError(
            f"kubernetes.workers_per_node is {per_pod} with {gpus} GPUs each, but kubernetes.gpus_per_node only "
            f"{options.gpus_per_node}"
        )
    per_pod = min(per_pod, cluster.workers)
    if cluster.workers % per_pod:
        raise ValueError(
            f"cluster.workers is {cluster.workers}, which {per_pod} ranks a pod do not divide: the last pod would hold "
            "idle GPUs. Change cluster.workers, kubernetes.gpus_per_node or kubernetes.workers_per_node"
        )
    return per_pod


def _cpus(job: Job, cluster: ClusterOptions, options: KubernetesOptions, per_pod: int, pods: int) -> int:
    """Of a worker pod: its ranks, its share of the builders, and one for Ray and everything else."""
    reserved = per_pod * cluster.cpus_per_worker + math.ceil(job.builder_cpus / pods)
    if options.cpus_per_node is None:
        return math.ceil(reserved) + 1
    if options.cpus_per_node < reserved:
        raise ValueError(
            f"kubernetes.cpus_per_node is {options.cpus_per_node}, but the ranks and builders of batches of a pod "
            f"reserve {reserved:g}; raise it, or lower cluster.cpus_per_worker or stream.service"
        )
    return options.cpus_per_node


def _check_paths(paths: dict[str, str], options: KubernetesOptions) -> None:
    mount = options.storage_mount.rstrip("/") + "/"
    for key, path in paths.items():
        if "://" in path:
            continue
        if options.storage_claim is None:
            raise ValueError(
                f"{key} is {path!r}, a folder that pods do not share; name a volume in kubernetes.storage_claim "
                f"(mounted at {mount}), or give the URL of an object store"
            )
        if not path.startswith(mount):
            raise ValueError(
                f"{key} is {path!r}, outside the shared storage kubernetes.storage_mount = {mount}; for example "
                f"--set {key}={mount}{path.rstrip('/').rpartition('/')[2]}"
            )


def _labels(job: Job, options: KubernetesOptions) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "onetrain", "app.kubernetes.io/instance": resource_name(job.name)}
    if options.kueue_queue:
        labels["kueue.x-k8s.io/queue-name"] = options.kueue_queue
    if options.volcano_queue:
        labels |= {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": options.volcano_queue}
    return labels | options.labels


def _environment(options: KubernetesOptions) -> list[dict[str, Any]]:
    given = [_variable(name, value) for name, value in options.env.items()]
    secrets = []
    for name, reference in options.secret_env.items():
        secret, _, key = reference.partition("/")
        secrets.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
    return [*given, *secrets]


def _variable(name: str, value: str) -> dict[str, str]:
    """Kubernetes fills $(NAME) in, unless the dollar sign is doubled."""
    return {"name": name, "value": value.replace("$", "$$")}


def _head(options: KubernetesOptions, environment: list[dict[str, Any]]) -> dict[str, Any]:
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001}
    container = _container(
        "ray-head", options, environment, {"cpu": str(options.head_cpus), "memory": options.head_memory}
    )
    container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    return {"spec": _pod(options, container, shared_memory=_smaller(options.head_memory, options.shared_memory))}


def _worker(
    job: Job,
    cluster: ClusterOptions,
    options: KubernetesOptions,
    environment: list[dict[str, Any]],
    per_pod: int,
    pods: int,
) -> dict[str, Any]:
    resources = {"cpu": str(_cpus(job, cluster, options, per_pod, pods)), "memory": options.memory_per_node}
    if cluster.gpus_per_worker:
        resources["nvidia.com/gpu"] = str(int(per_pod * cluster.gpus_per_worker))
    resources |= {name: str(count) for name, count in options.extended_resources.items()}
    container = _container("ray-worker", options, environment, resources)
    leave = ["python", "-m", "onetrain.cluster.leave_node", str(max(1, options.termination_grace_s - LEAVE_MARGIN_S))]
    container["lifecycle"] = {"preStop": {"exec": {"command": leave}}}
    if any(name.startswith("rdma/") for name in options.extended_resources):
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}  # RDMA pins memory
    spec = _pod(options, container, options.shared_memory)
    spec["terminationGracePeriodSeconds"] = options.termination_grace_s
    if options.node_selector:
        spec["nodeSelector"] = dict(options.node_selector)
    tolerations = [_toleration(taint) for taint in options.tolerations]
    if cluster.gpus_per_worker:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists"})
    if tolerations:
        spec["tolerations"] = tolerations
    return {"spec": spec}


def _submitter(options: KubernetesOptions) -> dict[str, Any]:
    """The pod that runs `ray job submit`; KubeRay adds the command."""
    resources = {"cpu": "500m", "memory": "1Gi"}
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "resources": {"requests": resources, "limits": resources},
    }
    return {"spec": {"restartPolicy": "Never", **_identity(options), "containers": [container]}}


def _container(
    name: str, options: KubernetesOptions, environment: list[dict[str, Any]], resources: dict[str, str]
) -> dict[str, Any]:
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    if options.storage_claim:
        mounts.append({"name": "storage", "mountPath": options.storage_mount})
    return {
        "name": name,
        "image": options.image,
        "env": environment,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": mounts,
    }


def _pod(options: KubernetesOptions, container: dict[str, Any], shared_memory: str) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": shared_memory}}
    ]
    if options.storage_claim:
        volumes.append({"name": "storage", "persistentVolumeClaim": {"claimName": options.storage_claim}})
    return {**_identity(options), "containers": [container], "volumes": volumes}


def _identity(options: KubernetesOptions) -> dict[str, Any]:
    identity: dict[str, Any] = {}
    if options.service_account:
        identity["serviceAccountName"] = options.service_account
    if options.image_pull_secrets:
        identity["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    return identity


def _toleration(taint: str) -> dict[str, str]:
    match = TAINT.fullmatch(taint)
    assert match is not None, taint  # the options checked it
    toleration = {"key": match["key"], "operator": "Exists" if match["value"] is None else "Equal"}
    if match["value"] is not None:
        toleration["value"] = match["value"]
    if match["effect"]:
        toleration["effect"] = match["effect"]
    return toleration


def _smaller(first: str, second: str) -> str:
    return min(first, second, key=_bytes)


def _bytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", quantity).groups()  # type: ignore[union-attr]
    base = 1024 if unit.endswith("i") else 1000
    return float(number) * base ** (" KMGTPE".index(unit[0].upper()) if unit else 0)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
