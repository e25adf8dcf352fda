"""Requests that must run in the engine at the same time."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.tiny_model import PROMPT


def long_answer(server, name, tokens=240):
    """The text of an answer of exactly `tokens` tokens; end-of-text tokens are ignored."""
    with ThreadPoolExecutor() as threads:
        return start_long_answer(threads, server, name, tokens).result()


def start_long_answer(threads, server, name, tokens=240):
    """Start a long answer and return its future once the first token has arrived."""
    first = threading.Event()
    body = {
        "model": name, "prompt": PROMPT.format("Peru"), "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip

    def read():
        text = ""
        with server.request("POST", "/v1/completions", json=body, stream=True) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith(b"data: {"):
                    text += json.loads(line.removeprefix(b"data: "))["choices"][0]["text"]
                    first.set()
        return text

    answer = threads.submit(read)
    assert first.wait(60)
    return answer


def retry_until_concurrent(scenario, times=20):
    """Repeat a scenario until it returns true: its requests ran in the engine at one time."""
    for _ in range(times):
        if scenario():
            return
    pytest.fail(f"the requests never ran at the same time in {times} attempts")


def base_answers_alone_and_batched(server, adapters, name="neighbour", times=5):
    """The base model's answer alone, and the set of its answers while adapters answer.

    Each adapter answers without a pause, so that the base's requests begin and end beside others.
    """
    names = [f"{name}-{i}" for i in range(len(adapters))]
    for each, folder in zip(names, adapters, strict=True):
        assert server.load(each, folder).status_code == 200
    alone = long_answer(server, "base", 60)
    enough = threading.Event()

    def answer_without_pause(each):
        while not enough.is_set():
            long_answer(server, each)

    with ThreadPoolExecutor() as threads:
        running = [threads.submit(answer_without_pause, each) for each in names]
        try:
            batched = {long_answer(server, "base", 60) for _ in range(times)}
        finally:
            enough.set()
        for each in running:
            each.result()
    for each in names:
        server.unload(each)
    return alone, batched
