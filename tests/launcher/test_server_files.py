"""A server removes its files when it ends; the next server removes those of a killed one."""

import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from s3lora_serve.errors import GateFailed
from s3lora_serve.launcher.server_files import ServerFiles
from s3lora_serve.settings import Settings
from s3lora_serve.store.adapter_store import AdapterStore
from tests.store.test_adapter_store import store_adapter, stored_names

SERVER = """
import sys
from pathlib import Path
from s3lora_serve.admission.admit import admit
from s3lora_serve.policy.schema import Policy
from s3lora_serve.launcher.server_files import ServerFiles
from s3lora_serve.settings import Settings
from s3lora_serve.store.adapter_store import AdapterStore
adapter, state = map(Path, sys.argv[1:])
with ServerFiles(Settings(state_dir=state)) as files:
    (files.metrics() / "counter_1.db").write_text("metrics")
    store = AdapterStore(state)
    with store.new_private_folder() as private:
        verdict = admit(adapter, "tenant", Policy(), device="cpu", into=private.make).verdict
        store.add(private, verdict, 2**30)
    with store.new_private_folder() as private:
        (private.make() / "half").write_text("a copy")
        print("up", flush=True)
        sys.stdin.read()
    store.close(clear=False)  # as a worker does when it ends
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """A temporary folder for this test, which the server also uses as TMPDIR."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@contextmanager
def server(temporary, adapter, state=None):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, adapter, state or temporary],
        env={"TMPDIR": str(temporary), "PATH": ""}, cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == b"up\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait(20)


def end(process, number=None):
    if number is None:
        process.stdin.close()
    else:
        process.send_signal(number)
    process.wait(20)


def test_a_server_that_ended_leaves_nothing(temporary, trained):
    with server(temporary, trained) as process:
        assert list(temporary.rglob("counter_1.db"))
        assert list(temporary.rglob("adapter_model.safetensors"))
        end(process)
    assert list(temporary.iterdir()) == []


def test_the_next_server_removes_what_a_killed_one_left(temporary, trained):
    with server(temporary, trained) as process:
        end(process, signal.SIGKILL)
    assert list(temporary.rglob("counter_1.db"))
    with ServerFiles(Settings(state_dir=temporary)) as files:
        assert list(temporary.rglob("*.db")) == list(temporary.rglob("*.safetensors")) == []
        assert list(files.metrics().iterdir()) == []
    assert list(temporary.iterdir()) == []


def test_a_server_that_ends_removes_nothing_of_a_running_one(temporary, trained):
    with server(temporary, trained) as living:
        found = {path for path in temporary.rglob("*") if path.is_file()}
        with ServerFiles(Settings(state_dir=temporary)) as files:
            files.metrics()
        assert {path for path in temporary.rglob("*") if path.is_file()} == found
        end(living)
    assert list(temporary.iterdir()) == []


def test_an_operators_state_folder_keeps_its_copies_and_nothing_else(temporary, trained):
    state = temporary / "state"
    for number in (None, signal.SIGKILL):
        with server(temporary, trained, state) as process:
            end(process, number)
    with ServerFiles(Settings(state_dir=state)):
        assert not list(state.rglob("process-*"))
        assert len(stored_names(AdapterStore(state))) == 1
    assert list(temporary.iterdir()) == [state]


def test_a_store_that_was_removed_meanwhile_is_made_again(temporary, trained):
    store = AdapterStore(temporary)
    store.prepare()
    AdapterStore(temporary).close(clear=True)
    assert not store.root.exists()
    path, _ = store_adapter(store, trained)
    assert path.is_dir()
    AdapterStore(temporary).close(clear=True)
    assert path.is_dir(), "the process that pins the stored copy is alive"
    store.close(clear=True)
    assert not store.root.exists()


def test_files_of_somebody_else_are_left_alone(temporary):
    (temporary / "elsewhere").mkdir()
    AdapterStore(temporary).root.symlink_to(temporary / "elsewhere")
    with pytest.raises(GateFailed, match="others"), ServerFiles(Settings(state_dir=temporary)):
        pass
    assert (temporary / "elsewhere").is_dir()
