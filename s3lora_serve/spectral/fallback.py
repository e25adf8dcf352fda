"""From a device that cannot score to the host: never a refusal, and never an error.

A device that is busy or without free memory is tried again with the next adapter. Any other failure
(a kernel that cannot be compiled or launched, a missing library) would come again: the process uses
its devices no more.
"""

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import torch

MEMORY, BUSY, FAILURE = "memory", "busy", "failure"
CAUSES = (MEMORY, BUSY, FAILURE)
"""Why the host scored an adapter that a device should have scored."""

T = TypeVar("T")

_say: Callable[[str], object] = logging.getLogger(__name__).warning
_lock = threading.Lock()  # adapters are scored in several threads
_counts: Counter[str] = Counter()
_logged: set[str] = set()
_failed = False


class DeviceBusy(Exception):
    """Another thread uses the device for longer than scoring on the host would take."""


class _Stopped(Exception):
    """`between_batches` raised: the caller wants to stop, and the device is not the cause."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(cause)
        self.cause = cause


def attempt(
    solve: Callable[[Callable[[], None]], T], between_batches: Callable[[], None]
) -> T | None:
    """What `solve(between_batches)` gives, or None if the device failed, now or earlier.

    Raises:
        Whatever `between_batches` raises.
    """
    global _failed
    if _failed:
        _count(FAILURE)
        return None

    def stopping() -> None:
        try:
            between_batches()
        except BaseException as cause:  # noqa: BLE001 - it is raised again
            raise _Stopped(cause) from None

    try:
        return solve(stopping)
    except _Stopped as stopped:
        raise stopped.cause from None
    except DeviceBusy as error:
        _report(BUSY, "is busy, compiling perhaps; the CPU scores this adapter", error)
    except torch.OutOfMemoryError as error:  # the engine needs the memory more
        _report(MEMORY, "has no free memory; the CPU scores this adapter", error)
    except Exception as error:  # noqa: BLE001 - compilers and drivers raise what they like
        if "out of memory" in str(error).lower():  # of the driver, not of torch's allocator
            _report(MEMORY, "has no free memory; the CPU scores this adapter", error)
            return None
        _failed = True
        _report(FAILURE, "failed; from now on the CPU scores", error)
    return None


def take_counts() -> dict[str, int]:
    """How many times the host stepped in since the last call, by cause."""
    with _lock:
        found = dict(_counts)
        _counts.clear()
    return found


def report_to(say: Callable[[str], object]) -> None:
    """Have the one line for each cause written by `say`, in place of Python's own logging."""
    global _say
    _say = say


def reset() -> None:
    """Use devices again, as in a new process."""
    global _failed
    _failed = False
    _logged.clear()
    _counts.clear()


def _count(cause: str) -> bool:
    """Count one more adapter; whether it is the first of its cause."""
    with _lock:
        _counts[cause] += 1
        first = cause not in _logged
        _logged.add(cause)
    return first


def _report(cause: str, what: str, error: BaseException) -> None:
    if _count(cause):
        problem = str(error).strip().partition("\n")[0][:300]
        _say(f"s3lora: the scoring device {what}: {type(error).__name__}: {problem}")
