"""What one of the gate's threads may use of vLLM's processes: cores, priority, the interpreter."""

import os
import sys
import threading

import torch

NICENESS = 10
"""Of the gate's threads, where vLLM's have 0: on busy cores they get about a tenth. Ours: at 19,
the least, an adapter could pass its deadline while it waits for a core."""

SWITCH_SECONDS = 0.0005
"""For how long one thread keeps the interpreter while others wait for it. Python's 5 ms are as long
as a decode step of a small model, which would wait so long several times in each step. Ours."""


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
