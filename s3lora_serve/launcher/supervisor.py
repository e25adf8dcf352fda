"""Runs the server as a child process: forwards signals, and waits for all of its processes."""

import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

GRACE_SECONDS = 10.0
"""Time for the server's other processes to end after it has ended and they got SIGTERM."""

POLL_SECONDS = 0.05

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
SI_KERNEL = 0x80
"""Origin of a signal that a terminal sent to all of its processes, so to the server too."""

OWN = {"SIGKILL", "SIGSTOP", "SIGCONT", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGWINCH", "SIGURG"} | {
    "SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP", "SIGSYS", "SIGCLD", "SIGPIPE",
}  # fmt: skip
"""Signals that are not forwarded: they cannot be caught, or concern this process alone."""


def run(line: list[str], environment: Mapping[str, str]) -> int:
    """Run a command until it and every process that it started have ended.

    Signals are forwarded to it. Processes that outlive it get SIGTERM, and SIGKILL after
    GRACE_SECONDS. If this process is killed, the command gets SIGTERM.

    Returns:
        The exit code, or −N where signal N ended it.
    """
    forwarded = {s for s in signal.valid_signals() if _name(s) not in OWN} - {signal.SIGCHLD}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, forwarded | {signal.SIGCHLD})
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = _start(line, environment, before)
    try:
        status = _watched(server, forwarded)
        _end_the_others(forwarded)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return status


def end_as(status: int) -> None:
    """End this process with a status that `run` returned."""
    if status >= 0:
        sys.exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child's core dump is the useful one
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


def _watched(server: int, forwarded: set[signal.Signals]) -> int:
    """Forward signals until the server has ended; return its status."""
    while True:
        caught = signal.sigwaitinfo(forwarded | {signal.SIGCHLD})
        if caught.si_signo != signal.SIGCHLD:
            if caught.si_code != SI_KERNEL:
                os.kill(server, caught.si_signo)
            continue
        ended = _reap()
        if server in ended:
            return os.waitstatus_to_exitcode(ended[server])


def _reap() -> dict[int, int]:
    """Ended children, with adopted orphans of the server, and their wait statuses."""
    ended: dict[int, int] = {}
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        if child == 0:
            return ended
        ended[child] = status


def _end_the_others(forwarded: set[signal.Signals]) -> None:
    """Send SIGTERM to the remaining processes, and SIGKILL after a timeout or on another signal."""
    deadline = time.monotonic() + GRACE_SECONDS
    _reap()
    _send(_children(), signal.SIGTERM)
    while True:
        _reap()
        if not (others := _children()):
            return
        if signal.sigtimedwait(forwarded, POLL_SECONDS) or time.monotonic() > deadline:
            _send(others, signal.SIGKILL)


def _send(processes: list[int], number: signal.Signals) -> None:
    for process in processes:  # children: their numbers are not reused before they are reaped
        os.kill(process, number)


def _children() -> list[int]:
    try:
        listed = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:  # a kernel without it: do not wait for the others
        return []
    return [int(child) for child in listed.split()]


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


def _prctl(option: int, value: int) -> None:
    """Call prctl; a kernel that lacks an option only loses the cleanup."""
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
