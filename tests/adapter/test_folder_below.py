"""A name that a client chose leads nowhere but below the folder that it is looked up in."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3lora_serve.adapter.folder_below import check_name, config_below
from s3lora_serve.adapter.private_copy import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from s3lora_serve.errors import (
    AdapterRejected,
    ConfigInvalid,
    NotAnAdapter,
    OutsideRoots,
    OverLimit,
    TooLong,
)
from s3lora_serve.policy.lengths import MAX_NAME

PARTS = st.lists(st.sampled_from(["..", ".", "", "a", "é", "~", "a b", "\0", "\n", "\ud800"]))


@given(PARTS.map("/".join) | st.text())
def test_a_name_that_passes_means_one_folder_below_the_one_it_is_looked_up_in(name):
    try:
        check_name(name)
    except AdapterRejected:
        return
    assert len(name) <= MAX_NAME
    assert os.path.normpath(f"/below/{name}") == f"/below/{name}" != "/below/"
    os.fsencode(name)


@pytest.mark.parametrize("name", ["acme/support-7b", "tenant 1", "café", "v1.0", "..."])
def test_an_ordinary_name_passes(name):
    check_name(name)


def test_a_long_name_is_refused_by_its_length():
    with pytest.raises(TooLong, match="60000 characters") as refused:
        check_name("x" * 60_000)
    assert len(str(refused.value)) < 200


@pytest.fixture
def resolver(tmp_path):
    """A folder in which adapters are looked up, with one adapter below it and one beside it."""
    for folder in ("resolver/acme", "beside"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / CONFIG_NAME).write_text(json.dumps({"peft_type": "LORA"}))
        (tmp_path / folder / WEIGHTS_NAME).write_text("weights")
    return tmp_path / "resolver"


def found(resolver, name):
    return config_below(resolver, resolver / name, name)


def test_what_lies_below_is_found_also_through_links_that_stay_below(resolver):
    (resolver / "link").symlink_to("acme")
    assert found(resolver, "acme") == found(resolver, "link") == {"peft_type": "LORA"}
    assert found(resolver, "nobody") is None


def test_the_folder_itself_may_be_a_link(resolver, tmp_path):
    (tmp_path / "mounted").symlink_to(resolver)
    assert found(tmp_path / "mounted", "acme") == {"peft_type": "LORA"}


@pytest.mark.parametrize("linked", ["", CONFIG_NAME, WEIGHTS_NAME])
def test_a_link_that_leads_out_is_refused_without_saying_where(resolver, tmp_path, linked):
    if linked:
        (resolver / "acme" / linked).unlink()
        (resolver / "acme" / linked).symlink_to(tmp_path / "beside" / linked)
    else:
        (resolver / "out").symlink_to(tmp_path / "beside")
    with pytest.raises(OutsideRoots) as refused:
        found(resolver, "acme" if linked else "out")
    assert "beside" not in str(refused.value)


def test_a_pipe_is_refused_and_not_waited_for(resolver):
    (resolver / "acme" / CONFIG_NAME).unlink()
    os.mkfifo(resolver / "acme" / CONFIG_NAME)
    with pytest.raises(NotAnAdapter, match="not a regular file"):
        found(resolver, "acme")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (b" " * (MAX_CONFIG_BYTES + 1), OverLimit),
        (b"[" * 100_000, ConfigInvalid),
        (b"\xff", ConfigInvalid),
        (b"[]", ConfigInvalid),
    ],
)
def test_a_file_that_is_no_bounded_json_object_is_refused(resolver, text, error):
    (resolver / "acme" / CONFIG_NAME).write_bytes(text)
    with pytest.raises(error):
        found(resolver, "acme")


def test_a_file_in_the_place_of_a_folder_is_no_adapter(resolver):
    (resolver / "file").write_text("")
    assert found(Path(resolver), "file/acme") is None
