"""Processes of a server share one copy of the statistics, and nothing that happens to the
operator's file reaches them."""

import hashlib
import os
import stat

import pytest

from s3lora_serve.errors import StatisticsInvalid
from s3lora_serve.repair.shared_copy import shared_copy
from s3lora_serve.repair.statistics_file import read_statistics

MOST = 2**30


def digest_of(file):
    return "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "base.statistics"
    file.write_bytes(os.urandom(5000))
    return file


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "state" / "s3lora" / "statistics"


@pytest.fixture(autouse=True)
def state(folder):
    folder.parent.parent.mkdir()


def test_what_is_mapped_stays_when_the_operators_file_is_cut_short(source, folder):
    expected, digest = source.read_bytes(), digest_of(source)
    data = shared_copy(source, digest, MOST, folder)
    os.truncate(source, 0)
    assert data[:] == expected
    again = shared_copy(source, digest, MOST, folder)
    assert again[:] == expected, "the copy is used again, whatever became of the file"
    [copy] = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_a_damaged_copy_is_made_anew(source, folder):
    digest = digest_of(source)
    shared_copy(source, digest, MOST, folder)
    [copy] = folder.iterdir()
    copy.write_bytes(b"half")
    assert shared_copy(source, digest, MOST, folder)[:] == source.read_bytes()


def test_a_file_with_another_digest_is_not_kept(source, folder):
    digest = digest_of(source)
    source.write_bytes(b"another")
    with pytest.raises(ValueError, match="was expected"):
        shared_copy(source, digest, MOST, folder)
    assert not list(folder.iterdir())


def test_only_the_last_file_is_kept_and_those_who_map_an_earlier_one_keep_it(source, folder):
    earlier = source.read_bytes()
    first = shared_copy(source, digest_of(source), MOST, folder)
    source.write_bytes(b"later statistics")
    second = shared_copy(source, digest_of(source), MOST, folder)
    assert (first[:], second[:]) == (earlier, b"later statistics")
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("what", ["others enter", "a link", "a file", "no state folder"])
def test_a_folder_that_is_not_this_users_alone_is_not_used(source, folder, tmp_path, what):
    if what == "others enter":
        folder.parent.mkdir()
        folder.mkdir(mode=0o755)
        folder.chmod(0o755)
    elif what == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.parent.mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    elif what == "a file":
        folder.parent.write_text("")
    else:
        folder.parent.parent.rmdir()
    assert shared_copy(source, digest_of(source), MOST, folder) is None


def test_what_is_no_file_or_too_large_is_refused(source, folder, tmp_path):
    with pytest.raises(ValueError, match="larger"):
        shared_copy(source, digest_of(source), 10, folder)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular"):
        shared_copy(tmp_path / "pipe", digest_of(source), MOST, folder)


def test_mapped_statistics_are_those_that_are_read(statistics, folder):
    expected = read_statistics(statistics)
    found = read_statistics(statistics, expected=expected.digest, shared_in=folder)
    assert found.digest == expected.digest
    assert found.about == expected.about
    for name, site in expected.sites.items():
        assert found.sites[name].V.equal(site.V)
    assert len(list(folder.iterdir())) == 1


def test_statistics_are_read_where_they_cannot_be_shared(statistics, tmp_path):
    digest = digest_of(statistics)
    nowhere = tmp_path / "no" / "such" / "folder"
    assert read_statistics(statistics, expected=digest, shared_in=nowhere).digest == digest
    with pytest.raises(StatisticsInvalid, match="No such file"):
        read_statistics(tmp_path / "gone", expected=digest, shared_in=tmp_path)
