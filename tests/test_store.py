"""The admitted store: what lies in it is believed by its digest alone."""

import json

import pytest

from s3lora_serve.admission import admit
from s3lora_serve.errors import GateFailed, StoreDamaged
from s3lora_serve.intake import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.policy import Limits, Policy, Strip
from s3lora_serve.store import VERDICT_NAME, Store
from s3lora_serve.verdict import Verdict

THREE = Policy(strip=Strip(top_k=3))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


def keep(store, folder, policy=THREE):
    with store.fresh() as private:
        verdict = admit(folder, "tenant", policy, device="cpu", into=private.make).verdict
        return store.keep(private, verdict), verdict


def test_what_was_kept_comes_back_byte_for_byte(store, trained):
    path, verdict = keep(store, trained)
    kept = store.open(path)
    assert kept.verdict == verdict
    assert bytes(kept.copy.weights) == (trained / WEIGHTS_NAME).read_bytes()
    assert kept.copy.config == (trained / CONFIG_NAME).read_bytes()
    assert store.find(str(path)) == path


def test_only_this_user_can_enter(store, trained):
    path, _ = keep(store, trained)
    for folder in (store.root, path):
        assert folder.stat().st_mode & 0o077 == 0


def test_one_content_and_ruling_is_kept_once_and_another_ruling_apart(store, trained):
    first, _ = keep(store, trained)
    again, _ = keep(store, trained)
    other, _ = keep(store, trained, Policy(strip=Strip(top_k=2)))
    assert first == again != other
    left = [entry.name for entry in store.root.iterdir()]
    assert sorted(left) == sorted([first.name, other.name])


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME, VERDICT_NAME])
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_damage_is_noticed_and_the_next_registration_mends_it(store, trained, name, how):
    path, _ = keep(store, trained)
    file = path / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-1])
    else:
        wanted = {CONFIG_NAME: b'"r": 8', VERDICT_NAME: b'"sha256:'}.get(name)
        place = data.index(wanted) + len(wanted) - 1 if wanted else len(data) // 2
        data[place] ^= 1
        file.write_bytes(data)
    with pytest.raises(StoreDamaged):
        store.open(path)
    assert not path.exists()
    assert store.open(keep(store, trained)[0]).copy is not None


def test_a_verdict_somebody_rewrote_is_not_believed(store, trained):
    path, verdict = keep(store, trained)
    data = json.loads((path / VERDICT_NAME).read_text())
    for module in data["modules"]:
        module["stripped"] = False
    data["decision"] = "admitted"
    (path / VERDICT_NAME).write_text(json.dumps(data))
    with pytest.raises(StoreDamaged):
        store.open(path)
    assert verdict.stripped


def test_of_what_may_not_be_served_only_the_verdict_is_kept(store, trained):
    path, verdict = keep(store, trained, Policy(limits=Limits(max_scaling=1)))
    assert verdict.decision == "rejected"
    kept = store.open(path)
    assert (kept.verdict, kept.copy) == (verdict, None)
    assert not (path / WEIGHTS_NAME).exists()


def test_the_first_of_several_rulings_stands(store, trained):
    first, _ = keep(store, trained)
    second, _ = keep(store, trained, Policy(strip=Strip(top_k=2)))
    assert store.agree("one adapter", first) == first
    assert store.agree("one adapter", second) == first
    assert store.agree("another", second) == second


def test_a_ruling_whose_copy_is_gone_no_longer_stands(store, trained):
    first, _ = keep(store, trained)
    store.agree("one adapter", first)
    (first / VERDICT_NAME).write_text("broken")
    with pytest.raises(StoreDamaged):
        store.open(first)
    second, _ = keep(store, trained, Policy(strip=Strip(top_k=2)))
    assert store.agree("one adapter", second) == second


@pytest.mark.parametrize("path", ["/etc", "relative", "", "..", "\0"])
def test_paths_of_tenants_are_not_taken_for_the_stores(store, path):
    assert store.find(path) is None


def test_a_path_that_climbs_out_of_the_store_is_not_the_stores(store, trained):
    path, _ = keep(store, trained)
    assert store.find(f"{store.root}/../{store.root.name}/{path.name}") is None
    assert store.find(f"{path}/..") is None


def test_a_store_that_others_can_enter_is_not_used(store):
    store.root.mkdir(parents=True)
    store.root.chmod(0o755)
    with pytest.raises(GateFailed, match="entered by others"):
        store.prepare()


def test_a_store_that_is_a_link_is_not_used(store, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    store.root.parent.mkdir()
    store.root.symlink_to(tmp_path / "theirs")
    with pytest.raises(GateFailed):
        store.prepare()


def test_verdicts_survive_json(trained):
    verdict = admit(trained, "tenant", THREE, device="cpu").verdict
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict
