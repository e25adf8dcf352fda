"""A real Prometheus on a free port that scrapes the servers of a test."""

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import requests
import yaml

from tests.support.server import free_port

PROMETHEUS = shutil.which("prometheus")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="needs prometheus (Debian: prometheus)"
)
START_SECONDS = 60


@dataclass
class Prometheus:
    """Scrapes `host:port` targets of one job each second. Use as a context manager."""

    folder: Path
    job: str
    targets: list[str]
    rules: Path
    process: "subprocess.Popen[bytes] | None" = None
    port: int = 0

    def __enter__(self) -> Self:
        assert PROMETHEUS is not None
        self.folder.mkdir()
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(self.rules)],
            "scrape_configs": [
                {"job_name": self.job, "static_configs": [{"targets": self.targets}]}
            ],
        }
        (self.folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    PROMETHEUS,
                    f"--config.file={self.folder / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={self.folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdout=log,
                stderr=log,
            )
        self.until(lambda: [self.value("up")] == [1.0])
        return self

    def __exit__(self, *error: object) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait(20)

    def until(self, holds: Any) -> None:
        """Wait until a condition on scraped values holds."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                if holds():
                    return
            except requests.ConnectionError:
                pass
            time.sleep(0.5)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def get(self, path: str, **parameters: object) -> Any:
        answer = requests.get(
            f"http://127.0.0.1:{self.port}/api/v1/{path}", params=parameters, timeout=20
        ).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def value(self, expression: str) -> float | None:
        """The first current value of an expression, or None."""
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def series(self, expression: str, since: float) -> list[dict[str, Any]]:
        """Labels and values of an expression's series since a time, in seconds since 1970."""
        return [
            {"labels": one["metric"], "values": [float(value) for _, value in one["values"]]}
            for one in self.get(
                "query_range", query=expression, start=since, end=time.time(), step=2
            )["result"]
        ]
