"""The gate's HTTP routes follow the server's OpenAPI document for valid and invalid requests."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server import OPEN_LOADING, Server

pytestmark = [pytest.mark.serving, pytest.mark.slow]

ROUTES = {
    ("get", "/s3lora/status"), ("get", "/s3lora/"), ("get", "/s3lora/policy"),
    ("get", "/s3lora/adapters"), ("get", "/s3lora/adapters/{name}"), ("post", "/s3lora/recheck"),
    ("post", "/s3lora/scan"), ("post", "/v1/load_lora_adapter"),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(model, trained, policy_file, workplace):
    environment = OPEN_LOADING | {"S3LORA_POLICY": str(policy_file)}
    with Server(model, workplace / "openapi.log", (), environment) as server:
        assert server.load("acme", trained).status_code == 200
        yield server


def test_every_route_is_documented_with_what_it_answers(server):
    paths = server.get("/openapi.json").json()["paths"]
    ours = {
        (method, path): operation
        for path, operations in paths.items()
        for method, operation in operations.items()
        if operation.get("tags") == ["s3lora"]
    }
    assert set(ours) == ROUTES
    for operation in ours.values():
        assert operation["description"]
        assert "422" not in operation["responses"]


def test_schemathesis_finds_nothing(server, workplace):
    """Valid and invalid requests cause no crash and no undocumented answer."""
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", server.url("/openapi.json"),
        "--include-path-regex", "^/s3lora", "--checks", "all", "--max-examples", "40",
        "--generation-deterministic", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=workplace, timeout=500
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # vLLM itself logs the traceback of a failed download, so only our files are searched for.
    assert not re.search('File ".*/s3lora_serve/', server.log.read_text())
