"""Cancelling and closing, in each phase: nothing is left, and the server is told."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from fireworks_training._async.sampling.concurrency import FixedConcurrencyController
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training.errors import (
    ClientClosed,
    SamplingClientClosedError,
)
from fireworks_training.models import SampledCompletion
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import KEY, MODEL, Make, cancel, endless, nothing_left, until


@pytest.mark.parametrize(
    "hang", [stub.hang_before_headers, stub.hang_headers_only, stub.hang_mid_stream]
)
async def test_cancelled_while_the_server_works(
    server: CompletionsServer, either: Make, hang: stub.Behaviour
) -> None:
    server.otherwise = hang
    controller = FixedConcurrencyController(8)
    sampler = either(concurrency_controller=controller)
    async with nothing_left(controller):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=5, max_tokens=2))
        await until(lambda: server.generating == 5)
        await server.reached.wait()
        await cancel(task)
        await asyncio.wait_for(server.idle.wait(), 5)
    assert server.left == 5


async def test_cancelled_while_it_waits_for_a_slot(server: CompletionsServer, either: Make) -> None:
    controller = FixedConcurrencyController(1)
    sampler = either(concurrency_controller=controller)
    await controller.acquire()
    async with nothing_left(controller):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=3))
        await until(lambda: controller.waiting == 3)
        await cancel(task)
        await until(lambda: controller.waiting == 0)
        assert controller.in_flight == 1
        controller.release()
    assert server.bodies == []


async def test_cancelled_while_it_connects(either: Make) -> None:
    reached, left = asyncio.Event(), asyncio.Event()

    async def never_shake_hands(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        reached.set()
        await reader.read()
        left.set()
        writer.close()

    silent = await asyncio.start_server(never_shake_hands, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    controller = FixedConcurrencyController(2)
    sampler = either(url=f"https://127.0.0.1:{port}", concurrency_controller=controller)
    async with nothing_left(controller):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1]))
        await reached.wait()
        await cancel(task)
        await asyncio.wait_for(left.wait(), 5)
    silent.close()
    await silent.wait_closed()


async def test_cancelled_in_back_off_which_holds_no_slot(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.status(503)
    controller = FixedConcurrencyController(2)
    sampler = either(concurrency_controller=controller, retries=endless())
    async with nothing_left(controller):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=4))
        await until(lambda: len(server.bodies) == 4 and controller.in_flight == 0)
        await cancel(task)
    assert len(server.bodies) == 4


async def test_only_the_last_waiter_takes_the_request_with_it(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.pause_mid_stream
    controller = FixedConcurrencyController(2)
    call = either(concurrency_controller=controller).sample_with_prompt_tokens([1], max_tokens=2)
    first, second = asyncio.ensure_future(_wait(call)), asyncio.ensure_future(_wait(call))
    await server.reached.wait()
    await cancel(first)
    server.go_on.set()
    assert len(await second) == 1
    assert (server.left, len(server.bodies)) == (0, 1)


async def _wait(call: Any) -> list[SampledCompletion]:
    found: list[SampledCompletion] = await call
    return found


async def test_a_time_limit_around_a_call_cancels_it(
    server: CompletionsServer, either: Make
) -> None:
    server.otherwise = stub.hang_mid_stream
    controller = FixedConcurrencyController(2)
    async with nothing_left(controller):
        with pytest.raises(TimeoutError):
            call = either(concurrency_controller=controller).sample_with_prompt_tokens([1])
            await asyncio.wait_for(call, 0.05)
        if server.bodies:
            await asyncio.wait_for(server.idle.wait(), 5)


async def test_closing_ends_what_is_under_way(server: CompletionsServer, either: Make) -> None:
    server.otherwise = stub.hang_mid_stream
    controller = FixedConcurrencyController(4)
    sampler = either(concurrency_controller=controller)
    async with nothing_left(controller):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=2))
        await until(lambda: server.generating == 2)
        await sampler.aclose()
        with pytest.raises(SamplingClientClosedError, match="safe to ask"):
            await task
        await asyncio.wait_for(server.idle.wait(), 5)
    await sampler.aclose()
    with pytest.raises(ClientClosed):
        sampler.sample_with_prompt_tokens([1])


async def test_a_sampler_of_a_service_leaves_the_connections_open(
    server: CompletionsServer, shared: Make
) -> None:
    first, second = shared(), shared()
    await first.sample_with_prompt_tokens([1], max_tokens=1)
    await first.aclose()
    await second.sample_with_prompt_tokens([1], max_tokens=1)
    assert len(server.peers) == 1


async def test_a_call_made_before_the_close_does_not_start_after_it(make: Make) -> None:
    sampler = make()
    call = sampler.sample_with_prompt_tokens([1])
    sampler.close()
    with pytest.raises(ClientClosed):
        await call


def test_the_portal_s_thread_goes_with_the_last_sampler() -> None:
    with stub.CompletionsServer() as server:
        before = set(threading.enumerate())
        with DeploymentSampler(server.url, MODEL, KEY) as sampler:
            sampler.sample_with_prompt_tokens([1], max_tokens=1).result()
        assert set(threading.enumerate()) <= before  # one of another test may end meanwhile


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
@pytest.mark.parametrize(
    "phase", [stub.hang_before_headers, stub.hang_headers_only, stub.hang_mid_stream]
)
async def test_no_descriptor_is_left(
    server: CompletionsServer, shared: Make, phase: stub.Behaviour
) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    sampler = shared(concurrency_controller=FixedConcurrencyController(8))
    await sampler.sample_with_prompt_tokens([1], n=1, max_tokens=1)
    before = descriptors()
    server.otherwise = phase
    for _ in range(3):
        task = asyncio.create_task(sampler.sample_with_prompt_tokens([1], n=8))
        await until(lambda: server.generating == 8)
        assert descriptors() > before
        await cancel(task)
        await asyncio.wait_for(server.idle.wait(), 5)
    await until(lambda: descriptors() <= before)
