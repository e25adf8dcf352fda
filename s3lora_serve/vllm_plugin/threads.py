"""Number of cores that one of the gate's threads may use in vLLM's processes."""

import threading

import torch


def use_cores(count: int) -> None:
    """Let torch use `count` cores in this thread; other threads keep their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    # torch gives the latest setting to threads that start later, which are vLLM's.
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()
