"""How many loads and refusals a tenant may have, and who a tenant is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.errors import RateExceeded
from s3lora_serve.policy.server import Rates
from s3lora_serve.vllm_plugin.api.client import Client, Requester, client
from s3lora_serve.vllm_plugin.api.rates import TenantRates, tenant_of
from tests.support.clock import Clock


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def rates(clock):
    return TenantRates(clock)


def test_without_rates_nothing_is_counted(rates):
    for _ in range(1000):
        rates.count_load("acme", Rates())
        rates.count_refusal("acme", Rates())


def test_loads_over_the_rate_are_turned_away_until_the_time_that_the_error_names(rates, clock):
    allowed = Rates(loads_per_minute=6)
    for _ in range(6):
        rates.count_load("acme", allowed)
    with pytest.raises(RateExceeded, match=r"S3LORA-220: 'acme' has over 6 loads a min") as error:
        rates.count_load("acme", allowed)
    assert error.value.retry_seconds == 10
    clock.now = 9.9
    with pytest.raises(RateExceeded):
        rates.count_load("acme", allowed)
    clock.now = 10.0
    rates.count_load("acme", allowed)


def test_another_tenants_loads_do_not_count(rates):
    allowed = Rates(loads_per_minute=1)
    rates.count_load("acme", allowed)
    rates.count_load("initech", allowed)


def test_who_was_refused_too_often_may_load_nothing_for_a_while(rates, clock):
    allowed = Rates(refusals_per_minute=2)
    for _ in range(2):
        rates.count_load("acme", allowed)
        rates.count_refusal("acme", allowed)
    with pytest.raises(RateExceeded, match="refusals_per_minute"):
        rates.count_load("acme", allowed)
    clock.now = 30.0
    rates.count_load("acme", allowed)


@given(st.lists(st.floats(0, 100), max_size=300), st.integers(1, 50))
def test_no_minute_has_more_than_twice_the_rate(pauses, per_minute):
    """A bucket holds one minute's loads, and refills during the next."""
    clock = Clock()
    rates, allowed = TenantRates(clock), Rates(loads_per_minute=per_minute)
    passed = []
    for pause in pauses:
        clock.now += pause
        try:
            rates.count_load("acme", allowed)
        except RateExceeded:
            continue
        passed.append(clock.now)
        assert sum(time > clock.now - 60 for time in passed) <= 2 * per_minute


@pytest.mark.parametrize(
    ("asks", "several", "tenant"),
    [
        (None, False, "acme"),
        (Requester(None, "192.0.2.7"), True, "acme"),
        (Requester("0123456789abcdef", "192.0.2.7"), False, "acme"),
        (Requester("0123456789abcdef", "192.0.2.7"), True, "key 0123456789abcdef"),
    ],
)
def test_a_tenant_is_a_key_if_there_are_several_and_else_the_first_part_of_a_name(
    asks, several, tenant
):
    token = client.set(asks and Client(asks, has_own_key=several))
    assert tenant_of("acme/support/v2") == tenant
    client.reset(token)
