"""Stored copies of adapters that a plan transforms: the new bytes are what is admitted."""

import hashlib

import pytest

from s3lora_serve import Policy
from s3lora_serve.adapter.changed_weights import ChangedWeights
from s3lora_serve.adapter.private_copy import CONFIG_NAME, OWN_FOLDER, WEIGHTS_NAME
from s3lora_serve.admission.admit import admit
from s3lora_serve.errors import StoreDamaged
from s3lora_serve.policy.limits import Limits
from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.store.eviction import folder_size
from s3lora_serve.store.stored_copy import open_stored_copy, own_folder
from tests.support.plans import install, keep_out, plan_for, read, small_adapter

FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "state")


@pytest.fixture
def folder(tmp_path):
    return small_adapter(tmp_path / "adapter")


@pytest.fixture
def plans(tmp_path, folder):
    A = read(folder).modules[0].A
    install(plan_for(read(folder), {FIRST: keep_out(A)}), tmp_path / "plans")
    return tmp_path / "plans"


def stored(store, folder, **policy):
    with store.new_private_folder() as private:
        verdict = admit(folder, "x", Policy(**policy), device="cpu", into=private.make).verdict
        return store.add(private, verdict, 2**30), verdict


def test_the_stored_weights_are_the_transformed_ones_and_the_own_lie_beside_them(
    store, folder, plans
):
    path, verdict = stored(store, folder, plans=plans)
    served = (path / WEIGHTS_NAME).read_bytes()
    assert verdict.served_digest == "sha256:" + hashlib.sha256(served).hexdigest()
    found = open_stored_copy(path)
    assert found.verdict_for(verdict.name, verdict.path) == verdict
    assert bytes(found.copy.weights) == served != (folder / WEIGHTS_NAME).read_bytes()
    assert own_folder(path) == path / OWN_FOLDER
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (own_folder(path) / name).read_bytes() == (folder / name).read_bytes()
    assert folder_size(path) > 2 * len(served)


def test_the_adapters_own_bytes_in_the_place_of_the_transformed_ones_are_damage(
    store, folder, plans
):
    path, _ = stored(store, folder, plans=plans)
    (path / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes())
    with pytest.raises(StoreDamaged):
        open_stored_copy(path)
    again, _ = stored(store, folder, plans=plans)
    assert again == path
    assert open_stored_copy(again).copy is not None


def test_each_plan_has_its_own_copy_and_one_plan_only_one(store, folder, plans):
    with_plan, _ = stored(store, folder, plans=plans)
    again, _ = stored(store, folder, plans=plans)
    without, _ = stored(store, folder)
    audited, _ = stored(store, folder, plans=plans, mode="audit")
    install(plan_for(read(folder), strip={FIRST}), plans)
    other, _ = stored(store, folder, plans=plans)
    assert with_plan == again
    assert len({with_plan, without, audited, other}) == 4
    assert own_folder(audited) == audited
    assert own_folder(other) == other


def test_of_a_refused_adapter_no_weights_are_stored(store, folder, plans):
    path, verdict = stored(store, folder, plans=plans, limits=Limits(max_scaling=0.1))
    assert verdict.decision == "rejected"
    assert not (path / WEIGHTS_NAME).exists()
    assert not (path / OWN_FOLDER).exists()


def test_a_disk_that_fills_up_refuses_and_leaves_no_weights(store, folder, plans, monkeypatch):
    def full(*_):
        yield b"half"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ChangedWeights, "chunks", full)
    path, verdict = stored(store, folder, plans=plans)
    assert verdict.reason.code == "S3LORA-401"
    assert "No space left" in verdict.reason.message
    assert sorted(file.name for file in path.iterdir()) == [CONFIG_NAME, "verdict.json"]
