"""One registration carries its door, who asks, and what became of it."""

import pytest

pytest.importorskip("vllm")

from s3lora_serve.vllm_plugin.api.client import Client, Requester, client
from s3lora_serve.vllm_plugin.api.registration import Registration, current, registering


def test_the_outer_door_has_the_first_word():
    with registering("experiment") as outer, registering("http") as inner:
        assert inner is outer is current()
        assert inner.door == "experiment"
    with registering("http") as later:
        assert later is not outer
        assert (later.door, later.verdict, later.refusal) == ("http", None, None)


def test_outside_of_any_door_the_engine_is_asked():
    assert (current().door, current().requester) == ("engine", None)
    assert current() is not current()


@pytest.mark.parametrize(
    ("door", "asks", "key"),
    [
        ("static", None, None),
        ("engine", None, None),
        ("http", None, ""),
        ("scan", None, ""),
        ("resolver", Requester(None, "192.0.2.7"), ""),
        ("engine", Requester("0123456789abcdef", None), "0123456789abcdef"),
    ],
)
def test_over_http_somebody_asks_also_where_no_middleware_notes_who(door, asks, key):
    token = client.set(asks and Client(asks))
    assert Registration(door).asked_with == key
    client.reset(token)
