"""The gate asks for the API key on routes that vLLM itself leaves open."""

import base64

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route
from starlette.testclient import TestClient

from s3lora_serve.vllm_plugin.api.api_key import ApiKeyGate

PATHS = ("/adapters", "/adapters/acme/a", "/s3lora", "/s3lora/adapters", "/s3lora/status", "/v1/x")


def client(*keys: str, root_path: str = "") -> TestClient:
    async def answer(_request):
        return PlainTextResponse("in")

    methods = ["GET", "POST", "DELETE"]
    app = Starlette(routes=[Route(path, answer, methods=methods) for path in PATHS])
    app.add_middleware(ApiKeyGate, keys=list(keys))
    if root_path:
        app = Starlette(routes=[Mount(root_path, app)])
    return TestClient(app)


def basic(password: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("path", PATHS)
def test_without_a_key_all_routes_are_open(path):
    assert client().get(path).status_code == 200


@pytest.mark.parametrize("path", ["/adapters", "/adapters/acme/a", "/s3lora", "/s3lora/adapters"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
@pytest.mark.parametrize(
    "headers", [{}, bearer("wrong"), bearer(""), {"Authorization": "the key"}, basic("wrong")]
)
def test_with_a_key_the_gates_routes_require_it(path, method, headers):
    assert client("the key").request(method, path, headers=headers).status_code == 401


@pytest.mark.parametrize(
    "path",
    ["/adapters/", "/adapters//", "/s3lora/", "/adapters%0A", "/adapters/x%0A", "/s3lora%0d"],
)
def test_trailing_slashes_and_newlines_open_nothing(path):
    assert client("the key").post(path).status_code == 401


def test_any_of_several_keys_opens_and_a_prefix_of_one_does_not():
    served = client("one key", "another")
    assert served.get("/adapters", headers=bearer("another")).status_code == 200
    assert served.get("/adapters", headers=bearer("one key")).status_code == 200
    assert served.get("/adapters", headers=bearer("one")).status_code == 401


def test_browsers_may_send_the_key_as_password_to_pages_only():
    served = client("the key")
    assert served.get("/s3lora", headers=basic("the key")).status_code == 200
    assert served.get("/adapters", headers=basic("the key")).status_code == 401
    assert served.get("/s3lora", headers={"Authorization": b"Basic \xfc"}).status_code == 401
    challenge = served.get("/s3lora").headers["WWW-Authenticate"]
    assert challenge.startswith("Basic")


@pytest.mark.parametrize("path", ["/s3lora/status", "/v1/x"])
def test_the_probe_and_what_vllm_guards_itself_pass(path):
    assert client("the key").get(path).status_code == 200


def test_a_mounted_app_is_guarded_too():
    assert client("the key", root_path="/gateway").get("/gateway/adapters").status_code == 401
