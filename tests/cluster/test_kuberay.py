"""The RayJob manifest against the published schema of KubeRay, and against what a run needs."""

import gzip
import json
import math
import re
from functools import cache
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onetrain.cluster.kuberay import LONGEST_NAME, Job, dump, render, resource_name
from onetrain.cluster.kubernetes_options import CONFIG_VARIABLE, KubernetesOptions
from onetrain.cluster.options import ClusterOptions
from onetrain.cluster.recovery_options import RecoveryOptions

PUBLISHED = Path(__file__).parents[3] / "shared" / "kuberay" / "ray.io_rayjobs.yaml.gz"
DNS = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")


@cache
def schema():
    if not PUBLISHED.exists():
        pytest.skip(f"the published schema is not there: {PUBLISHED}")
    with gzip.open(PUBLISHED) as text:
        definition = yaml.load(text, yaml.CSafeLoader)
    (v1,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return v1["schema"]["openAPIV3Schema"]


def unknown_fields(value, allowed, where="$"):
    """Paths of a manifest that its schema does not name; the API server would drop them without a word."""
    if isinstance(value, list):
        return [
            path for i, part in enumerate(value) for path in unknown_fields(part, allowed["items"], f"{where}[{i}]")
        ]
    if not isinstance(value, dict) or allowed.get("x-kubernetes-preserve-unknown-fields"):
        return []
    named, others = allowed.get("properties", {}), allowed.get("additionalProperties")
    found = []
    for key, part in value.items():
        if key in named:
            found += unknown_fields(part, named[key], f"{where}.{key}")
        elif isinstance(others, dict):
            found += unknown_fields(part, others, f"{where}.{key}")
        elif others is not True:
            found.append(f"{where}.{key}")
    return found


def problems(manifest):
    """Everything the schema objects to. `metadata` is Kubernetes' own, which the schema leaves open."""
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(manifest["metadata"]) <= {"name", "namespace", "labels"}
    errors = [error.json_path for error in jsonschema.Draft202012Validator(schema()).iter_errors(manifest)]
    return errors + unknown_fields(manifest["spec"], schema()["properties"]["spec"], "$.spec")


def a_job(**values):
    given = {"name": "beauty", "config": "name: beauty\n", "submission": "{}", "ray_version": "2.60.0"}
    return Job(**(given | values))


def rendered(job=None, cluster=None, recovery=None, **options):
    options = KubernetesOptions(**({"image": "registry/onetrain:1", "storage_claim": "shared"} | options))
    return render(job or a_job(), cluster or ClusterOptions(), recovery or RecoveryOptions(), options)


def workers(manifest):
    return manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]


def head(manifest):
    return manifest["spec"]["rayClusterSpec"]["headGroupSpec"]


def container(group):
    (only,) = group["template"]["spec"]["containers"]
    return only


word = st.from_regex(r"[a-z][a-z0-9-]{0,8}[a-z0-9]", fullmatch=True)
variable = st.from_regex(r"[A-Z][A-Z0-9]{1,6}_IF", fullmatch=True)
amount = st.builds("{}{}".format, st.integers(1, 999), st.sampled_from(["Gi", "Mi", "G"]))
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30)
sizes = st.builds(
    dict,
    gpus=st.integers(0, 4),
    gpus_per_node=st.integers(1, 8),
    workers_per_node=st.none() | st.integers(1, 8),
    pods=st.integers(1, 5),
    min_workers=st.none() | st.integers(1, 40),
)
options = st.fixed_dictionaries(
    {},
    optional={
        "namespace": word,
        "memory_per_node": amount,
        "shared_memory": amount,
        "head_cpus": st.integers(1, 8),
        "head_memory": amount,
        "env": st.dictionaries(variable, texts, max_size=3),
        "secret_env": st.dictionaries(variable, st.builds("{}/{}".format, word, word), max_size=2),
        "extended_resources": st.dictionaries(st.builds("rdma/{}".format, word), st.integers(1, 8), max_size=2),
        "node_selector": st.dictionaries(word, word, max_size=2),
        "tolerations": st.lists(
            st.one_of(word, st.builds("{}={}:NoSchedule".format, word, word), st.builds("{}:NoExecute".format, word)),
            max_size=3,
        ).map(tuple),
        "service_account": word,
        "image_pull_secrets": st.lists(word, max_size=2).map(tuple),
        "labels": st.dictionaries(word, word, max_size=2),
        "token_auth": st.booleans(),
        "termination_grace_s": st.integers(1, 4000),
        "retries": st.integers(0, 9),
        "keep_s": st.integers(0, 9999),
        "deadline_s": st.none() | st.integers(1, 10**6),
    },
)
queues = st.sampled_from([{}, {"kueue_queue": "night"}, {"volcano_queue": "night"}])
storage = st.sampled_from([{"storage_claim": "shared", "storage_mount": "/mnt/x"}, {"storage_claim": None}])


@settings(max_examples=25)
@given(sizes=sizes, options=options, queue=queues, storage=storage, config=texts, builders=st.integers(0, 20))
def test_every_manifest_fits_the_schema_and_the_run(sizes, options, queue, storage, config, builders):
    gpus, per_node = sizes["gpus"], sizes["workers_per_node"]
    fits = sizes["gpus_per_node"] // gpus if gpus else per_node or 1
    per_pod = per_node or fits
    assume(0 < per_pod <= fits)
    cluster = ClusterOptions(workers=per_pod * sizes["pods"], gpus_per_worker=gpus, cpus_per_worker=1.5)
    path = "/mnt/x/runs" if storage["storage_claim"] else "s3://bucket/runs"
    manifest = rendered(
        a_job(config=config, paths={"storage_path": path}, builder_cpus=builders),
        cluster,
        RecoveryOptions(min_workers=sizes["min_workers"]),
        gpus_per_node=sizes["gpus_per_node"],
        workers_per_node=per_node,
        **{**options, **queue, **storage},
    )
    assert problems(manifest) == []
    assert yaml.safe_load(dump(manifest)) == manifest

    group = workers(manifest)
    pod = container(group)
    assert group["replicas"] == group["maxReplicas"] == sizes["pods"]
    wanted = min(sizes["min_workers"] or cluster.workers, cluster.workers)
    assert (group["minReplicas"] - 1) * per_pod < wanted <= group["minReplicas"] * per_pod
    limits = pod["resources"]["limits"]
    assert int(limits.get("nvidia.com/gpu", 0)) * sizes["pods"] == cluster.workers * gpus
    ray_cpus = int(group["rayStartParams"]["num-cpus"])
    assert ray_cpus == int(limits["cpu"])
    assert ray_cpus * sizes["pods"] >= cluster.workers * 1.5 + builders
    assert head(manifest)["rayStartParams"]["num-cpus"] == "0"
    claims = [v.get("persistentVolumeClaim") for g in (group, head(manifest)) for v in g["template"]["spec"]["volumes"]]
    assert claims.count({"claimName": "shared"}) == (2 if storage["storage_claim"] else 0)
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace == options.get("termination_grace_s", 300)
    hook = int(pod["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert 1 <= hook < max(grace, 2)
    assert (
        next(filled_in(v["value"]) for v in container(head(manifest))["env"] if v["name"] == CONFIG_VARIABLE) == config
    )
    for name, value in options.get("env", {}).items():
        assert {filled_in(v["value"]) for v in pod["env"] if v["name"] == name} == {value}


def filled_in(value):
    """What a container finds: as Kubernetes expands $(NAME), where $$ is a dollar sign."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda match: "$" if match[0] == "$$" else f"expanded {match[1]}", value)


@settings(max_examples=25)
@given(data=st.data())
def test_the_check_sees_an_unknown_field_anywhere(data):
    cluster = ClusterOptions(workers=4, gpus_per_worker=1)
    manifest = json.loads(
        json.dumps(rendered(cluster=cluster, tolerations=("a",), secret_env={"A": "b/c"}, env={"B": ""}))
    )
    place, free = manifest["spec"], ("rayStartParams", "limits", "requests")
    while inner := [
        (k, v)
        for k, v in (place.items() if isinstance(place, dict) else enumerate(place))
        if isinstance(v, dict | list)
    ]:
        key, below = data.draw(st.sampled_from(inner))
        if key in free or (isinstance(below, list) and not isinstance(below[0], dict)) or data.draw(st.booleans()):
            break
        place = below
    place = place[0] if isinstance(place, list) else place
    place["replica"] = 1
    assert any(path.endswith(".replica") for path in problems(manifest))


def test_the_check_sees_wrong_types_and_words():
    manifest = rendered()
    workers(manifest)["replicas"] = "two"
    manifest["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "tokens"
    del head(manifest)["template"]
    assert len(problems(manifest)) == 3


def test_secrets_are_references_and_rdma_may_pin_memory():
    cluster = ClusterOptions(workers=16, gpus_per_worker=1)
    manifest = rendered(
        cluster=cluster, secret_env={"WANDB_API_KEY": "wandb/api-key"}, extended_resources={"rdma/hca": 1}
    )
    for group in (head(manifest), workers(manifest)):
        reference = {"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "api-key"}}}
        assert reference in container(group)["env"]
    assert container(workers(manifest))["securityContext"] == {"capabilities": {"add": ["IPC_LOCK"]}}
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in workers(manifest)["template"]["spec"]["tolerations"]
    assert (workers(manifest)["replicas"], container(workers(manifest))["resources"]["limits"]["rdma/hca"]) == (2, "1")


def test_queues_are_labels():
    assert rendered(kueue_queue="q")["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "q"
    labels = rendered(volcano_queue="q")["metadata"]["labels"]
    assert (labels["ray.io/scheduler-name"], labels["volcano.sh/queue-name"]) == ("volcano", "q")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": ""}, "kubernetes.image"),
        (
            {"storage_claim": None, "job": a_job(paths={"storage_path": "/runs"})},
            "storage_path.*kubernetes.storage_claim",
        ),
        ({"job": a_job(paths={"data.prepared": "/elsewhere/x"})}, "data.prepared.*--set data.prepared=/mnt/onetrain/x"),
        ({"cluster": ClusterOptions(workers=10, gpus_per_worker=1)}, "do not divide"),
        ({"cluster": ClusterOptions(gpus_per_worker=9)}, "gpus_per_node only 8"),
        ({"cluster": ClusterOptions(workers=9, gpus_per_worker=1), "workers_per_node": 9}, "workers_per_node is 9"),
        ({"cpus_per_node": 1, "workers_per_node": 2}, "reserve 2"),
        ({"job": a_job(config="x" * 140_000)}, "too long"),
    ],
)
def test_what_does_not_go_together_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        rendered(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"env": {"WANDB_API_KEY": "x"}},
        {"secret_env": {"A": "secret"}},
        {"memory_per_node": "lots"},
        {"tolerations": ("a=b:Never",)},
        {"extended_resources": {"rdma": 1}},
        {"kueue_queue": "a", "volcano_queue": "b"},
        {"storage_mount": "x"},
        {"retries": -1},
    ],
)
def test_options_out_of_range(values):
    with pytest.raises(ValueError, match=rf"kubernetes\.{next(iter(values))}"):
        KubernetesOptions(**values)


@settings(max_examples=30)
@given(st.lists(st.from_regex(r"\w[\w.=+-]{0,60}", fullmatch=True), min_size=2, max_size=6, unique=True))
def test_names_are_valid_and_never_shared(runs):
    names = [resource_name(run) for run in runs]
    assert len(set(names)) == len(runs)
    assert all(DNS.fullmatch(name) and len(name) <= LONGEST_NAME for name in names)


def test_one_pod_holds_fewer_ranks_than_a_node_has_gpus():
    manifest = rendered(cluster=ClusterOptions(workers=4, gpus_per_worker=1))
    assert (
        math.prod(
            (workers(manifest)["replicas"], int(container(workers(manifest))["resources"]["limits"]["nvidia.com/gpu"]))
        )
        == 4
    )
