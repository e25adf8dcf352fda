"""A lock by name excludes others of that name, and is forgotten afterwards."""

import asyncio

from s3lora_serve.vllm_plugin.api.name_locks import NameLocks


def test_one_name_is_held_once_at_a_time_and_no_unused_lock_is_kept():
    locks, held, most = NameLocks(), {}, {}

    async def work(name):
        async with locks[name]:
            held[name] = held.get(name, 0) + 1
            most[name] = max(most.get(name, 0), held[name])
            try:
                await asyncio.sleep(0)
            finally:
                held[name] -= 1

    async def main():
        tasks = [asyncio.create_task(work(f"name {i % 50}")) for i in range(500)]
        await asyncio.sleep(0)
        assert len(locks) == 50
        tasks[7].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert set(most.values()) == {1}
    assert len(locks) == 0
