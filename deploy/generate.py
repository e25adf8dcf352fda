"""`make generate`: write what is made from other sources: files in deploy/, tables in docs/."""

from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy import doc_tables
from deploy.grafana.gate import gate

DEPLOY = Path(__file__).parent
NOTE = "# Written by `make generate` from deploy/prometheus/s3lora.rules.yaml: change it there.\n"


def generated() -> dict[Path, str]:
    """Path and content of each generated file."""
    return {
        DEPLOY / "grafana" / "s3lora-gate.json": dashboard(),
        DEPLOY / "kubernetes" / "base" / "prometheus-rule.yaml": prometheus_rule(),
    }


def dashboard() -> str:
    """The dashboard as JSON, in the format that Grafana imports."""
    return JSONEncoder(sort_keys=True, indent=1).encode(gate().build()) + "\n"


def prometheus_rule() -> str:
    """The rules as a PrometheusRule resource of the Prometheus operator."""
    rules = yaml.safe_load((DEPLOY / "prometheus" / "s3lora.rules.yaml").read_text())
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "s3lora"},
        "spec": rules,
    }
    return NOTE + yaml.safe_dump(resource, sort_keys=False, width=100)


if __name__ == "__main__":
    for path, text in (generated() | doc_tables.written()).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
