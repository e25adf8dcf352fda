"""The gate's routes: each is documented, and says so while the gate is off."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from s3lora_serve.vllm_plugin.api.routes import GateRoutes

OPERATING = Path(__file__).parents[2] / "docs" / "operating.md"


@pytest.fixture
def app(monkeypatch):
    """A server's routes while the mode is off; loading at run time is open."""
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    app = FastAPI()
    app.state.args = SimpleNamespace(api_key=None)
    GateRoutes(lambda: None).attach_router(app)
    return app


def routes(app):
    return {
        (method, re.sub(r"\{name(:path)?\}", "NAME", route.path))
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }


def test_each_route_is_in_the_table(app):
    rows = re.findall(r"^\| (`(?:GET|POST|DELETE).*?) \|", OPERATING.read_text(), re.MULTILINE)
    named = {
        (method, path)
        for row in rows
        for methods, path in re.findall(r"`((?:GET|POST|DELETE)[^/]*) (/[^`?]*)", row)
        for method in methods.split(", ")
    }
    assert routes(app) == named


def test_each_route_says_that_the_gate_is_off(app):
    client = TestClient(app)
    bodies = {"lora_name": "a", "lora_path": "/a"}
    for method, path in routes(app) - {
        ("GET", "/s3lora/status"),
        ("POST", "/v1/load_lora_adapter"),
    }:
        answer = client.request(method, path, json=bodies if method == "POST" else None)
        assert answer.status_code == 404, path
        assert answer.json() == {"error": "the gate is off: nothing is looked at"}
