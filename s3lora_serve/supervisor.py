"""Runs the server as a child: hands signals on, and outlives all of its processes."""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

GRACE_SECONDS = 10.0
"""How long the server's other processes may take to end once it has and they were told to."""

POLL_SECONDS = 0.05

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SI_KERNEL = 0x80
"""Origin of a signal that a terminal sent to all of its processes, the server among them."""

OWN = {"SIGKILL", "SIGSTOP", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGURG"} | {
    "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS", "SIGCLD", "SIGPIPE",
}  # fmt: skip
"""Signals that are not handed on: none can catch them, or they are about this process alone."""


def run(line: list[str], environment: Mapping[str, str]) -> int:
    """Run a command until it and every process that it started have ended; return how it ended.

    Signals go on to it. Processes that outlive it are told to end,
    and killed after GRACE_SECONDS. When this process is
    killed, the command is told to end (SIGTERM).

    Returns:
        The exit code, or −N where signal N ended it.
    """
    handed_on = {s for s in signal.valid_signals() if _name(s) not in OWN} - {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, handed_on | {signal.SIGCHLD})
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = _start(line, environment, before)
    try:
        status = _watched(server, handed_on)
        _end_the_others(handed_on)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return status


def end_as(status: int) -> None:
    """End this process as a child ended whose status `run` returned."""
    if status >= 0:
        sys.exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child's is the one to look at
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    sys.exit(128 - status)  # the first process of a container is not killed by its own signals


def _start(line: list[str], environment: Mapping[str, str], mask: set[int | signal.Signals]) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    if server := os.fork():
        return server
    try:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == parent:  # or it died before it was asked for
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.execve(line[0], line, environment)  # noqa: S606 - no shell is meant
    except OSError as error:
        os.write(2, f"s3lora: {line[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _watched(server: int, handed_on: set[signal.Signals]) -> int:
    """Hand signals on until the server has ended; return its status."""
    while True:
        caught = signal.sigwaitinfo(handed_on | {signal.SIGCHLD})
        if caught.si_signo != signal.SIGCHLD:
            if caught.si_code != SI_KERNEL:
                os.kill(server, caught.si_signo)
            continue
        ended = _reap()
        if server in ended:
            return os.waitstatus_to_exitcode(ended[server])


def _reap() -> dict[int, int]:
    """Children that have ended, orphans of the server's among them, and their wait statuses."""
    ended: dict[int, int] = {}
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if child == 0:
            return ended
        ended[child] = status


def _end_the_others(handed_on: set[signal.Signals]) -> None:
    """Tell what the server left running to end; kill it when that takes too long, or one more
    signal comes."""
    deadline = time.monotonic() + GRACE_SECONDS
    _reap()
    _send(_children(), signal.SIGTERM)
    while True:
        _reap()
        if not (others := _children()):
            return
        if signal.sigtimedwait(handed_on, POLL_SECONDS) or time.monotonic() > deadline:
            _send(others, signal.SIGKILL)


def _send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:  # children: no other process gets their number before we reap them
        os.kill(process, number)


def _children() -> list[int]:
    try:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:  # a kernel without it: nobody is waited for
        return []
    return [int(child) for child in listed.split()]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


def _prctl(option: int, value: int) -> None:
    """Ask the kernel; where it does not know this, the server runs all the same."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
