"""What the gate's threads leave to the engine's."""

import pytest

from s3lora_serve.vllm_plugin import threads
from s3lora_serve.vllm_plugin.threads import GIVE_WAY_SECONDS, WORK_SECONDS, GiveWay


class Clock:
    """Processor time of one thread, which passes as the test says, and its sleeps."""

    def __init__(self):
        self.worked = 0.0
        self.slept = []

    def thread_time(self):
        return self.worked

    def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    own = Clock()
    monkeypatch.setattr(threads, "time", own)
    return own


def test_thread_gives_way_after_so_much_work_and_not_at_each_call(clock):
    give_way = GiveWay(needed=True)
    for _ in range(8):
        give_way()
        clock.worked += WORK_SECONDS / 2
    assert clock.slept == [GIVE_WAY_SECONDS] * 3


def test_thread_does_not_sleep_while_the_engine_has_no_requests(clock):
    give_way = GiveWay(needed=False)
    clock.worked += 100 * WORK_SECONDS
    give_way()
    assert clock.slept == []
