"""A real guarded vLLM that is hung up removes the gate's files and its processes."""

import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.support.server import OPEN_LOADING, Server

pytestmark = pytest.mark.serving


@pytest.fixture
def temporary():
    """A folder with a short path: it contains vLLM's sockets, whose paths have ≤ 107 characters."""
    with tempfile.TemporaryDirectory(prefix="left-", dir="/tmp") as folder:
        yield Path(folder)


def test_a_server_that_gets_sighup_ends_all_processes_and_leaves_no_files(
    model, trained, temporary, tmp_path
):
    """vLLM's API server does not catch SIGHUP, and its engine would keep running."""
    environment = OPEN_LOADING | {"TMPDIR": str(temporary)}
    with Server(model, tmp_path / "log", (), environment) as server:
        assert server.load("acme", trained).status_code == 200
        assert list(temporary.glob("s3lora-*"))
        session = server.process.pid
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(30) == -signal.SIGHUP
        assert list(temporary.glob("s3lora-*")) == []
        running = subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True)
        assert running.stdout == b"", "processes of the engine are still running"
