"""What a worker knows of registrations: their paths, and which an API server answers for."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from s3lora_serve.vllm_plugin.engine.worker_registrations import WorkerRegistrations


def request(adapter_id=7, name="acme/support", path="/store/a"):
    return SimpleNamespace(lora_int_id=adapter_id, lora_name=name, lora_path=path)


@pytest.fixture
def registrations():
    found = WorkerRegistrations()
    found.add(7, "acme/support", "/store/a", "/tenants/acme", is_under_way=True)
    return found


def test_a_load_is_the_api_servers_until_it_knows_what_became_of_it(registrations):
    assert registrations.is_under_way(request())
    registrations.end(7)
    assert not registrations.is_under_way(request())
    assert registrations.path(request()) == "/tenants/acme"


@pytest.mark.parametrize("other", [request(8), request(name="initech/x"), request(path="/store/b")])
def test_another_adapter_than_the_registered_one_is_nobodys(registrations, other):
    assert not registrations.is_under_way(other)
    assert registrations.path(other) == other.lora_path


def test_another_servers_registration_of_a_served_adapter_leaves_it_served(registrations):
    registrations.end(7)
    registrations.add(7, "acme/support", "/store/a", "/tenants/acme", is_under_way=True)
    assert not registrations.is_under_way(request())
    registrations.add(7, "acme/support", "/store/b", "/tenants/acme", is_under_way=True)
    assert registrations.is_under_way(request(path="/store/b"))


def test_a_removed_adapter_is_forgotten(registrations):
    registrations.remove(7)
    registrations.end(7)
    assert not registrations.is_under_way(request())
    assert registrations.path(request()) == "/store/a"
