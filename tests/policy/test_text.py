"""What tenants chose can be shown: names and paths are text, and messages are one line of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.admission.verdict import unread_verdict
from s3lora_serve.errors import NotAnAdapter, NotText, Reason
from s3lora_serve.policy.schema import Policy
from s3lora_serve.policy.text import check_text

ANY = st.text(st.characters(exclude_categories=()), max_size=20)
"""Lone surrogates included."""


def is_text(chosen):
    try:
        return bool(chosen.encode()) or True
    except UnicodeEncodeError:
        return False


@given(name=ANY, path=ANY)
def test_names_and_paths_are_refused_unless_utf8_can_encode_them(name, path):
    if is_text(name) and is_text(path):
        check_text(name, path)
        return
    with pytest.raises(NotText) as refusal:
        check_text(name, path)
    assert is_text(str(refusal.value))


@given(ANY)
def test_any_message_and_any_unread_adapters_name_are_one_line_that_utf8_can_encode(chosen):
    verdict = unread_verdict(chosen, chosen, Policy())
    message = Reason.of(NotAnAdapter(f"{chosen} is not a folder")).message
    for shown in (message, verdict.name, verdict.path):
        assert is_text(shown)
        assert shown.isprintable()


def test_a_message_that_can_be_shown_stays_as_it_is():
    problem = "module ünï/ℵ has ‖ΔW‖_F 2.5, over 'limits'"
    assert NotAnAdapter(problem).problem == problem
