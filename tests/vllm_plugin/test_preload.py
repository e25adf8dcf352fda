"""A worker preloads adapters once, reports the end of each, and drops none that is awaited."""

import asyncio
import os
import threading
import time

import pytest
import torch

from s3lora_serve.errors import DeadlinePassed
from s3lora_serve.vllm_plugin.api.preload_reports import reported
from s3lora_serve.vllm_plugin.engine import preload
from s3lora_serve.vllm_plugin.engine.preload import Preloader


def wait_for(folder, *names, seconds=20):
    asyncio.run(reported(folder, names, seconds))


def test_work_begins_when_first_asked_for_and_is_taken_once(tmp_path):
    preloader, done = Preloader(), []
    may_end = threading.Event()

    def work():
        may_end.wait(20)
        done.append(1)
        return "loaded"

    reports = [preloader.start("a", work, tmp_path) for _ in range(2)]
    assert list(tmp_path.iterdir()) == []
    may_end.set()
    wait_for(tmp_path, *reports)
    assert done == [1]
    assert preloader.take("a") == "loaded"
    assert preloader.take("a") is None
    assert list(tmp_path.iterdir()) == [], "reports are removed by who read them"


def test_nothing_that_is_awaited_is_dropped_however_much_is_asked_for(tmp_path):
    """Registrations that waited for a dropped copy asked for it again and again."""
    counts = []
    preloader = Preloader(counts.append)
    reports = [preloader.start(key, lambda key=key: key, tmp_path) for key in range(200)]
    wait_for(tmp_path, *reports)
    assert [preloader.take(key) for key in range(200)] == list(range(200))
    assert max(counts) == 200
    assert counts[-1] == 0


def test_what_is_forgotten_is_not_begun_and_not_reported(tmp_path):
    preloader, begun = Preloader(), []
    may_end = threading.Event()
    first = preloader.start("running", lambda: may_end.wait(20), tmp_path)
    preloader.start("queued", lambda: begun.append(1), tmp_path)
    preloader.forget("queued")
    preloader.forget("running")
    preloader.forget("never started")
    may_end.set()
    wait_for(tmp_path, preloader.start("next", lambda: None, tmp_path))
    assert begun == []
    assert not (tmp_path / first).exists()


def test_what_an_ended_api_server_left_is_dropped_after_a_while(tmp_path, monkeypatch):
    preloader = Preloader()
    wait_for(tmp_path, preloader.start("left", lambda: "loaded", tmp_path))
    monkeypatch.setattr(preload, "ABANDONED_SECONDS", 0.0)
    preloader.start("next", lambda: "loaded", tmp_path)
    assert preloader.take("left") is None


def test_a_worker_that_does_not_report_in_time_ends_the_wait_with_a_code(tmp_path):
    (tmp_path / "here").touch()
    with pytest.raises(DeadlinePassed, match=r"1 of 2 workers .*limits\.load_seconds"):
        wait_for(tmp_path, "here", "missing", seconds=0.05)
    assert list(tmp_path.iterdir()) == []


def test_it_takes_one_core_and_leaves_torch_its_threads(tmp_path):
    torch.randn(1000) @ torch.randn(1000)  # torch creates its threads on first use
    before = torch.get_num_threads()
    preloader, seen = Preloader(), []

    def work():
        seen.append((torch.get_num_threads(), os.sched_getaffinity(0)))

    wait_for(tmp_path, preloader.start("a", work, tmp_path))
    assert seen == [(1, os.sched_getaffinity(0))]
    assert torch.get_num_threads() == before
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen[-1] == before


def test_a_report_that_cannot_be_written_stops_nothing(tmp_path):
    preloader = Preloader()
    preloader.start("a", lambda: "loaded", tmp_path / "gone")
    deadline = time.monotonic() + 20
    while preloader._preloads["a"].future.running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert preloader.take("a") == "loaded"
