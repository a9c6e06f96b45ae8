"""Connections that end under the sampler, and the limit of open files."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import Iterator
from typing import Any

import pytest

from fireworks_training._async.http import open_files
from fireworks_training._async.sampling.concurrency import FixedConcurrencyController
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training.errors import ConnectionFailed, SamplingRequestError
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from tests.async_.sampling.support import Make, endless, nothing_left, quick, until


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Use up all descriptors that a lowered limit leaves."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    source, held = os.dup(0), list[int]()
    resource.setrlimit(resource.RLIMIT_NOFILE, (source + 8, before[1]))
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.dup(source))
        yield
    finally:
        for descriptor in (source, *held):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_the_limit_of_open_files_is_raised(server: CompletionsServer, shared: Make) -> None:
    sampler = shared()
    with no_descriptor_left():
        found = await sampler.sample_with_prompt_tokens([1], n=4, max_tokens=1)
        assert open_files.limit() > 100
    assert len(found) == 4
    assert len(server.bodies) == 4


async def test_a_limit_that_can_t_be_raised_is_told(
    server: CompletionsServer, shared: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "raise_limit", lambda: False)
    sampler = shared(retries=quick(attempts=2))
    with no_descriptor_left(), pytest.raises(SamplingRequestError, match="limit of") as caught:
        await sampler.sample_with_prompt_tokens([1], max_tokens=1)
    assert str(caught.value.attempts) == "2"
    assert isinstance(caught.value.cause, ConnectionFailed)
    assert "ulimit" in str(caught.value)
    assert server.bodies == []


def test_a_limit_as_high_as_it_may_be_stays() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        open_files.raise_limit()
        assert not open_files.raise_limit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_a_kept_connection_that_the_server_closed_costs_an_attempt_at_most(
    server: CompletionsServer, make: Make
) -> None:
    async def complete_and_close(
        here: CompletionsServer, request: stub.web.Request, body: dict[str, Any]
    ) -> stub.web.StreamResponse:
        response = await stub.complete(here, request, body)
        assert request.transport is not None
        request.transport.abort()
        return response

    sampler = make()
    server.otherwise = complete_and_close
    for _ in range(5):
        (one,) = await sampler.sample_with_prompt_tokens([1], max_tokens=2)
        assert one.text == "<2><3>"
    assert len(server.bodies) <= 10


async def test_the_news_of_a_load_wakes_those_who_wait_for_it(
    server: CompletionsServer, shared: Make
) -> None:
    """Without the news they would wait for an hour."""
    news = HotLoadSignal()
    loading = True

    async def load_or_complete(*args: Any) -> Any:
        return await (stub.status(425) if loading else stub.complete)(*args)

    server.otherwise = load_or_complete
    controller = FixedConcurrencyController(4)
    policy = type(quick())(hot_load=endless().transient)
    sampler = shared(hot_loads=news, retries=policy, concurrency_controller=controller)
    async with nothing_left(controller):
        with news.load():
            task = asyncio.ensure_future(_all(sampler.sample_with_prompt_tokens([1], n=4)))
            await until(lambda: len(server.bodies) == 4 and controller.in_flight == 0)
            loading = False
        assert len(await asyncio.wait_for(task, 10)) == 4
    assert news.loading == 0


async def _all(call: Any) -> Any:
    return await call
