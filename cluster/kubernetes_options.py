"""Options of the KubeRay manifest: the `kubernetes:` section, which only `onetrain submit --kuberay` reads."""

import re
from dataclasses import dataclass, field

CONFIG_VARIABLE, SUBMISSION_VARIABLE = "ONETRAIN_CONFIG", "ONETRAIN_SUBMISSION"  # of the pods
QUANTITY = re.compile(r"\d+(\.\d+)?([kMGTPE]|[KMGTPE]i)?")
SECRET = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?/[\w.-]+")
TAINT = re.compile(r"(?P<key>[\w./-]+)(=(?P<value>[\w.-]*))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?")
SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class KubernetesOptions:
    """What the pods of a run are made of; how many there are follows from `cluster:` and `recovery:`."""

    image: str = ""  # has onetrain and its dependencies installed
    namespace: str | None = None  # None = that of `kubectl create`
    gpus_per_node: int = 8  # a worker pod is one whole node
    workers_per_node: int | None = None  # ranks of a pod; None = gpus_per_node / cluster.gpus_per_worker, on CPUs 1
    cpus_per_node: int | None = None  # None = what the ranks and builders of batches on it reserve, and one more
    memory_per_node: str = "64Gi"
    shared_memory: str = "16Gi"  # /dev/shm: Ray's objects, NCCL; counts towards the pod's memory
    head_cpus: int = 2
    head_memory: str = "8Gi"
    storage_claim: str | None = None  # PersistentVolumeClaim (ReadWriteMany); None = everything is in an object store
    storage_mount: str = "/mnt/onetrain"  # where the claim is mounted in every pod
    env: dict[str, str] = field(default_factory=dict)  # of every container, such as NCCL_IB_HCA
    secret_env: dict[str, str] = field(default_factory=dict)  # variable -> secret/key, such as WANDB_API_KEY: wandb/key
    extended_resources: dict[str, int] = field(default_factory=dict)  # of a worker pod, such as rdma/hca_shared: 1
    node_selector: dict[str, str] = field(default_factory=dict)  # of worker pods
    tolerations: tuple[str, ...] = ()  # of worker pods, as taints: key=value:Effect, key:Effect or key
    service_account: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)  # of the RayJob
    kueue_queue: str | None = None  # local queue of Kueue
    volcano_queue: str | None = None  # queue of Volcano
    token_auth: bool = True  # KubeRay makes a token for the cluster; needs KubeRay 1.6
    termination_grace_s: int = 300  # for a pod that is taken away; at least as long as a checkpoint takes
    retries: int = 3  # new Ray clusters after a failure of the whole one; each goes on from the newest checkpoint
    keep_s: int = 3600  # the cluster stays so long after the job, for its logs
    deadline_s: int | None = None  # of the whole job; None = none

    def __post_init__(self) -> None:
        for name, least in (
            ("gpus_per_node", 1),
            ("workers_per_node", 1),
            ("cpus_per_node", 1),
            ("head_cpus", 1),
            ("termination_grace_s", 1),
            ("retries", 0),
            ("keep_s", 0),
            ("deadline_s", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"kubernetes.{name} is {value}; at least {least} is needed")
        for name in ("memory_per_node", "shared_memory", "head_memory"):
            if not QUANTITY.fullmatch(getattr(self, name)):
                raise ValueError(f"kubernetes.{name} is {getattr(self, name)!r}; write an amount such as 64Gi")
        if not self.storage_mount.startswith("/"):
            raise ValueError(f"kubernetes.storage_mount is {self.storage_mount!r}; it is an absolute path")
        for variable, secret in self.secret_env.items():
            if not SECRET.fullmatch(secret):
                raise ValueError(
                    f"kubernetes.secret_env gives {variable} {secret!r}; name a Kubernetes secret and its key, such as "
                    "wandb/api-key"
                )
        for variable in self.env:
            if SECRET_NAME.search(variable):
                raise ValueError(
                    f"kubernetes.env has {variable}, which looks like a secret that anybody could read in the "
                    "manifest; name a Kubernetes secret in kubernetes.secret_env"
                )
        for taint in self.tolerations:
            if not TAINT.fullmatch(taint):
                raise ValueError(
                    f"kubernetes.tolerations has {taint!r}; write key=value:NoSchedule, key:NoSchedule or key"
                )
        for resource, count in self.extended_resources.items():
            if count < 1 or "/" not in resource:
                raise ValueError(
                    f"kubernetes.extended_resources gives {resource!r} {count}; name resources as nodes offer them, "
                    "with a count from 1 on, such as rdma/hca_shared_devices: 1"
                )
        if self.kueue_queue and self.volcano_queue:
            raise ValueError("kubernetes.kueue_queue and kubernetes.volcano_queue: one of them schedules the pods")
