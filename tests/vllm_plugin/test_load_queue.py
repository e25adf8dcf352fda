"""The queue of loads: bounded, fair between tenants, and left by those that give up."""

import asyncio
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3lora_serve.errors import QueueFull
from s3lora_serve.vllm_plugin.api.load_queue import LoadQueue


async def settle():
    """Let every task run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def entered(tasks):
    """Who has had its turn, in the order of the tasks."""
    return [task.get_name() for task in tasks if task.done() and not task.exception()]


def ask(queue, *tenants):
    return [asyncio.create_task(queue.enter(tenant), name=tenant) for tenant in tenants]


def test_a_tenant_with_many_long_loads_leaves_a_place_to_the_others():
    async def run():
        queue = LoadQueue(2)
        greedy = ask(queue, *["greedy"] * 5)
        await settle()
        assert len(entered(greedy)) == 1
        other = ask(queue, "other")
        await settle()
        assert entered(other) == ["other"]
        for task in greedy:
            task.cancel()

    asyncio.run(run())


def test_waiting_tenants_take_turns_whoever_asked_for_more():
    async def run():
        queue = LoadQueue(1)
        tasks = ask(queue, "a", "a", "a", "a", "b", "c")
        order = []
        while len(order) < len(tasks):
            await settle()
            [latest] = [task for task in tasks if task.done() and task not in order]
            order.append(latest)
            queue.leave(latest.get_name())
        assert [task.get_name() for task in order] == ["a", "a", "b", "c", "a", "a"]
        assert queue.is_idle

    asyncio.run(run())


def test_a_full_queue_turns_loads_away_and_no_tenant_can_fill_it_alone():
    async def run():
        queue = LoadQueue(1, max_waiting=4)
        holder = ask(queue, "holder")
        await settle()
        waiting = ask(queue, "a", "a")
        await settle()
        with pytest.raises(QueueFull, match="S3LORA-406"):
            await queue.enter("a")
        waiting += ask(queue, "b", "c")
        await settle()
        with pytest.raises(QueueFull):
            await queue.enter("d")
        assert queue.waiting == 4
        for task in holder + waiting:
            task.cancel()

    asyncio.run(run())


def test_a_load_that_waits_too_long_is_turned_away_and_leaves_the_queue():
    async def run():
        queue = LoadQueue(1, seconds=0.01)
        await queue.enter("holder")
        with pytest.raises(QueueFull, match=r"0\.01 s"):
            await queue.enter("late")
        queue.leave("holder")
        assert queue.is_idle

    asyncio.run(run())


def test_after_a_pause_the_next_has_its_turn_and_not_before():
    async def run():
        queue = LoadQueue(1)
        await queue.enter("first")
        waiting = ask(queue, "second")
        queue.leave("first", pause=0.05)
        await settle()
        assert not entered(waiting)
        await asyncio.wait_for(waiting[0], 5)
        queue.leave("second")
        await asyncio.wait_for(queue.enter("third"), 1)

    asyncio.run(run())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=30))
def test_no_place_is_lost_whoever_leaves_at_whatever_moment(asks):
    """Some leave before their turn, some in the same step in which it comes."""

    async def run():
        queue = LoadQueue(2)
        tasks = []
        for tenant, leaves, at_once in asks:
            [task] = ask(queue, tenant)
            if not at_once:
                await settle()
            if leaves:
                task.cancel()
            tasks.append((tenant, task))
        held = Counter()
        while tasks:
            await settle()
            for tenant, task in [pair for pair in tasks if pair[1].done()]:
                tasks.remove((tenant, task))
                if not task.cancelled():
                    held[tenant] += 1
                    assert held.total() <= 2
            for tenant in list(held.elements()):
                held[tenant] -= 1
                queue.leave(tenant)
        assert queue.is_idle
        await asyncio.wait_for(queue.enter("next"), 1)
        await asyncio.wait_for(queue.enter("another"), 1)

    asyncio.run(run())
