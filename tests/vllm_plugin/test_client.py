"""Who asked: the digest of the API key, and the client's address."""

import hashlib

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from s3lora_serve.vllm_plugin.api.client import ClientNote, asked_by


def asked_as(keys, **headers):
    """What a route of a server with these keys knows of a client that sends these headers."""

    async def answer(_request):
        asks = asked_by()
        return JSONResponse([asks.key, asks.address])

    app = Starlette(routes=[Route("/", answer)])
    app.add_middleware(ClientNote, keys=keys)
    return TestClient(app, client=("192.0.2.7", 4711)).get("/", headers=headers).json()


@pytest.mark.parametrize("key", ["one key", "another"])
def test_each_key_is_known_by_its_digest(key):
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    found = asked_as(["one key", "another"], Authorization=f"Bearer {key}")
    assert found == [digest, "192.0.2.7"]


@pytest.mark.parametrize("keys", [[], ["one key"]])
def test_a_key_that_is_none_of_the_servers_names_nobody(keys):
    assert asked_as(keys, Authorization="Bearer made up") == [None, "192.0.2.7"]


def test_outside_of_a_request_nobody_asks():
    assert asked_by() is None
