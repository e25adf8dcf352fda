"""The store knows the sizes of its copies without looking at them."""

import os
import shutil

import pytest

from s3lora_serve.admission.verdict import unread_verdict
from s3lora_serve.errors import StoreFull
from s3lora_serve.policy.schema import Policy
from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.store.eviction import folder_size

BIG = 2**40


@pytest.fixture
def store(tmp_path):
    store = AdapterStore(tmp_path / "state")
    store.prepare()
    return store


def fill(store, count, size=100):
    """So many copies beside each other, as other servers have left them."""
    for number in range(count):
        copy = store.root / f"{number:064x}"
        copy.mkdir()
        (copy / "verdict.json").write_bytes(bytes(size))


def add(store, digest, max_bytes=BIG):
    with store.new_private_folder() as private:
        verdict = unread_verdict("tenant", "/tenant", Policy())
        object.__setattr__(verdict, "digest", digest)
        return store.add(private, verdict, max_bytes)


@pytest.fixture
def looks(monkeypatch):
    """Counts the looks at files and folders."""
    seen = []
    for name in ("stat", "lstat", "scandir"):
        own = getattr(os, name)

        def counted(path=".", *more, own=own, **options):
            seen.append(path)
            return own(path, *more, **options)

        monkeypatch.setattr(os, name, counted)
    return seen


def test_adding_a_copy_looks_at_no_other_copy(store, looks):
    fill(store, 200)
    add(store, "first")
    looks.clear()
    add(store, "second")
    assert not [path for path in looks if "0" * 40 in str(path)]
    assert len(looks) < 100


def test_copies_are_evicted_by_their_recorded_sizes_and_one_look_at_each(store, looks):
    fill(store, 200)
    for number in range(200):
        os.utime(store.root / f"{number:064x}", ns=(number, number))
    first = folder_size(add(store, "one"))
    looks.clear()
    add(store, "two", max_bytes=200 * 100 + 2 * first - 450)
    assert [n for n in range(200) if not (store.root / f"{n:064x}").exists()] == [0, 1, 2, 3, 4]
    assert len(looks) < 2 * 200 + 100


@pytest.mark.parametrize("damage", ["lost", "torn", "garbled"])
def test_sizes_are_right_whatever_a_killed_process_left_of_the_index(store, damage):
    fill(store, 5, size=123_456)
    store.unpin(add(store, "first"))
    index = store.root / "sizes"
    if damage == "lost":
        index.unlink()
    elif damage == "torn":
        text = index.read_text()
        index.write_text(text[: text.index("123456") + 3])
    else:
        index.write_bytes(b"\xff\x00" + os.urandom(100))
    fresh = AdapterStore(store.root.parent)
    fresh.unpin(add(fresh, "second"))
    copies = [path for path in store.root.iterdir() if len(path.name) == 64]
    assert fresh._sizes.sizes([path.name for path in copies]) == {
        path.name: folder_size(path) for path in copies
    }


def test_index_does_not_grow_with_the_copies_that_came_and_went(store):
    for number in range(60):
        path = add(store, str(number))
        store.unpin(path)
        shutil.rmtree(path)
    assert len((store.root / "sizes").read_text().splitlines()) < 10


def test_copies_of_another_process_count(store, tmp_path):
    other = AdapterStore(tmp_path / "state")
    size = folder_size(add(other, "first"))
    with pytest.raises(StoreFull):
        add(store, "second", max_bytes=size + 10)
