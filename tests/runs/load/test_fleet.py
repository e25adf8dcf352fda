"""Less than a minute of what `make load-fleet` does for an hour."""

import pytest

from tests.runs.load.fleet import run_fleet, run_stock
from tests.runs.load.fleet_members import make_fleet
from tests.runs.load.tenants import BREAKERS
from tests.runs.load.traffic import QUESTIONS, ask
from tests.support.server import Server

pytestmark = [pytest.mark.serving, pytest.mark.slow]

ADAPTERS = 5 * len(BREAKERS)
SECONDS = 40


def test_a_fleet_of_good_and_hostile_adapters_fails_no_request_before_and_after_a_killed_worker(
    model, trained, spiked, tmp_path
):
    with Server(model, tmp_path / "base.log") as server:
        references = {"base": [ask(server, "base", question) for question in QUESTIONS]}
    fleet = make_fleet([trained, spiked], [], ADAPTERS)
    first, second = run_fleet(model, fleet, references, tmp_path, SECONDS)
    assert first.problems == []
    assert second.problems == []
    names = first.traffic.registered | second.traffic.registered
    assert len(names) == ADAPTERS
    assert first.refused_policies
    assert min(each.traffic.done["base requests"] for each in (first, second)) > 20
    stock = run_stock(model, fleet, tmp_path, SECONDS / 4, second)
    assert stock.traffic.problems == []
    assert stock.traffic.done["served"]
