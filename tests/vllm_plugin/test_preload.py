"""A worker preloads adapters once, within bounds, and on a single core."""

import os
import threading
import time

import torch

from s3lora_serve.vllm_plugin.engine.preload import MAX_PRELOADED, Preloader


def until_done(preloader, key, work):
    deadline = time.monotonic() + 20
    while not preloader.is_done(key, work):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_work_begins_when_first_asked_for_and_is_taken_once():
    preloader, done = Preloader(), []
    may_end = threading.Event()

    def work():
        may_end.wait(20)
        done.append(1)
        return "loaded"

    assert not preloader.is_done("a", work)
    assert not preloader.is_done("a", work)
    may_end.set()
    until_done(preloader, "a", work)
    assert done == [1]
    assert preloader.take("a") == "loaded"
    assert preloader.take("a") is None


def test_results_that_nobody_takes_are_dropped():
    preloader = Preloader()
    for key in range(MAX_PRELOADED + 1):
        until_done(preloader, key, lambda: "loaded")
    assert preloader.take(0) is None
    assert preloader.take(MAX_PRELOADED) == "loaded"


def test_it_takes_one_core_and_leaves_torch_its_threads():
    torch.randn(1000) @ torch.randn(1000)  # torch creates its threads on first use
    before = torch.get_num_threads()
    preloader, seen = Preloader(), []

    def work():
        seen.append((torch.get_num_threads(), os.sched_getaffinity(0)))

    until_done(preloader, "a", work)
    assert seen == [(1, os.sched_getaffinity(0))]
    assert torch.get_num_threads() == before
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen[-1] == before
