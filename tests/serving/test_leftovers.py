"""A real guarded vLLM leaves nothing of the gate's behind, however it is ended."""

import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving


@pytest.fixture
def temporary():
    """A folder of a short name: vLLM's sockets lie in it, and theirs hold 107 characters."""
    with tempfile.TemporaryDirectory(prefix="left-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_hung_up_server_ends_whole_and_leaves_nothing(model, trained, temporary, tmp_path):
    """vLLM's API server does not catch SIGHUP, and its engine would go on without it."""
    environment = OPEN_LOADING | {"TMPDIR": str(temporary)}
    with Server(model, tmp_path / "log", (), environment) as server:
        assert server.load("acme", trained).status_code == 200
        assert list(temporary.glob("s3lora-*"))
        session = server.process.pid
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(30) == -signal.SIGHUP
        assert list(temporary.glob("s3lora-*")) == []
        running = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True)
        assert running.stdout == b"", "the engine's processes"
