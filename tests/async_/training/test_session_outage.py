"""The start of a session outlasts an outage of the trainer; a host that never answered is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from aiohttp.test_utils import unused_port
from multidict import CIMultiDict

from fireworks_training import ConnectionFailed, ServerFailed
from fireworks_training._async.http.transport import Response, Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.data_plane import DataPlane

URL = "http://trainer"
OPEN = {"what": "open a session"}


class Away(Transport):
    """A trainer that fails as often as it is told, then answers."""

    def __init__(self, *failures: Exception) -> None:
        owner = OwnerLoop()
        owner.get()
        super().__init__(owner=owner, base_url=URL, api_key="k")
        self.failures = list(failures)
        self.asked = 0

    async def exchange(self, method: str, url: str, **_: Any) -> Response:
        self.asked += 1
        if self.failures:
            raise self.failures.pop(0)
        self.hosts.answered(url)
        return Response(200, CIMultiDict[str](), b'{"session_id": "s"}', None, ())


@contextmanager
def long_silent(transport: Transport, url: str = URL) -> Iterator[None]:
    """Within it, a host that has never answered has failed for long."""
    transport.hosts.hopeless(url, ConnectionFailed("the first"), -10.0)
    yield


@pytest.mark.parametrize("failure", [ServerFailed("away", status=503), ConnectionFailed("away")])
async def test_an_outage_is_outlasted(failure: Exception) -> None:
    away = Away(failure)
    with long_silent(away):
        plane = DataPlane(away, URL, known=True)
        assert await plane.call("create_session", {}, **OPEN) == {"session_id": "s"}
    assert away.asked == 2


async def test_a_host_that_answered_is_waited_for() -> None:
    away = Away()
    plane = DataPlane(away, URL)
    with long_silent(away):
        await plane.call("create_session", {}, **OPEN)
        away.failures = [ConnectionFailed("away")]
        await plane.call("create_session", {}, **OPEN)
    assert away.asked == 3


async def test_a_host_that_never_answered_is_given_up() -> None:
    away = Away(*[ConnectionFailed("away")] * 9)
    plane = DataPlane(away, URL)
    with long_silent(away), pytest.raises(ConnectionFailed):
        await plane.call("create_session", {}, **OPEN)
    with pytest.raises(ConnectionFailed):
        await plane.submit("forward", b"", **OPEN)
    assert away.asked == 2


async def test_a_dead_port_is_told_with_its_cure() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    owner = OwnerLoop()
    owner.get()
    async with Transport(owner=owner, base_url=url, api_key="k") as transport:
        plane = DataPlane(transport, url)
        cure = r"Nothing listens at 127\.0\.0\.1, port"
        with long_silent(transport, url), pytest.raises(ConnectionFailed, match=cure):
            await plane.call("create_session", {}, **OPEN)
