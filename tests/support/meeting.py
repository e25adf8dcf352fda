"""Requests that have to meet in the engine."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.tiny_model import PROMPT


def long_answer(server, name, tokens=200):
    """The text of an answer that no end of text ends."""
    with ThreadPoolExecutor() as threads:
        return begun(threads, server, name, tokens).result()


def begun(threads, server, name, tokens=200):
    """A long answer that is under way: its first token has come."""
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


def attempts(scene, times=20):
    """Play a scene whose requests have to meet in the engine until they do."""
    for _ in range(times):
        if scene():
            return
    pytest.fail(f"the requests never met in {times} attempts")


def base_answer_beside(server, adapters, name="neighbour"):
    """What the base model answers alone, and in a batch with requests for adapters."""
    names = [f"{name}-{i}" for i in range(len(adapters))]
    for each, folder in zip(names, adapters, strict=True):
        assert server.load(each, folder).status_code == 200
    alone = long_answer(server, "base", 60)
    found = []

    def met():
        with ThreadPoolExecutor() as threads:
            others = [begun(threads, server, each, 240) for each in names]
            found.append(long_answer(server, "base", 60))
            return not any(other.done() for other in others)

    attempts(met)
    for each in names:
        server.unload(each)
    return alone, found[-1]
