"""Plans on a real engine: an adapter with a plan answers as one written with its new factors.

Experiments beside them: they change what the policy opens, and end when it closes that.
"""

import hashlib
import json
import shutil
import time

import pytest
from typer.testing import CliRunner

from s3lora_serve.cli import app
from s3lora_serve.errors import EvaluationFailed
from s3lora_serve.lab.evaluation.server import GuardedServer
from s3lora_serve.lab.evaluation.trials import Trial
from tests.serving.conftest import answers, evicting_server
from tests.serving.test_offline import ALONE, ONCE, generate
from tests.support.adapters import WEIGHTS, copy_with, key
from tests.support.plans import install, keep_out, plan_for, read
from tests.support.server import TWO_RANKS, Server

pytestmark = pytest.mark.serving

OPEN = 'experiments: {names: "eval/*", allow: [strip]}'
POLICY = f"""
strip: {{top_k: 0}}
{OPEN}
rules:
  - {{match: {{adapter: "must-*"}}, require_plan: true}}
  - {{match: {{adapter: "eval/must-*"}}, require_plan: true}}
...
"""
STRIPPED = frozenset({"model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"})


@pytest.fixture(scope="module")
def plan(trained):
    """Takes the main directions of A from all modules but two, which it strips, and one kept."""
    modules = read(trained).modules[1:]
    bent = {m.name: keep_out(m.A, 3) for m in modules if m.name not in STRIPPED}
    return plan_for(read(trained), bent, STRIPPED)


@pytest.fixture(scope="module")
def by_hand(trained, plan, workplace):
    """The adapter that the plan describes, written without the gate."""

    def change(tensors):
        for module in plan.modules:
            if module.action == "transform":
                name = key(module.name, "B")
                new = tensors[name].double() @ module.matrix().double()
                tensors[name] = new.to(tensors[name].dtype)
            elif module.action == "strip":
                del tensors[key(module.name, "A")], tensors[key(module.name, "B")]

    return copy_with(trained, workplace / "planned by hand", change)


@pytest.fixture(scope="module")
def plans(plan, workplace):
    folder = workplace / "plans"
    install(plan, folder)
    return folder


@pytest.fixture(scope="module")
def server(model, plans, workplace):
    policy = workplace / "plans.yaml"
    policy.write_text(POLICY)
    with evicting_server(model, workplace, "plans", policy, S3LORA_PLANS=str(plans)) as server:
        yield server


@pytest.fixture(scope="module")
def expected(server, by_hand, trained, plans, plan):
    """Answers of the adapter written by hand; those of the adapter as it was trained differ."""
    assert server.load("by-hand", by_hand).status_code == 200
    file = plans / f"{plan.adapter_digest.removeprefix('sha256:')}.json"
    aside = file.rename(plans.parent / "aside.json")
    assert server.load("whole", trained).status_code == 200
    aside.rename(file)
    found = {name: answers(server, name) for name in ("base", "by-hand", "whole")}
    assert found["by-hand"] != found["whole"]
    assert found["by-hand"] != found["base"]
    return found["by-hand"]


def refused(response, code):
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["type"] == "AdapterRejected"
    assert error["message"].startswith(f"{code}: ")


def test_a_planned_adapter_answers_as_one_written_with_its_new_factors(
    server, expected, trained, spiked, plan, plans, tmp_path, workplace
):
    before = server.metrics()['s3lora_selections_total{selected_by="plan"}']
    folder = copy_with(trained, tmp_path / "tenant")
    response = server.load("must-have", folder)
    assert (response.status_code, response.headers["X-S3LoRA-Decision"]) == (200, "stripped")
    assert answers(server, "must-have") == expected
    verdict = server.get("/s3lora/adapters/must-have").json()
    assert (verdict["selected_by"], verdict["plan_digest"]) == ("plan", plan.digest)
    assert (
        verdict["digest"] == "sha256:" + hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    )
    stored = [hashlib.sha256(file.read_bytes()).hexdigest()
              for file in (workplace / "plans-state").glob(f"s3lora-*/*/{WEIGHTS}")]  # fmt: skip
    assert verdict["served_digest"].removeprefix("sha256:") in stored
    assert server.metrics()['s3lora_selections_total{selected_by="plan"}'] == before + 1
    page = server.get("/s3lora/?adapter=must-have").text
    assert plan.digest in page
    line = json.loads((workplace / "plans-audit.jsonl").read_text().splitlines()[-1])
    assert (line["plan_digest"], line["served_digest"]) == (plan.digest, verdict["served_digest"])
    assert f"plan {plan.digest} strips 2 of 28 modules" in server.log.read_text()
    # Evicted, and loaded again without its folder and its plan.
    shutil.rmtree(folder)
    file = next(plans.iterdir())
    aside = file.rename(tmp_path / "aside.json")
    for i in range(2):
        assert server.load(f"filler-{i}", spiked).status_code == 200
        assert answers(server, f"filler-{i}")
    assert answers(server, "must-have") == expected
    aside.rename(file)
    reloads = server.metrics()['s3lora_reloads_total{source="store"}']
    assert reloads >= 1


def test_another_configuration_under_a_plans_weights_is_refused(server, trained, tmp_path):
    folder = copy_with(trained, tmp_path / "other", lora_alpha=32)
    refused(server.load("other-config", folder), "S3LORA-208")


def test_an_adapter_without_a_plan_is_refused_where_one_is_required(server, spiked):
    refused(server.load("must-not", spiked), "S3LORA-207")
    assert server.load("need-not", spiked).status_code == 200


def test_plans_that_others_can_write_refuse_adapters_until_that_is_put_right(
    server, expected, trained, spiked, plans
):
    plans.chmod(0o777)
    refused(server.load("open", trained), "S3LORA-208")
    refused(server.load("open", spiked), "S3LORA-208")
    plans.chmod(0o755)
    assert server.load("open", trained).status_code == 200
    assert answers(server, "open") == expected


def test_recheck_says_that_a_plan_changed_vanished_or_appeared(server, trained, plans, plan):
    assert server.load("rechecked", trained).status_code == 200
    file = next(plans.iterdir())
    text = file.read_text()

    def recheck():
        found = server.post("/s3lora/recheck").json()["adapters"]
        table = CliRunner().invoke(app, ["recheck", server.url("")], env={"COLUMNS": "250"})
        [one] = [each for each in found if each["name"] == "rechecked"]
        return one["differs"], one["after"], table.stdout

    differs, after, _ = recheck()
    assert not differs
    assert after["plan_digest"] == plan.digest
    file.write_text(json.dumps(plan.as_json() | {"seed": 9}))
    differs, after, table = recheck()
    assert differs
    assert after["selected_by"] == "plan"
    assert "its plan changed to sha256:" in table
    file.unlink()
    differs, after, table = recheck()
    assert (differs, after["selected_by"], after["decision"]) == (True, "index", "admitted")
    assert "its plan is gone" in table
    assert server.load("rechecked", trained, load_inplace=True).status_code == 200
    assert not recheck()[0]
    file.write_text(text)
    assert "a plan appeared: sha256:" in recheck()[2]


@pytest.fixture
def policy(server, workplace):
    """The server's policy file, which a test may change; afterwards the old one is in force."""
    file = workplace / "plans.yaml"
    yield file
    file.write_text(POLICY)
    for name in server.get("/s3lora/experiments").json()["registered"]:
        server.request("DELETE", f"/s3lora/experiments/{name}").raise_for_status()


def experiment(server, name, folder, **strip):
    settings = {"strip": strip} if strip else {}
    body = {"lora_name": name, "lora_path": str(folder), "settings": settings}
    return server.post("/s3lora/experiments", **body)


def rechecked(server, name):
    found = server.post("/s3lora/recheck").json()["adapters"]
    [one] = [each for each in found if each["name"] == name]
    return one


def wait_for_the_end(server, name, workplace):
    """Wait until an experiment is unloaded; its last line in the audit log."""
    deadline = time.monotonic() + 60
    while name in {card["id"] for card in server.get("/v1/models").json()["data"]}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.get("/s3lora/experiments").json()["registered"] == []
    while True:  # the line follows the end
        log = (workplace / "plans-audit.jsonl").read_text().splitlines()
        own = [line for line in map(json.loads, log) if line["adapter"] == name]
        for line in own:  # beside that of the unload
            if line["event"] == "experiment_ended":
                return line
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_experiment_without_the_plan_that_the_policy_requires_is_refused(server, spiked):
    refused(experiment(server, "eval/must-not", spiked), "S3LORA-207")
    assert server.get("/s3lora/experiments").json()["registered"] == []


def test_an_experiment_obeys_an_adapters_plan_unless_the_policy_opens_plans(
    server, policy, trained, plan
):
    made = experiment(server, "eval/planned", trained, top_k=1).json()
    assert (made["selected_by"], made["plan_digest"]) == ("plan", plan.digest)
    evaluated = GuardedServer(server.url("")).experiment(
        "eval/compared", str(trained), Trial("top_k=1", {"strip": {"top_k": 1}})
    )
    with pytest.raises(EvaluationFailed, match="add plan to experiments"), evaluated:
        pass
    policy.write_text(POLICY.replace("[strip]", "[strip, plan]"))
    opened = experiment(server, "eval/opened", trained, top_k=1).json()
    assert opened["selected_by"] == "index"
    assert sum(module["stripped"] for module in opened["modules"]) == 1


@pytest.mark.parametrize(
    ("closed", "code"),
    [
        ("", "S3LORA-211"),
        (OPEN.replace("[strip]", "[action]"), "S3LORA-211"),
        (OPEN.replace("eval", "tests"), "S3LORA-210"),
    ],
    ids=["all", "its setting", "its name"],
)
def test_closing_what_an_experiment_uses_ends_it_and_both_logs_say_so(
    server, policy, spiked, workplace, closed, code
):
    name = f"eval/{code}{len(closed)}"
    assert experiment(server, name, spiked, top_k=1).status_code == 200
    policy.write_text(POLICY.replace(OPEN, closed))
    one = rechecked(server, name)  # it has the server read the policy, as any registration has
    assert one["differs"]
    assert one["experiment"] == {
        "settings": {"strip": {"top_k": 1}}, "plan_digest": None, "closed": True,
    }  # fmt: skip
    assert one["after"]["reason"]["code"] == code
    line = wait_for_the_end(server, name, workplace)
    assert (line["reason"], line["path"]) == (code, str(spiked))
    assert f"experiment '{name}' is unloaded: {code}" in server.log.read_text()
    body = {"model": name, "prompt": "Q", "max_tokens": 1}
    assert server.post("/v1/completions", **body).status_code == 404


def test_an_experiment_ends_once_its_time_to_live_has_passed(server, policy, spiked, workplace):
    policy.write_text(POLICY.replace("[strip]", "[strip], ttl: 0.5"))
    assert experiment(server, "eval/brief", spiked).status_code == 200
    assert wait_for_the_end(server, "eval/brief", workplace)["reason"] == "S3LORA-211"
    assert "experiments.ttl is 0.5 s" in server.log.read_text()


def test_recheck_shows_an_experiment_with_its_settings_under_the_policy_in_force(
    server, policy, spiked
):
    made = experiment(server, "eval/kept", spiked, top_k=2).json()
    one = rechecked(server, "eval/kept")
    assert (one["differs"], one["experiment"]["closed"]) == (False, False)
    assert one["experiment"]["settings"] == {"strip": {"top_k": 2}}
    assert sum(module["stripped"] for module in one["after"]["modules"]) == 2
    table = CliRunner().invoke(app, ["recheck", server.url("")], env={"COLUMNS": "250"}).stdout
    assert '{"strip": {"top_k": 2}}' in table
    policy.write_text(f"deny: ['{made['digest']}']\n" + POLICY)
    one = rechecked(server, "eval/kept")
    assert (one["differs"], one["experiment"]["closed"]) == (True, False)
    assert one["after"]["reason"]["code"] == "S3LORA-202"
    assert server.get("/s3lora/experiments").json()["registered"] == ["eval/kept"]


def assert_alike(found, expected, accuracy):
    for ours, theirs in zip(found, expected, strict=True):
        for place, other in zip(ours, theirs, strict=True):
            assert place == pytest.approx(other, abs=accuracy)


def test_a_planned_adapter_first_used_by_llm_generate_answers_alike(
    model, expected, trained, plans
):
    found, log = generate(model, trained, trained, ONCE, S3LORA_PLANS=str(plans), **ALONE)
    assert_alike(found, expected, 1e-5)
    assert "strips 2 of 28 modules" in log


@pytest.mark.slow
def test_every_rank_serves_the_transformed_bytes(model, expected, trained, plans, tmp_path):
    environment = TWO_RANKS | {"S3LORA_PLANS": str(plans)}
    arguments = ("--tensor-parallel-size", "2", "--lora-modules", f"static={trained}")
    with Server(model, tmp_path / "ranks.log", arguments, environment) as ranks:
        # Two ranks add up partial sums, so the last bits differ from those of one worker.
        assert_alike(answers(ranks, "static"), expected, 1e-4)


def test_a_server_whose_plans_others_can_write_does_not_start(model, plan, tmp_path):
    install(plan, tmp_path / "plans")
    (tmp_path / "plans").chmod(0o757)
    environment = {"S3LORA_PLANS": str(tmp_path / "plans")}
    with pytest.raises(RuntimeError, match=r"S3LORA-901: plans: .*written by others"):
        Server(model, tmp_path / "log", (), environment).__enter__()


@pytest.mark.slow  # as with a bad policy; the check itself is tests/plans'
def test_an_engine_whose_plans_others_can_write_does_not_start(model, trained, tmp_path):
    """`s3lora serve` checks before it starts vLLM; here the plugin does."""
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans").chmod(0o777)
    with pytest.raises(AssertionError, match="S3LORA-901: plans: "):
        generate(model, trained, trained, ONCE, S3LORA_PLANS=str(tmp_path / "plans"))
