"""What one of the gate's threads may use of vLLM's processes: cores, priority, the interpreter."""

import os
import sys
import threading
import time

import torch

NICENESS = 10
"""Of the gate's threads, where vLLM's have 0: on busy cores they get about a tenth. Ours: at 19,
the least, an adapter could pass its deadline while it waits for a core."""

SWITCH_SECONDS = 0.0005
"""For how long one thread keeps the interpreter while others wait for it. Python's 5 ms are as long
as a decode step of a small model, which would wait so long several times in each step. Ours."""

WORK_SECONDS = 0.002
GIVE_WAY_SECONDS = 0.01
"""A thread that gives way sleeps so long after so much work: the next step of the engine, some 5 ms
of a small model and more of others, has the interpreter to itself. Ours."""


class GiveWay:
    """Called between parts of work: lets the engine's thread come first, while it has requests.

    A thread that computes in Python takes the interpreter at each operation of the engine's step,
    which would end later by all of the work.
    """

    def __init__(self, *, needed: bool) -> None:
        self._needed = needed
        self._worked = time.thread_time()

    def __call__(self) -> None:
        """Sleep, if it is needed and this thread has worked for long enough since it last slept."""
        if self._needed and time.thread_time() - self._worked >= WORK_SECONDS:
            time.sleep(GIVE_WAY_SECONDS)
            self._worked = time.thread_time()


def use_cores(count: int) -> None:
    """Let torch use `count` cores in this thread, and have vLLM's threads come first."""
    if hasattr(os, "setpriority") and sys.platform == "linux":  # elsewhere it is the process's
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    # torch gives the latest setting to threads that start later, which are vLLM's.
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()
