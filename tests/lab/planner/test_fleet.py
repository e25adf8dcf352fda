"""What a planner reads of servers, also of such as are none."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from s3lora_serve.adapter.private_copy import copy_adapter
from s3lora_serve.errors import ServerFailed
from s3lora_serve.lab.planner import fleet
from s3lora_serve.lab.planner.fleet import FleetServer, holds
from s3lora_serve.policy.limits import Limits
from tests.support.adapters import WEIGHTS, copy_with


@pytest.fixture
def answers():
    """Bodies by path, without its query; the first of several is given once."""
    return {}


@pytest.fixture
def server(answers):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            bodies = answers.get(self.path.partition("?")[0])
            body = bodies if isinstance(bodies, str | None) else bodies.pop(0)
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write((body or "").encode())

        def log_message(self, *_):
            pass

    own = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=own.serve_forever, daemon=True).start()
    yield FleetServer(f"http://127.0.0.1:{own.server_port}/")
    own.shutdown()
    own.server_close()


def verdict(name, **more):
    own = {"name": name, "path": f"/adapters/{name}", "digest": "sha256:1", "plan_digest": None,
           "config_digest": "sha256:c", "selected_by": "index", "decision": "admitted"}  # fmt: skip
    return own | more


def test_all_pages_are_read_and_experiments_and_unread_adapters_left_out(
    server, answers, monkeypatch
):
    monkeypatch.setattr(fleet, "PAGE", 2)
    pages = [
        [verdict("a"), verdict("eval/x")],
        [verdict("b", digest=None), verdict("c", selected_by="plan", plan_digest="sha256:p")],
        [],
    ]
    answers["/s3lora/adapters"] = [json.dumps({"adapters": page}) for page in pages]
    answers["/s3lora/experiments"] = json.dumps({"registered": ["eval/x"]})
    found = {each.name: each.plan_digest for each in server.adapters()}
    assert found == {"a": None, "c": "sha256:p"}


@pytest.mark.parametrize(
    ("said", "plan"),
    [
        ({"selected_by": "plan", "decision": "stripped"}, "sha256:p"),
        ({"selected_by": "repair", "decision": "stripped"}, "sha256:p"),  # it keeps all modules
        ({"selected_by": "plan", "decision": "rejected"}, None),  # in audit mode
    ],
)
def test_a_plan_is_obeyed_unless_it_is_refused(server, answers, said, plan):
    shown = [verdict("a", plan_digest="sha256:p", **said)]
    answers["/s3lora/adapters"] = json.dumps({"adapters": shown})
    assert [each.plan_digest for each in server.adapters()] == [plan]


@pytest.mark.parametrize(
    ("body", "takes"),
    [
        ('{"policy": {"plans": "/srv/plans"}}', True),
        ('{"policy": {"plans": null}}', False),
        ("no JSON", True),
    ],
)
def test_a_server_takes_plans_unless_its_policy_says_otherwise(server, answers, body, takes):
    answers["/s3lora/policy"] = body
    assert server.takes_plans() is takes


@pytest.mark.parametrize("body", ["", "<html>", "[]", "{}", '{"adapters": 3}', '{"adapters": [1]}'])
@pytest.mark.parametrize("experiments", [None, "<html>", "{}", '{"registered": []}'])
def test_what_is_no_guarded_server_is_said_so(server, answers, body, experiments):
    answers["/s3lora/adapters"] = body
    answers["/s3lora/experiments"] = experiments
    with pytest.raises(ServerFailed, match="S3LORA-914: http://127"):
        server.adapters()


def test_adapters_at_work_are_those_that_the_metrics_name(server, answers):
    gauge = "vllm:lora_requests_info"
    labels = 'running_lora_adapters="acme/a,acme/b",waiting_lora_adapters="initech/c",max_lora="2"'
    former = 'running_lora_adapters="acme",waiting_lora_adapters="",max_lora="2"'
    answers["/metrics"] = (
        f"# TYPE {gauge} gauge\n{gauge}{{{labels}}} 9.0\n{gauge}{{{former}}} 8.0\n"
    )
    assert server.at_work(["acme/a", "acme", "initech/c", "2x"]) == {"acme/a", "initech/c"}
    answers["/metrics"] = "not { metrics"
    assert server.at_work(["acme/a"]) == set()


def test_a_server_that_is_gone_is_said_so():
    with pytest.raises(ServerFailed, match="S3LORA-914"):
        FleetServer("http://127.0.0.1:9").adapters()


def test_a_folder_is_compared_by_its_weights(trained, tmp_path):
    digest = copy_adapter(trained, Limits()).digest
    assert holds(str(trained), digest)
    other = copy_with(trained, tmp_path / "other")
    (other / WEIGHTS).write_bytes(b"nothing")
    assert not holds(str(other), digest)
    assert not holds("/nowhere", digest)
