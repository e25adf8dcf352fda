"""The store of admitted adapters: a stored copy is trusted only if it matches its digest."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from s3lora_serve.adapter.private_copy import CONFIG_NAME, WEIGHTS_NAME
from s3lora_serve.admission.admit import admit
from s3lora_serve.admission.verdict import Verdict
from s3lora_serve.errors import GateFailed, StoreDamaged, StoreFull
from s3lora_serve.policy.limits import Limits
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy
from s3lora_serve.store import adapter_store
from s3lora_serve.store.adapter_store import AdapterStore
from s3lora_serve.store.stored_copy import VERDICT_NAME, open_stored_copy
from tests.support.adapters import copy_with

THREE = Policy(strip=Strip(top_k=3))


@pytest.fixture
def store(tmp_path):
    return AdapterStore(tmp_path / "state")


def store_adapter(store, folder, policy=THREE, max_bytes=2**30):
    with store.new_private_folder() as private:
        verdict = admit(folder, "tenant", policy, device="cpu", into=private.make).verdict
        return store.add(private, verdict, max_bytes), verdict


def stored_names(store):
    return {entry.name for entry in store.root.iterdir() if len(entry.name) >= 64}


def test_a_stored_copy_is_read_back_byte_for_byte(store, trained):
    path, verdict = store_adapter(store, trained)
    found = open_stored_copy(path)
    assert found.verdict_for(verdict.name, verdict.path) == verdict
    assert bytes(found.copy.weights) == (trained / WEIGHTS_NAME).read_bytes()
    assert found.copy.config == (trained / CONFIG_NAME).read_bytes()
    assert store.find(str(path)) == path


def test_only_this_user_can_access_the_store(store, trained):
    path, _ = store_adapter(store, trained)
    for folder in (store.root, path):
        assert folder.stat().st_mode & 0o077 == 0


def test_one_content_and_verdict_is_stored_once_and_another_verdict_apart(store, trained):
    first, _ = store_adapter(store, trained)
    again, _ = store_adapter(store, trained)
    other, _ = store_adapter(store, trained, Policy(strip=Strip(top_k=2)))
    assert first == again != other
    assert stored_names(store) == {first.name, other.name}


@pytest.mark.parametrize("name", [WEIGHTS_NAME, CONFIG_NAME, VERDICT_NAME])
@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
def test_damage_is_detected_and_the_next_registration_repairs_it(store, trained, name, how):
    path, _ = store_adapter(store, trained)
    file = path / name
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[:-1])
    else:
        pattern = {CONFIG_NAME: b'"r": 8', VERDICT_NAME: b'"sha256:'}.get(name)
        position = data.index(pattern) + len(pattern) - 1 if pattern else len(data) // 2
        data[position] ^= 1
        file.write_bytes(data)
    with pytest.raises(StoreDamaged):
        open_stored_copy(path)
    again, _ = store_adapter(store, trained)
    assert again == path
    assert open_stored_copy(again).copy is not None


def test_an_edited_verdict_counts_as_damage(store, trained):
    path, verdict = store_adapter(store, trained)
    data = json.loads((path / VERDICT_NAME).read_text())
    for module in data["modules"]:
        module["stripped"] = False
    data["decision"] = "admitted"
    (path / VERDICT_NAME).write_text(json.dumps(data))
    with pytest.raises(StoreDamaged):
        open_stored_copy(path)
    assert verdict.stripped


def test_of_what_may_not_be_served_only_the_verdict_is_stored(store, trained):
    path, verdict = store_adapter(store, trained, Policy(limits=Limits(max_scaling=1)))
    assert verdict.decision == "rejected"
    found = open_stored_copy(path)
    assert (found.verdict_for(verdict.name, verdict.path), found.copy) == (verdict, None)
    assert not (path / WEIGHTS_NAME).exists()


def test_registrants_of_equal_content_share_a_copy_that_names_none_of_them(
    store, trained, tmp_path
):
    twin = copy_with(trained, tmp_path / "another tenant's folder")
    first, verdict = store_adapter(store, trained)
    second, theirs = store_adapter(store, twin)
    assert first == second
    assert verdict.path != theirs.path
    found = open_stored_copy(second).verdict
    assert (found.name, found.path) == ("", "")
    told = (first / VERDICT_NAME).read_text()
    assert str(trained) not in told
    assert "tenant" not in told


def test_folders_that_cannot_be_read_are_stored_apart_each_with_its_own_message(store, tmp_path):
    found = {}
    for name in ("acme", "initech"):
        (tmp_path / name).mkdir()
        path, _ = store_adapter(store, tmp_path / name)
        found[name] = open_stored_copy(path).verdict.reason
    for name, reason in found.items():
        assert reason.code == "S3LORA-101"
        assert f"{tmp_path / name} has no" in reason.message


def test_equal_weights_beside_other_bytes_of_configuration_are_stored_apart(
    store, trained, tmp_path
):
    paths = {store_adapter(store, trained)[0]}
    for name, edited in (("spaced", b" %s"), ("broken", b"{%s"), ("broken otherwise", b"{{%s")):
        folder = copy_with(trained, tmp_path / name)
        (folder / CONFIG_NAME).write_bytes(edited % (trained / CONFIG_NAME).read_bytes())
        path, verdict = store_adapter(store, folder)
        assert verdict.digest is not None
        paths.add(path)
    assert len(paths) == 4


def test_the_first_of_several_verdicts_is_agreed_on(store, trained):
    first, _ = store_adapter(store, trained)
    second, _ = store_adapter(store, trained, Policy(strip=Strip(top_k=2)))
    assert store.agree_on("one adapter", first) == first
    assert store.agree_on("one adapter", second) == first
    assert store.agree_on("another", second) == second


@pytest.mark.parametrize("how", ["gone", "condemned"])
def test_a_verdict_whose_copy_is_lost_is_no_longer_agreed_on(store, trained, how):
    first, _ = store_adapter(store, trained)
    store.agree_on("one adapter", first)
    if how == "gone":
        shutil.rmtree(first)
    else:
        store.quarantine(first)
    second, _ = store_adapter(store, trained, Policy(strip=Strip(top_k=2)))
    assert store.agree_on("one adapter", second) == second


@pytest.mark.parametrize("path", ["/etc", "relative", "", "..", "\0"])
def test_paths_of_tenants_are_not_stored_copies(store, path):
    assert store.find(path) is None


def test_a_path_that_leaves_the_store_is_not_a_stored_copy(store, trained):
    path, _ = store_adapter(store, trained)
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


def test_a_stored_copy_is_not_read_while_the_store_is_locked(store, trained, monkeypatch):
    path, _ = store_adapter(store, trained)
    unlocked = []

    def noted(target):
        with (store.root / "lock").open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the store holds it
        unlocked.append(target)
        return open_stored_copy(target)

    monkeypatch.setattr(adapter_store, "open_stored_copy", noted)
    assert store_adapter(store, trained)[0] == path
    assert unlocked == [path]


def test_a_quarantined_path_is_never_used_again_and_the_content_gets_another(store, trained):
    path, _ = store_adapter(store, trained)
    store.quarantine(path)
    again, _ = store_adapter(store, trained)
    assert again != path
    assert store.find(str(again)) == again
    assert open_stored_copy(again).copy is not None
    assert store.is_quarantined(path)
    assert not store.is_quarantined(again)


def store_under_policies(store, folder, count, max_bytes=2**30):
    """Store one content under several policies; each verdict has a stored copy of its own."""
    policies = [Policy(strip=Strip(top_k=k)) for k in range(1, count + 1)]
    return [store_adapter(store, folder, policy, max_bytes)[0] for policy in policies]


def test_the_least_recently_used_copy_is_evicted_and_a_served_one_never_is(store, trained):
    served, old, used = store_under_policies(store, trained, 3)
    store.unpin(old)
    store.unpin(used)
    open_stored_copy(used)
    size = sum(file.stat().st_size for file in served.iterdir())
    new, _ = store_adapter(
        store, trained, Policy(strip=Strip(top_k=4)), max_bytes=3 * size + size // 2
    )
    assert stored_names(store) == {served.name, used.name, new.name}


def test_a_copy_that_does_not_fit_beside_served_ones_is_refused_and_nothing_is_evicted(
    store, trained
):
    paths = store_under_policies(store, trained, 2)
    store.unpin(paths[1])
    size = sum(file.stat().st_size for file in paths[0].iterdir())
    with pytest.raises(StoreFull, match="S3LORA-405"):
        store_adapter(store, trained, Policy(strip=Strip(top_k=4)), max_bytes=size + size // 2)
    assert stored_names(store) == {path.name for path in paths}


def test_a_copy_served_under_two_names_is_evicted_once_neither_serves_it(store, trained):
    first, _ = store_adapter(store, trained)
    store_adapter(store, trained)
    store.unpin(first)
    with pytest.raises(StoreFull):
        store_adapter(store, trained, Policy(strip=Strip(top_k=4)), max_bytes=100_000)
    store.unpin(first)
    size = sum(file.stat().st_size for file in first.iterdir())
    new, _ = store_adapter(store, trained, Policy(strip=Strip(top_k=4)), max_bytes=size + size // 2)
    assert stored_names(store) == {new.name}


OTHER_PROCESS = """
import sys, time
from pathlib import Path
from s3lora_serve.admission.admit import admit
from s3lora_serve.policy.method import Strip
from s3lora_serve.policy.schema import Policy
from s3lora_serve.store.adapter_store import AdapterStore
store, policy = AdapterStore(Path(sys.argv[1])), Policy(strip=Strip(top_k=int(sys.argv[3])))
private = store.new_private_folder().__enter__()
verdict = admit(Path(sys.argv[2]), "x", policy, device="cpu", into=private.make).verdict
print(store.add(private, verdict, 2**30), flush=True)
unfinished = store.new_private_folder().__enter__().make()
(unfinished / "adapter_model.safetensors").write_bytes(bytes(1000))
print(unfinished, flush=True)
time.sleep(600)
"""


def test_copies_that_other_processes_serve_stay_until_those_are_killed(store, trained):
    command = [sys.executable, "-c", OTHER_PROCESS, str(store.root.parent), str(trained), "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        theirs, unfinished = (Path(process.stdout.readline().strip()) for _ in range(2))
        size = sum(file.stat().st_size for file in theirs.iterdir())
        with pytest.raises(StoreFull):
            store_adapter(store, trained, max_bytes=size + size // 2)
        assert unfinished.exists()
        process.send_signal(signal.SIGKILL)
    mine, _ = store_adapter(store, trained, max_bytes=size + size // 2)
    assert stored_names(store) == {mine.name}
    assert not unfinished.exists()


def test_processes_that_store_the_same_copy_at_once_all_find_it_complete(store, trained):
    command = [sys.executable, "-c", OTHER_PROCESS, str(store.root.parent), str(trained), "3"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        paths = {process.stdout.readline().strip() for process in processes}
        [path] = paths
        assert open_stored_copy(Path(path)).copy is not None
    finally:
        for process in processes:
            process.kill()
            process.communicate()


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from s3lora_serve.admission.admit import admit
from s3lora_serve.errors import AdapterRejected
from s3lora_serve.policy.schema import Policy
from s3lora_serve.store.adapter_store import AdapterStore
store = AdapterStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
with store.new_private_folder() as private:
    verdict = admit(Path(sys.argv[2]), "x", Policy(), device="cpu", into=private.make).verdict
    print(verdict.reason or "none")
    if verdict.reason is None:
        try:
            store.add(private, verdict, 2**30)
        except AdapterRejected as error:
            print(error)
"""


@pytest.mark.parametrize("bytes_left", [0, 1000, 100_000, "all but the verdict"])
def test_a_full_disk_is_a_refusal_and_leaves_nothing_behind(store, trained, bytes_left):
    weights = (trained / WEIGHTS_NAME).stat().st_size
    assert weights > 100_000
    if bytes_left == "all but the verdict":
        bytes_left = None
    limit = 2**40 if bytes_left is None else bytes_left
    program = FULL_DISK
    if bytes_left is None:  # room for the copy, but not for the verdict written after it
        program = program.replace(
            "        try:\n",
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (10, -1))\n        try:\n",
        )
    command = [sys.executable, "-c", program, str(store.root.parent), str(trained), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "S3LORA-401" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    assert stored_names(store) == set()
    store_adapter(store, trained)
    left = {entry.name.partition("-")[0] for entry in store.root.iterdir()} - stored_names(store)
    assert left == {"lock", "process", "sizes"}
