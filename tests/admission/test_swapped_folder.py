"""A link that is swapped during an admission: rules and roots match the folder that is read."""

import os
import shutil
import threading
from pathlib import Path

import pytest

from s3lora_serve import Policy, scan_adapter
from s3lora_serve.adapter.local_folder import LocalFolder
from s3lora_serve.adapter.private_copy import PrivateFolder
from s3lora_serve.admission.admit import admit
from tests.support.adapters import CONFIG, WEIGHTS, copy_with
from tests.support.signing import key_pair, sign

ROUNDS = 60


@pytest.fixture
def trusted(trained, tmp_path):
    return copy_with(trained, tmp_path / "trusted" / "adapter")


@pytest.fixture
def hostile(spiked, tmp_path):
    return copy_with(spiked, tmp_path / "tenant" / "adapter")


@pytest.fixture
def policy(tmp_path):
    """Refuses the rank of both adapters, except under the trusted folder."""
    relaxed = {"match": {"path": f"{tmp_path}/trusted/**"}, "limits": {"max_rank": 64}}
    return Policy.model_validate({"limits": {"max_rank": 4}, "rules": [relaxed]})


class Link:
    """A link that a tenant swaps."""

    def __init__(self, path, target):
        self.path = path
        path.symlink_to(target)

    def lead_to(self, target):
        new = self.path.with_name("new")
        new.symlink_to(target)
        new.replace(self.path)


@pytest.fixture
def link(trusted, tmp_path):
    return Link(tmp_path / "link", trusted)


def admitted(link, policy, tmp_path, swap, *, at):
    """The verdict on a folder whose link `swap` changes when the private copy is asked for."""
    with PrivateFolder(lambda: tmp_path) as private:
        calls = []

        def make():
            calls.append(True)
            if len(calls) == at:
                swap()
            return private.make()

        verdict = admit(link.path, "adapter", policy, into=make).verdict
        assert len(calls) >= at
        return verdict


def test_folder_is_admitted_under_the_rule_of_its_own_path_though_a_link_is_swapped(
    link, policy, trusted, hostile, tmp_path
):
    own = scan_adapter(trusted, policy)
    verdict = admitted(link, policy, tmp_path, lambda: link.lead_to(hostile), at=1)
    assert (verdict.reason, verdict.digest) == (None, own.digest)
    assert scan_adapter(link.path, policy).reason.code == "S3LORA-201"


def test_roots_hold_for_the_folder_that_is_read_though_a_link_is_swapped(
    link, trusted, hostile, tmp_path
):
    limits = {"limits": {"roots": [str(tmp_path / "trusted")]}}
    own = scan_adapter(trusted, Policy.model_validate(limits))
    swap = lambda: link.lead_to(hostile)  # noqa: E731
    verdict = admitted(link, Policy.model_validate(limits), tmp_path, swap, at=1)
    assert (verdict.reason, verdict.digest) == (None, own.digest)


def test_folder_outside_the_roots_is_refused_though_its_files_are_links_into_them(
    trusted, tmp_path
):
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in (CONFIG, WEIGHTS):
        (outside / name).symlink_to(trusted / name)
    policy = Policy.model_validate({"limits": {"roots": [str(tmp_path / "trusted")]}})
    assert scan_adapter(outside, policy).reason.code == "S3LORA-106"


def test_snapshot_of_the_hub_cache_is_read_through_its_links(trained, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    shutil.copytree(trained, blobs)
    snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    inside = Policy.model_validate({"limits": {"roots": [str(tmp_path / "hub")]}})
    assert scan_adapter(snapshot, inside).reason is None
    narrow = Policy.model_validate({"limits": {"roots": [str(tmp_path / "hub" / "snapshots")]}})
    assert scan_adapter(snapshot, narrow).reason.code == "S3LORA-106"


@pytest.mark.parametrize("at", [1, 2])
def test_signature_and_other_files_are_read_of_the_folder_whose_weights_are_admitted(
    link, trusted, hostile, tmp_path, at
):
    acme = key_pair(tmp_path, "acme")
    sign(trusted, acme)
    (hostile / "unsigned.txt").write_text("not signed")
    policy = Policy.model_validate({"signatures": {"require": True, "keys": [str(acme.public)]}})
    with LocalFolder(trusted) as opened:
        digest = admit(opened, "adapter", policy).verdict.digest
    verdict = admitted(link, policy, tmp_path, lambda: link.lead_to(hostile), at=at)
    assert (verdict.reason, verdict.digest) == (None, digest)
    assert verdict.signed_by


def test_link_swapped_all_the_time_never_admits_a_folder_under_anothers_rule(
    link, policy, trusted, hostile
):
    digest = scan_adapter(trusted, policy).digest
    ended, decisions = threading.Event(), set()

    def swap():
        while not ended.is_set():
            for target in (hostile, trusted):
                link.lead_to(target)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        for _ in range(ROUNDS):
            verdict = scan_adapter(link.path, policy)
            decisions.add(verdict.decision)
            assert verdict.reason is not None or verdict.digest == digest
    finally:
        ended.set()
        swapping.join()
    assert decisions


def test_folder_of_unknown_path_is_refused(trusted, monkeypatch):
    def unknown(path, *more, **named):
        raise OSError(2, "no /proc", path)

    monkeypatch.setattr(os, "readlink", unknown)
    verdict = scan_adapter(trusted, Policy())
    assert verdict.reason.code == "S3LORA-401"


def opened():
    return sorted(file.name for file in Path("/proc/self/fd").iterdir())


def test_no_descriptor_stays_open_after_a_decision(trusted, policy, tmp_path):
    before = opened()
    for folder in (trusted, tmp_path / "nowhere", tmp_path):
        scan_adapter(folder, policy)
    assert opened() == before
