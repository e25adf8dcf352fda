"""Changes to an adapter's folder do not change its private copy."""

import os

import pytest

from s3lora_serve.adapter import local_folder
from s3lora_serve.adapter.private_copy import PrivateFolder, copy_adapter
from s3lora_serve.errors import ChangedWhileCopying, GateFailed
from s3lora_serve.policy.limits import Limits
from tests.support.adapters import WEIGHTS, copy_with


@pytest.fixture
def folder(trained, tmp_path):
    return copy_with(trained, tmp_path / "tenant")


@pytest.fixture(params=["memory", "folder"])
def into(request, tmp_path):
    if request.param == "memory":
        return None
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    return private


def test_edits_truncation_and_deletion_do_not_change_the_copy(folder, into):
    original = (folder / WEIGHTS).read_bytes()
    copy = copy_adapter(folder, Limits(), into)
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(b"edited in place")
    os.truncate(folder / WEIGHTS, 10)
    (folder / WEIGHTS).unlink()
    assert bytes(copy.weights) == original


def test_writing_to_the_copy_changes_no_file(folder, into):
    original = (folder / WEIGHTS).read_bytes()
    copy = copy_adapter(folder, Limits(), into)
    copy.weights[-4:] = b"\0\0\0\0"
    assert (folder / WEIGHTS).read_bytes() == original
    if into is not None:
        assert (into / WEIGHTS).read_bytes() == original


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written in place"])
def test_a_file_that_changes_while_it_is_copied_is_refused(folder, into, monkeypatch, change):
    monkeypatch.setattr(local_folder, "CHUNK_BYTES", 64 * 1024)
    preadv, changed = os.preadv, []

    def preadv_and_change(descriptor, buffers, offset):
        count = preadv(descriptor, buffers, offset)
        if offset > 100_000 and not changed:
            changed.append(True)
            size = (folder / WEIGHTS).stat().st_size
            if change == "grows":
                os.truncate(folder / WEIGHTS, size + 1000)
            elif change == "shrinks":
                os.truncate(folder / WEIGHTS, offset)
            else:
                with (folder / WEIGHTS).open("r+b") as file:
                    file.write(b"edited in place")
        return count

    monkeypatch.setattr(os, "preadv", preadv_and_change)
    with pytest.raises(ChangedWhileCopying, match="S3LORA-105"):
        copy_adapter(folder, Limits(), into)
    assert changed


def test_a_copy_whose_folder_has_vanished_does_not_blame_the_adapter(folder, tmp_path):
    with pytest.raises(GateFailed, match="S3LORA-401"):
        copy_adapter(folder, Limits(), tmp_path / "vanished")


def test_the_private_folder_is_closed_to_other_users_and_removed_afterwards(tmp_path):
    with PrivateFolder(lambda: tmp_path) as private:
        made = private.make()
        assert made.stat().st_mode & 0o777 == 0o700
        (made / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_a_private_folder_that_cannot_be_made_is_a_refusal(tmp_path):
    with (
        pytest.raises(GateFailed, match="S3LORA-401"),
        PrivateFolder(lambda: tmp_path / "nowhere") as private,
    ):
        private.make()
