"""Copies that stay pinned as long as they are known, and the ids of those that replace others."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from s3lora_serve.vllm_plugin.bounded_map import MAX_ENTRIES
from s3lora_serve.vllm_plugin.pinned_copies import PinnedCopies, PinnedCopy
from s3lora_serve.vllm_plugin.replacement_ids import FIRST_REPLACEMENT_ID, ReplacementIds

A, B = Path("/store/a"), Path("/store/b")


def request(adapter_id=1):
    return SimpleNamespace(lora_int_id=adapter_id, lora_name="acme", lora_path="/tenants/acme")


@pytest.fixture
def unpinned():
    return []


@pytest.fixture
def copies(unpinned):
    return PinnedCopies(SimpleNamespace(unpin=unpinned.append))


def test_other_content_gets_a_new_id_and_the_former_copy_is_let_go(copies, unpinned):
    assert copies.put(request(), A) == PinnedCopy(1, A)
    assert copies.put(request(), B) == PinnedCopy(FIRST_REPLACEMENT_ID, B)
    assert unpinned == [A]
    assert copies.get(request()).path == B


def test_same_content_keeps_its_id_and_one_pin(copies, unpinned):
    copies.put(request(), A)
    assert copies.put(request(), A) == PinnedCopy(1, A)
    assert unpinned == [A]  # of the two that were taken


def test_pins_are_bounded(copies, unpinned):
    for adapter_id in range(MAX_ENTRIES + 2):
        copies.put(request(adapter_id), Path(f"/store/{adapter_id}"))
    assert unpinned == [Path("/store/0"), Path("/store/1")]


def test_no_id_is_given_twice():
    ids = ReplacementIds()
    first = PinnedCopy(3, A)
    assert ids.of(A, first) == 3
    given = [ids.of(B, first), ids.of(A, None), ids.new()]
    assert len(set(given)) == 3
