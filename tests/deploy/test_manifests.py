"""Image, compose file and Kubernetes manifests: valid by schema, and consistent with the gate."""

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.policy.file import read_policy

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose" / "compose.yaml"
OVERLAYS = sorted(path.name for path in (DEPLOY / "kubernetes" / "overlays").iterdir())
KUBERNETES = ("1.29", "1.32", "1.35")
OPERATORS = {"PodMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, whose schemas are not part of Kubernetes."""

SECRETS = {"VLLM_API_KEY": "key", "GRAFANA_PASSWORD": "password"}


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, **options
    )


def needs(program):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"needs {program}")


def test_the_image_is_linted():
    done = run(Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_image_gets_all_that_the_package_is_built_from():
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [part for line in lines if line.startswith("COPY") and "--from" not in line
              for part in line.split()[1:-1]]  # fmt: skip
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines()
              if line.startswith("!")]  # fmt: skip
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)


def test_the_deployed_policy_and_the_recommended_one_are_valid():
    assert read_policy(DEPLOY / "policy" / "policy.yaml").mode == "audit"
    recommended = read_policy(DEPLOY / "policy" / "repair.yaml")
    assert recommended.mode == "enforce"
    assert recommended.repair is not None


@needs("docker-compose")
def test_the_compose_file_is_valid(tmp_path):
    services = yaml.safe_load(COMPOSE.read_text())
    services.pop("name")  # the checking program does not support it yet
    (tmp_path / "compose.yaml").write_text(yaml.safe_dump(services))
    check = ("docker-compose", "--project-directory", COMPOSE.parent, "-f",
             tmp_path / "compose.yaml", "config", "-q")  # fmt: skip
    done = run(*check, env=os.environ | SECRETS)
    assert done.returncode == 0, done.stderr
    without = run(*check, env={"PATH": os.environ["PATH"]})
    assert without.returncode != 0
    assert "Missing mandatory value" in without.stderr


def test_all_that_the_compose_file_mounts_is_there():
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    mounts = [mount.split(":")[0] for one in services.values() for mount in one["volumes"]]
    files = [mount for mount in mounts if mount.startswith(".")]
    assert len(files) == 6
    for file in files:
        assert (COMPOSE.parent / file).is_file(), file


@needs("promtool")
def test_prometheus_takes_its_configuration(tmp_path):
    shutil.copy(DEPLOY / "compose" / "prometheus.yaml", tmp_path)
    shutil.copy(DEPLOY / "prometheus" / "s3lora.rules.yaml", tmp_path)
    done = run("promtool", "check", "config", tmp_path / "prometheus.yaml")
    assert done.returncode == 0, done.stderr
    assert "1 rule files found" in done.stdout


@cache
def rendered(overlay):
    done = run("kubectl", "kustomize", DEPLOY / "kubernetes" / "overlays" / overlay)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@needs("kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_each_overlay(overlay, version):
    unknown = set()
    for resource in rendered(overlay):
        try:
            kubernetes_validate.validate(resource, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            unknown.add(resource["kind"])
    assert unknown == OPERATORS


@needs("kubectl")
def test_a_mistake_in_a_manifest_is_noticed():
    deployment = find("gpu", "Deployment")
    deployment = deployment | {"spec": deployment["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


@needs("kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_is_ready_only_when_guarded_and_has_no_right_it_does_not_need(overlay):
    pod = find(overlay, "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] == "/s3lora/status"
    assert pod["securityContext"]["runAsNonRoot"]
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert {name for name, mount in mounts.items() if mount.get("readOnly")} == {
        "policy", "adapters",
    }  # fmt: skip


@needs("kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_cluster_gets_is_what_is_tested_here(overlay):
    policy = find(overlay, "ConfigMap", "s3lora-policy")["data"]["policy.yaml"]
    assert policy == (DEPLOY / "policy" / "policy.yaml").read_text()
    board = find(overlay, "ConfigMap", "s3lora-dashboard")["data"]["s3lora-gate.json"]
    assert board == (DEPLOY / "grafana" / "s3lora-gate.json").read_text()
    rules = yaml.safe_load((DEPLOY / "prometheus" / "s3lora.rules.yaml").read_text())
    assert find(overlay, "PrometheusRule")["spec"] == rules


@needs("kubectl")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_selects_pods_selects_those_of_the_deployment(overlay):
    pod = find(overlay, "Deployment")["spec"]["template"]
    selecting = [
        one["spec"]["selector"] for one in rendered(overlay) if "selector" in one.get("spec", {})
    ]
    assert len(selecting) == {"cpu": 3, "gpu": 4}[overlay]
    for selector in selecting:
        labels = selector.get("matchLabels", selector)
        assert labels
        assert labels.items() <= pod["metadata"]["labels"].items()
    [endpoint] = find(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in pod["spec"]["containers"][0]["ports"]]


@pytest.fixture
def with_planner(tmp_path):
    """The overlay for GPUs with the planner's component."""
    kubernetes = DEPLOY / "kubernetes"
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(kubernetes / "overlays" / "gpu", tmp_path)],
        "components": [os.path.relpath(kubernetes / "components" / "planner", tmp_path)],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    done = run("kubectl", "kustomize", tmp_path)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    return {one["metadata"]["name"]: one for one in found if one["kind"] == "Deployment"}


@needs("kubectl")
@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_takes_the_planner(with_planner, version):
    for deployment in with_planner.values():
        kubernetes_validate.validate(deployment, version, strict=True)


@needs("kubectl")
def test_the_planner_alone_writes_plans_and_as_the_servers_user(with_planner):
    pods = {name: one["spec"]["template"] for name, one in with_planner.items()}
    users, writable = set(), {}
    for name, pod in pods.items():
        users.add(pod["spec"]["securityContext"]["runAsUser"])
        [container] = pod["spec"]["containers"]
        [mount] = [each for each in container["volumeMounts"] if each["name"] == "plans"]
        writable[name] = not mount.get("readOnly")
    assert len(users) == 1
    assert writable == {"s3lora-serve": False, "s3lora-planner": True}
    service = find("gpu", "Service")["spec"]["selector"]
    assert not service.items() <= pods["s3lora-planner"]["metadata"]["labels"].items()


@needs("kubectl")
def test_the_planners_command_line_is_one_that_it_takes(with_planner, tmp_path):
    [container] = with_planner["s3lora-planner"]["spec"]["template"]["spec"]["containers"]
    [program, *rest] = [*container["command"], *container["args"]]
    given = [each.replace("=/", f"={tmp_path}/") for each in rest]
    done = CliRunner().invoke(app, given)
    assert program == "s3lora"
    assert done.exit_code == 2
    assert "No such file or directory" in done.stderr  # all options are known; nothing is there


def find(overlay, kind, name=None):
    [found] = [
        one
        for one in rendered(overlay)
        if one["kind"] == kind and name in (None, one["metadata"]["name"])
    ]
    return found
