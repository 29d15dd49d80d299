"""docs/kubernetes/rayjob.yaml: fields and types as KubeRay documents them, and an entry point that efflaunch takes.

No package carries the schema of RayJob, so this is our own, of the fields that the manifest uses: those of RayJobSpec,
RayClusterSpec, HeadGroupSpec, WorkerGroupSpec and AuthOptions in "KubeRay CRD API reference" (docs.ray.io, ray.io/v1,
KubeRay 1.6), and of PodSpec and Container in the Kubernetes API reference (v1.28). Unknown keys are refused.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from efflaunch.launcher.config.compose import compose
from efflaunch.launcher.config.run_config import Backend, Config
from efflaunch.launcher.ray.request import STOP_MARGIN_S, check_ray, demand

FILE = Path(__file__).resolve().parent.parent.parent / "docs" / "kubernetes" / "rayjob.yaml"
CONSTRAINTS = FILE.parent.parent.parent / "constraints.txt"


def each(kind: Any) -> list[Any]:
    """A list of these."""
    return [kind]


QUANTITY = re.compile(r"^[0-9]+(\.[0-9]+)?(m|[KMGT]i?)?$")
TEXTS = {str: str}
RESOURCES = {"requests": {str: QUANTITY}, "limits": {str: QUANTITY}}
ENV = {"name!": str, "value": str}
VOLUME = {
    "name!": str,
    "persistentVolumeClaim": {"claimName!": str, "readOnly": bool},
    "emptyDir": {"medium": re.compile("^(Memory)?$"), "sizeLimit": QUANTITY},
}
CONTAINER = {
    "name!": re.compile("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"),
    "image!": str,
    "env": each(ENV),
    "envFrom": each({"secretRef": {"name!": str, "optional": bool}}),
    "resources": RESOURCES,
    "volumeMounts": each({"name!": str, "mountPath!": str}),
}
POD = {"terminationGracePeriodSeconds": int, "containers!": each(CONTAINER), "volumes": each(VOLUME)}
GROUP = {"rayStartParams": TEXTS, "template!": {"spec!": POD}}
WORKERS = {**GROUP, "groupName!": str, "replicas": int, "minReplicas": int, "maxReplicas": int}
CLUSTER = {
    "rayVersion": re.compile(r"^\d+\.\d+\.\d+$"),
    "authOptions": {"mode": re.compile("^(token|disabled)$"), "secretName": str},
    "headGroupSpec!": GROUP,
    "workerGroupSpecs": each(WORKERS),
}
JOB = {
    "entrypoint": str,
    "submissionMode": re.compile("^(K8sJobMode|HTTPMode|InteractiveMode|SidecarMode)$"),
    "runtimeEnvYAML": str,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "rayClusterSpec": CLUSTER,
}
RAY_JOB = {
    "apiVersion!": re.compile("^ray.io/v1$"),
    "kind!": re.compile("^RayJob$"),
    "metadata!": {"name!": re.compile("^[a-z]([-a-z0-9]{0,45}[a-z0-9])?$"), "namespace": str},
    "spec!": JOB,
}


def check(value: Any, schema: Any, path: str = "") -> None:
    """AssertionError, with the path, where `value` is not as `schema` says. `key!`: must be there."""
    if isinstance(schema, dict):
        assert isinstance(value, dict), path
        fields = {str(key).rstrip("!"): item for key, item in schema.items() if key is not str}
        for key, item in value.items():
            assert key in fields or str in schema, f"{path}.{key} is unknown"
            check(item, fields.get(key, schema.get(str)), f"{path}.{key}")
        missing = [key for key in schema if isinstance(key, str) and key.endswith("!") and key[:-1] not in value]
        assert not missing, f"{path}: no {missing}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, path
        for index, item in enumerate(value):
            check(item, schema[0], f"{path}[{index}]")
    elif isinstance(schema, re.Pattern):
        assert isinstance(value, str) and schema.match(value), f"{path}: {value!r}"
    else:
        assert type(value) is schema, f"{path}: {value!r}"


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


def entry(manifest: dict[str, Any]) -> Config:
    program, *words = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "efflaunch"
    return compose(words)


def test_fields_and_types(manifest: dict[str, Any]) -> None:
    check(manifest, RAY_JOB)
    for spoiled, message in (
        ({"backofLimit": 1}, "backofLimit is unknown"),
        ({"backoffLimit": "0"}, "'0'"),
        ({"rayClusterSpec": {}}, "no"),
    ):
        with pytest.raises(AssertionError, match=message):
            check({**manifest, "spec": {**manifest["spec"], **spoiled}}, RAY_JOB)


def test_the_entry_point_is_a_run_on_the_cluster_around_it(manifest: dict[str, Any]) -> None:
    config = entry(manifest)
    check_ray(config, None)
    assert config.launcher.backend is Backend.RAY and config.launcher.ray.address == "auto" and config.run.id is not None
    variables = yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(variables["RAY_JOB_STOP_WAIT_TIME_S"]) == config.launcher.grace_s + STOP_MARGIN_S


def test_the_cluster_has_what_the_run_needs(manifest: dict[str, Any]) -> None:
    config, cluster = entry(manifest), manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    pods = [workers["template"]["spec"], cluster["headGroupSpec"]["template"]["spec"]]
    limits = pods[0]["containers"][0]["resources"]["limits"]
    wanted = demand(config)
    assert workers["replicas"] >= config.cluster.num_nodes and float(limits["cpu"]) >= wanted["CPU"]
    assert float(limits["nvidia.com/gpu"]) == wanted["GPU"] and cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert pods[0]["terminationGracePeriodSeconds"] > config.launcher.grace_s
    for pod in pods:
        (container,) = pod["containers"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert any(config.run.root.startswith(mount["mountPath"]) for mount in container["volumeMounts"])
        assert {item["name"]: item["value"] for item in container["env"]}["RAY_USAGE_STATS_ENABLED"] == "0"
    assert f"ray=={cluster['rayVersion']}\n" in CONSTRAINTS.read_text()
