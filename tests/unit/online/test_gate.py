"""The gate: no more inside than there is room for, nobody inside while the weights change, nobody forgotten."""

import asyncio

import pytest

from dpo_service.online.gate import Gate


async def visit(gate, size, log, name, leave):
    async with gate.inside(size):
        log.append(name)
        await leave.wait()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_it_admits_in_order_up_to_its_limit():
    gate, log, leave = Gate(4), [], [asyncio.Event() for _ in range(4)]
    tasks = [asyncio.create_task(visit(gate, 2, log, name, leave[name])) for name in range(4)]
    await settle()
    assert log == [0, 1]
    leave[1].set()
    await settle()
    assert log == [0, 1, 2]
    for event in leave:
        event.set()
    await asyncio.gather(*tasks)
    assert log == [0, 1, 2, 3]


async def test_what_is_larger_than_the_limit_goes_alone():
    gate, log, leave = Gate(2), [], asyncio.Event()
    tasks = [asyncio.create_task(visit(gate, 5, log, name, leave)) for name in range(2)]
    await settle()
    assert log == [0]
    leave.set()
    await asyncio.gather(*tasks)
    assert log == [0, 1]


async def test_a_change_waits_for_who_is_inside_and_not_for_who_waits():
    gate, log, first, second = Gate(1), [], asyncio.Event(), asyncio.Event()

    async def change():
        async with gate.closed():
            log.append("changed")

    tasks = [asyncio.create_task(visit(gate, 1, log, "first", first))]
    tasks.append(asyncio.create_task(visit(gate, 1, log, "second", second)))
    await settle()
    tasks.append(asyncio.create_task(change()))
    await settle()
    assert log == ["first"]
    first.set()
    await settle()
    assert log == ["first", "changed", "second"]
    second.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize("settled", [False, True])
async def test_who_gives_up_leaves_no_slot_taken(settled):
    gate, log, leave = Gate(1), [], asyncio.Event()
    first = asyncio.create_task(visit(gate, 1, log, "first", leave))
    await settle()
    waiting = asyncio.create_task(visit(gate, 1, log, "waiting", asyncio.Event()))
    await settle()
    leave.set()
    if settled:
        await settle()
    else:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(first, waiting, return_exceptions=True)
    async with asyncio.timeout(5), gate.inside(1), asyncio.timeout(5):
        pass
    async with asyncio.timeout(5), gate.closed():
        pass
