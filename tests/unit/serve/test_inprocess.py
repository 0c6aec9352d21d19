"""The engine core on a thread: one thing at a time, no request forgotten, no spinning."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from dpo_service.serve.inprocess import ThreadedCore


class Core:
    """Stands in for InprocClient: each step makes one token of each request; a request is (name, tokens)."""

    def __init__(self):
        self.left, self.steps, self.threads, self.shutdowns = {}, 0, {threading.get_ident()}, 0
        self.engine_core = SimpleNamespace(scheduler=SimpleNamespace(has_requests=lambda: bool(self.left)))
        self.broken = False

    def add_request(self, request):
        self.threads.add(threading.get_ident())
        name, tokens = request
        self.left[name] = tokens

    def abort_requests(self, names):
        for name in names:
            self.left.pop(name, None)

    def get_output(self):
        self.threads.add(threading.get_ident())
        self.steps += 1
        if self.broken:
            raise RuntimeError("the core is broken")
        made = list(self.left)
        self.left = {name: tokens - 1 for name, tokens in self.left.items() if tokens > 1}
        return SimpleNamespace(outputs=made)

    def echo(self, *args, **kwargs):
        return args, kwargs

    def shutdown(self):
        self.shutdowns += 1


@pytest.fixture
def core():
    made = ThreadedCore(Core)
    yield made
    made.shutdown()


async def collect(core, count):
    """`count` tokens, as AsyncLLM's output handler pulls them."""
    found = []
    while len(found) < count:
        found += (await asyncio.wait_for(core.get_output_async(), 5)).outputs
    return found


async def test_every_request_gets_all_its_tokens_whenever_it_comes(core):
    collecting = asyncio.create_task(collect(core, 300))
    for number in range(100):
        await core.add_request_async((number, 3))
        if number % 10 == 0:
            await asyncio.sleep(0.002)  # the core runs dry now and then
    found = await collecting
    assert sorted(found) == sorted(list(range(100)) * 3)


async def test_everything_runs_on_one_thread_which_is_not_ours(core):
    await core.add_request_async(("a", 2))
    await collect(core, 2)
    assert len(core._client.threads) == 1
    assert threading.get_ident() not in core._client.threads


async def test_without_work_it_stands_still(core):
    waiting = asyncio.create_task(core.get_output_async())
    await core.add_request_async(("a", 1))
    await waiting
    steps = core._client.steps
    waiting = asyncio.create_task(core.get_output_async())
    await asyncio.sleep(0.05)
    assert core._client.steps == steps
    waiting.cancel()


async def test_the_next_step_begins_before_it_is_asked_for(core):
    await core.add_request_async(("a", 3))
    await core.get_output_async()
    await core.echo_async()  # the thread comes to it after the step that is ahead
    assert core._client.steps == 2
    assert await collect(core, 2) == ["a"] * 2
    await core.echo_async()
    assert core._client.steps == 3, "none is ahead of the last"


async def test_an_aborted_request_makes_no_more(core):
    await core.add_request_async(("a", 10**6))
    await core.add_request_async(("b", 3))
    await core.abort_requests_async(["a"])
    assert await collect(core, 3) == ["b"] * 3


async def test_a_broken_core_says_so_to_who_waits(core):
    core._client.broken = True
    await core.add_request_async(("a", 1))
    with pytest.raises(RuntimeError, match="broken"):
        await core.get_output_async()


async def test_other_calls_go_to_the_method_of_that_name(core):
    assert await core.echo_async(1, key=2) == ((1,), {"key": 2})
    with pytest.raises(AttributeError):
        _ = core.nonsense_async


def test_shutdown_again_is_fine():
    core = ThreadedCore(Core)
    core.shutdown()
    core.shutdown()
    assert core._client.shutdowns == 1
