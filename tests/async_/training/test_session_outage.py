"""The start of a session outlasts an outage of the trainer, by the clock."""

from __future__ import annotations

from typing import Any

import pytest

from fireworks_training import ServerFailed
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.data_plane import DataPlane


class Away(Transport):
    """A trainer that answers 503 until a time; its exchanges take no time."""

    def __init__(self, until: float) -> None:
        super().__init__(owner=OwnerLoop(), base_url="http://trainer", api_key="k")
        self.until, self.now, self.asked = until, 0.0, 0

    async def call(self, method: str, url: str, **options: Any) -> dict[str, Any]:
        backoff = options["backoff"]
        while self.now < self.until:
            self.asked += 1
            error = ServerFailed("away", status=503)
            delay = backoff.next_delay(error, now=self.now)
            if delay is None:
                raise error
            self.now += delay
        return {"session_id": "s"}


async def test_minutes_of_503_are_outlasted_and_more_are_an_error() -> None:
    away = Away(until=280.0)
    answer = await DataPlane(away, "http://t").call("create_session", {}, what="open a session")
    assert answer == {"session_id": "s"}
    assert away.asked < 200
    with pytest.raises(ServerFailed):
        await DataPlane(Away(1000.0), "http://t").call("create_session", {}, what="open a session")
