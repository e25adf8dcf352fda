"""`s3lora serve` passes signals on to vLLM and vLLM's exit status back, and leaves no process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from s3lora_serve.launcher.supervisor import OWN

SUPERVISED = """
import os, sys
from s3lora_serve.launcher.supervisor import end_as, run
end_as(run([sys.executable, "-c", sys.argv[1], *sys.argv[2:]], dict(os.environ)))
"""
SERVER = """
import signal, sys, time
from pathlib import Path
report, expected = Path(sys.argv[1]), int(sys.argv[2])
def on_signal(number, _):
    report.write_text(str(number))
    sys.exit(7)
signal.signal(expected, on_signal)
report.write_text("ready")
while True:
    time.sleep(0.01)
"""
LEAVING_CHILDREN = """
import os, subprocess, sys, time
from pathlib import Path
ignoring = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
children = [subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
            for code in ("import time; time.sleep(60)", ignoring)]
time.sleep(0.5)
Path(sys.argv[1]).write_text(" ".join(str(child.pid) for child in children))
os._exit(3)
"""
CATCHABLE = sorted(
    {s.name for s in signal.valid_signals() if isinstance(s, signal.Signals)} - OWN - {"SIGCHLD"}
)


def supervised(program: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", SUPERVISED, program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE)


def until(holds, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", CATCHABLE)
def test_every_signal_that_can_be_caught_reaches_the_server_and_its_exit_code_the_caller(
    name, tmp_path
):
    number = int(signal.Signals[name])
    process = supervised(SERVER, tmp_path / "report", number)
    until(lambda: (tmp_path / "report").exists() and (tmp_path / "report").read_text() == "ready")
    process.send_signal(number)
    assert process.wait(20) == 7
    assert (tmp_path / "report").read_text() == str(number)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_server_that_a_signal_ended_has_that_exit_status_for_the_caller(ending):
    process = supervised(f"import os; os.kill(os.getpid(), {int(ending)})")
    assert process.wait(20) == -ending


def test_a_server_that_cannot_be_started_says_so():
    program = (
        "from s3lora_serve.launcher.supervisor import run; print(run(['/no/such/program'], {}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "127\n"
    assert "/no/such/program: No such file or directory" in done.stderr


def test_processes_that_the_server_left_running_are_ended(tmp_path):
    process = supervised(LEAVING_CHILDREN, tmp_path / "pids")
    until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
    ending, ignoring = map(int, (tmp_path / "pids").read_text().split())
    until(lambda: not is_running(ending))
    assert is_running(ignoring), "its grace period has not ended"
    process.send_signal(signal.SIGINT)  # cuts the grace period short
    assert process.wait(20) == 3
    assert not is_running(ignoring)


def test_a_killed_supervisor_ends_the_server_too(tmp_path):
    process = supervised(SERVER, tmp_path / "report", int(signal.SIGTERM))
    until(lambda: (tmp_path / "report").exists())
    process.kill()
    process.wait(20)
    until(lambda: (tmp_path / "report").read_text() == str(int(signal.SIGTERM)))


def test_a_signal_from_the_terminal_reaches_the_server_once(tmp_path):
    """The terminal sends the signal to the supervisor and to the server itself."""
    report = tmp_path / "report"
    pid, terminal = os.forkpty()
    counting = SERVER.replace("sys.exit(7)", "time.sleep(0.5); sys.exit(7)").replace(
        "report.write_text(str(number))", "report.open('a').write('.')"
    )
    if not pid:
        arguments = [SUPERVISED, counting, str(report), str(int(signal.SIGINT))]
        os.execv(sys.executable, [sys.executable, "-c", *arguments])
    try:
        until(
            lambda: (tmp_path / "report").exists() and (tmp_path / "report").read_text() == "ready"
        )
        os.write(terminal, b"\x03")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert (tmp_path / "report").read_text() == "ready."
    finally:
        os.close(terminal)
