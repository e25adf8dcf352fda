"""What an engine that has ended is not waited for."""

import asyncio
from types import SimpleNamespace

import pytest

from s3lora_serve.errors import GateFailed

pytest.importorskip("vllm")
from s3lora_serve.vllm_plugin.api.preload_reports import reported
from s3lora_serve.vllm_plugin.api.worker_calls import while_alive


@pytest.mark.timeout(30)
def test_reports_of_an_engine_that_has_ended_are_not_awaited_until_the_deadline(tmp_path):
    """A server that was to end waited for `limits.load_seconds`, two minutes."""
    engine = SimpleNamespace(errored=False)

    async def load():
        asyncio.get_running_loop().call_later(0.1, setattr, engine, "errored", True)
        await while_alive(engine, reported(tmp_path, ["loaded-never"], 120))

    with pytest.raises(GateFailed, match="the engine has ended"):
        asyncio.run(load())


def test_a_report_that_comes_is_the_end_of_waiting(tmp_path):
    (tmp_path / "loaded-1").touch()
    engine = SimpleNamespace(errored=False)
    asyncio.run(while_alive(engine, reported(tmp_path, ["loaded-1"], 120)))
    assert list(tmp_path.iterdir()) == []
