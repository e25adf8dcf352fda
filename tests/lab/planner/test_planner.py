"""Which adapter is calibrated next, and what becomes of plans and failures; no server is needed."""

from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from s3lora_serve.errors import BaseUnaligned, Reason, ServerFailed, TargetMissed
from s3lora_serve.lab.planner import plan_loads
from s3lora_serve.lab.planner.calibrator import CalibrationEnd
from s3lora_serve.lab.planner.fleet import Served
from s3lora_serve.lab.planner.plan_state import PlanState
from s3lora_serve.lab.planner.planner import Planner
from s3lora_serve.lab.planner.planner_metrics import PlannerMetrics


def digest(number):
    return f"sha256:{number:064x}"


class Server:
    """Serves what it is told, and takes plans of a folder."""

    url = "http://server"

    def __init__(self, plans):
        self.plans, self.names, self.busy, self.loads = plans, {}, set(), []
        self.answers, self.takes = True, True

    def serve(self, name, number, plan=None):
        path = f"/adapters/{name}"
        self.names[name] = Served(self.url, name, path, digest(number), "sha256:c", plan)

    def adapters(self):
        if not self.answers:
            raise ServerFailed("http://server: refused")
        return list(self.names.values())

    def takes_plans(self):
        return self.takes

    def at_work(self, names):
        return self.busy & set(names)

    def load_again(self, adapter):
        self.loads.append(adapter.name)
        number = int(adapter.digest.removeprefix("sha256:"), 16)
        if (self.plans / f"{adapter.digest.removeprefix('sha256:')}.json").exists():
            self.serve(adapter.name, number, "sha256:plan")

    def find(self, name):
        return self.names.get(name)


class Workers:
    """One worker whose calibrations end when a test says so."""

    def __init__(self):
        self.begun, self.futures, self.closed = [], [], False

    def free(self):
        return int(all(future.done() for future in self.futures))

    def submit(self, task):
        self.begun.append(int(task.digest.removeprefix("sha256:"), 16))
        self.futures.append(Future())
        return self.futures[-1]

    def end(self, **said):
        self.futures[-1].set_result(CalibrationEnd(**({"seconds": 10.0} | said)))

    def close(self):
        self.closed = True


@pytest.fixture
def fleet(plans, tmp_path, monkeypatch):
    """(planner, server, workers, lines, registry)."""
    monkeypatch.setattr(plan_loads, "holds", lambda *_: True)
    server, workers, lines, registry = Server(plans), Workers(), [], CollectorRegistry()
    state = PlanState(plans, tmp_path / "state", "inputs")
    planner = Planner([server], state, workers, PlannerMetrics(registry), lines.append)
    return planner, server, workers, lines, registry


def test_a_plan_is_written_and_taken_in_place(fleet, plans):
    planner, server, workers, lines, registry = fleet
    server.serve("acme/one", 1)
    server.serve("acme/other-name", 1)
    assert planner.round() == 1
    assert registry.get_sample_value("s3lora_planner_waiting") == 1
    workers.end(plan="{}", told="ASR 1.00 -> 0.02")
    assert planner.round() == 0
    assert server.loads == ["acme/one", "acme/other-name"]
    assert (plans / f"{1:064x}.json").read_text() == "{}\n"
    assert "plan made in 10 s, ASR 1.00 -> 0.02" in "\n".join(lines)
    assert lines[-1] == "'acme/other-name' on http://server obeys plan sha256:plan"
    assert registry.get_sample_value("s3lora_planner_plans_total", {"outcome": "made"}) == 1
    assert registry.get_sample_value("s3lora_planner_waiting") == 0
    assert planner.round() == 0
    assert len(server.loads) == 2


def test_a_server_whose_policy_names_no_plans_is_told_of_once(fleet):
    planner, server, _, lines, _ = fleet
    server.takes = False
    planner.round()
    planner.round()
    said = "http://server: its policy names no folder of plans, so it takes none"
    assert lines.count(said) == 1


def test_a_saved_search_is_gone_on_with(fleet, tmp_path):
    planner, server, _, lines, _ = fleet
    server.serve("acme/one", 1)
    (tmp_path / "state" / f"{1:064x}.search").write_bytes(b"")
    planner.round()
    assert lines[-1].endswith("calibration goes on with its saved search")


def test_a_server_that_does_not_take_a_plan_is_asked_once(fleet, plans):
    planner, server, workers, lines, _ = fleet
    server.load_again = lambda adapter: server.loads.append(adapter.name)
    server.serve("acme/one", 1)
    planner.round()
    workers.end(plan="{}")
    for _round in range(3):
        planner.round()
    assert server.loads == ["acme/one"]
    assert "does not obey its plan" in lines[-1]


def test_a_folder_that_was_replaced_meanwhile_is_left_alone(fleet, monkeypatch):
    planner, server, workers, lines, _ = fleet
    server.serve("acme/one", 1)
    planner.round()
    monkeypatch.setattr(plan_loads, "holds", lambda *_: False)
    workers.end(plan="{}")
    planner.round()
    assert server.loads == []
    assert "its folder holds other weights than are served" in lines[-1]


def test_a_tenant_with_many_adapters_takes_turns_with_the_others(fleet):
    planner, server, workers, _, _ = fleet
    for number in range(1, 7):
        server.serve(f"flood/{number}", number)
    server.serve("acme/one", 8)
    server.serve("initech/one", 9)
    for _round in range(4):
        planner.round()
        workers.end(plan="{}")
    tenants = Counter("flood" if number < 7 else number for number in workers.begun)
    assert tenants == {"flood": 2, 8: 1, 9: 1}


def test_among_one_tenants_adapters_those_with_traffic_come_first(fleet):
    planner, server, workers, _, _ = fleet
    for number in (1, 2, 3):
        server.serve(f"acme/{number}", number)
    server.busy = {"acme/3"}
    planner.round()
    assert workers.begun == [3]


def test_what_cannot_be_had_is_said_once_and_begun_no_more(fleet):
    planner, server, workers, lines, registry = fleet
    server.serve("acme/one", 1)
    planner.round()
    workers.end(reason=Reason.of(TargetMissed("the best is 0.30")))
    for _round in range(3):
        assert planner.round() == 0
    assert workers.begun == [1]
    assert sum("given up: S3LORA-908" in line for line in lines) == 1
    assert planner.has_failed
    assert registry.get_sample_value("s3lora_planner_given_up") == 1
    assert registry.get_sample_value("s3lora_planner_plans_total", {"outcome": "failed"}) == 1


def test_a_worker_that_dies_ends_no_planner(fleet):
    planner, server, workers, lines, _ = fleet
    server.serve("acme/one", 1)
    planner.round()
    workers.futures[-1].set_exception(RuntimeError("killed"))
    assert planner.round() == 1
    assert "tried again later: S3LORA-401: the worker died: RuntimeError: killed" in lines[-1]
    assert workers.begun == [1]


def test_a_server_that_does_not_answer_is_said_once_and_counted(fleet):
    planner, server, _, lines, registry = fleet
    server.answers = False
    for _round in range(3):
        planner.round()
    assert len(lines) == 1
    assert registry.get_sample_value("s3lora_planner_unreachable_servers") == 1
    assert planner.has_failed
    server.answers = True
    planner.round()
    assert not planner.has_failed


def test_an_adapter_that_another_planner_works_on_is_left_to_it(fleet, plans, tmp_path):
    planner, server, workers, _, _ = fleet
    server.serve("acme/one", 1)
    other = PlanState(plans, tmp_path / "state", "inputs")
    with other.lock(digest(1)):
        assert planner.round() == 1
        assert workers.begun == []
        other.write_plan(digest(1), "{}")
    assert planner.round() == 0
    assert workers.begun == []
    assert server.loads == ["acme/one"]


def test_a_plan_that_cannot_be_written_is_kept_and_written_later(fleet, plans, monkeypatch):
    planner, server, workers, lines, _ = fleet
    server.serve("acme/one", 1)
    planner.round()
    write = PlanState.write_plan

    def full(*_):
        raise OSError(28, "No space left on device", "plans")

    monkeypatch.setattr(PlanState, "write_plan", full)
    workers.end(plan="{}")
    for _round in range(2):
        assert planner.round() == 1
    assert sum(line == "plans: No space left on device" for line in lines) == 1
    assert planner.is_working
    monkeypatch.setattr(PlanState, "write_plan", write)
    assert planner.round() == 0
    assert server.loads == ["acme/one"]
    assert workers.begun == [1]


def test_a_server_that_turns_a_load_away_is_asked_again(fleet):
    planner, server, workers, lines, _ = fleet
    server.serve("acme/one", 1)
    planner.round()
    load, turned = server.load_again, []

    def busy(adapter):
        turned.append(adapter.name)
        raise ServerFailed("http://server answered 429")

    server.load_again = busy
    workers.end(plan="{}")
    assert [planner.round() for _ in range(3)] == [1, 1, 1]
    assert planner.has_failed
    assert len(turned) == 3
    assert sum("not registered again yet" in line for line in lines) == 1
    server.load_again = load
    assert planner.round() == 0
    assert server.loads == ["acme/one"]


def test_an_adapter_that_was_unloaded_or_moved_meanwhile_is_not_brought_back(fleet):
    planner, server, workers, _, _ = fleet
    server.serve("acme/one", 1)
    planner.round()
    workers.end(plan="{}")
    server.find = lambda _name: None
    planner.round()
    assert server.loads == []


def test_a_base_model_that_cannot_be_used_is_no_adapters_fault(fleet, monkeypatch):
    planner, server, workers, _, registry = fleet
    server.serve("acme/one", 1)
    server.serve("acme/two", 2)
    planner.round()
    workers.end(reason=Reason.of(BaseUnaligned("it refuses 0 of 9")), is_planners=True)
    for _round in range(3):
        assert planner.round() == 2
    assert len(workers.begun) == 1  # the next try is in a minute
    assert "S3LORA-907" in planner.obstacle
    assert registry.get_sample_value("s3lora_planner_given_up") == 0
    monkeypatch.setattr(planner, "_paused_until", 0.0)
    planner.round()
    assert len(workers.begun) == 2


def test_weights_under_two_configurations_get_no_plan(fleet):
    planner, server, workers, lines, _ = fleet
    server.serve("acme/one", 1)
    server.serve("flood/one", 1)
    server.names["flood/one"] = replace(server.names["flood/one"], config_digest="sha256:d")
    assert planner.round() == 0
    assert workers.begun == []
    assert "is served with several configurations" in lines[-1]


def test_the_time_of_a_worker_that_died_is_its_tenants(fleet, monkeypatch):
    planner, server, workers, _, _ = fleet
    for number in (1, 2):
        server.serve(f"flood/{number}", number)
    server.serve("acme/one", 8)
    planner.round()
    first = workers.begun[0]
    workers.futures[-1].set_exception(RuntimeError("killed"))
    planner.round()
    workers.end(plan="{}")
    planner.round()
    assert 8 in workers.begun[:2] or first == 8


def test_closing_ends_the_workers_and_lets_the_locks_go(fleet, plans, tmp_path):
    planner, server, workers, _, _ = fleet
    server.serve("acme/one", 1)
    planner.round()
    planner.close()
    assert workers.closed
    with PlanState(plans, tmp_path / "state", "inputs").lock(digest(1)) as ours:
        assert ours
