"""How many cores a thread of ours may use in a process that is vLLM's."""

import threading

import torch


def use_cores(count: int) -> None:
    """Let torch use `count` cores for what this thread does, and as many as before elsewhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    # torch gives its latest setting to threads that begin later: those are not ours.
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()
