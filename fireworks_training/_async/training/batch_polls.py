"""Batch polls: one poll for all requests of a model in flight, where the trainer offers that.

A batch poll names the requests that have ended, with the results of small ones. It is a hint and
never the truth: whatever it leaves open is asked for by `retrieve_future`, as for any other
trainer. So a request that no batch poll names within `DOUBT_AFTER` is asked for by itself, and
where the trainer refuses batch polls after all, every request is, for a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fireworks_training._async.http.transport import Response
from fireworks_training._async.training.data_plane import (
    QUICK_POLL,
    DataPlane,
    was_refused,
)
from fireworks_training._core.patience import Patience, judge_poll
from fireworks_training._wire.training.batch_polls import MAX_IDS, FinishedRequest
from fireworks_training.errors import ApiError, FireworksTrainingError, ProtocolError

DOUBT_AFTER = 20.0
"""Seconds in which no batch poll names a request, until it is asked for by itself."""

TRY_AGAIN_AFTER = 60.0
"""Seconds for which results are asked for one by one after a batch poll was refused; twice as long
each time, up to `TRY_AGAIN_LONGEST`."""

TRY_AGAIN_LONGEST = 900.0

MAX_EARLY = 4096
"""Results that are kept for requests whose submits are not answered yet."""

Keep = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]

logger = logging.getLogger("fireworks_training.trainer")


class BatchPolls:
    """Makes the batch polls of one model; on its owner loop.

    Args:
        plane: the trainer's HTTP interface.
        model_id: the model.
        keep: runs a coroutine that ends with the client.
    """

    def __init__(self, plane: DataPlane, model_id: str, keep: Keep) -> None:
        self._plane = plane
        self._model_id = model_id
        self._keep = keep
        self._cursor = 0
        self._waiting: dict[str, tuple[asyncio.Future[Response | None], float]] = {}
        self._early: dict[str, Response | None] = {}
        self._retrieved: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._refused_until = 0.0
        self._pause = TRY_AGAIN_AFTER

    async def wait(self, request_id: str) -> Response | None:
        """Wait until a batch poll names a request as ended.

        Returns:
            The answer that `retrieve_future` would give; None where that is to be asked.

        Raises:
            TrainerLost: the trainer's process is gone.
            ApiError: no answer from the trainer for long.
        """
        if request_id in self._early:
            return self._early.pop(request_id)
        loop = asyncio.get_running_loop()
        if loop.time() < self._refused_until:
            return None
        answer: asyncio.Future[Response | None] = loop.create_future()
        self._waiting[request_id] = (answer, loop.time())
        if self._task is None or self._task.done():
            self._task = self._keep(self._run(), "batch polls")
        try:
            return await answer
        finally:
            self._waiting.pop(request_id, None)

    def retrieved(self, request_id: str) -> None:
        """Note that the result of a request is here: the trainer need not keep it."""
        if len(self._retrieved) < MAX_EARLY:
            self._retrieved.append(request_id)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._round()
        except FireworksTrainingError as error:
            while self._waiting:
                answer, _ = self._waiting.pop(next(iter(self._waiting)))
                if not answer.done():
                    answer.set_exception(error)
        except Exception as error:  # those who wait must not wait for ever
            self._give_up(error)

    async def _round(self) -> None:
        """Poll until the trainer answers."""
        loop = asyncio.get_running_loop()
        patience = Patience(judge_poll)
        while True:
            named = self._retrieved[:MAX_IDS]
            asked = loop.time()
            try:
                ended, cursor = await self._plane.ended(self._model_id, self._cursor, named)
            except ApiError as error:
                if was_refused(error) or isinstance(error, ProtocolError):
                    self._give_up(error)
                    return
                delay = patience.next_delay(error, now=loop.time())
                if delay is None:
                    raise
                self._doubt(loop.time())
                if not self._waiting:
                    return
                await asyncio.sleep(delay)
                continue
            self._pause = TRY_AGAIN_AFTER
            del self._retrieved[: len(named)]
            is_new = cursor != self._cursor  # else the trainer repeats itself
            self._cursor = cursor
            for one in ended:
                self._ended(one)
            self._doubt(loop.time())
            if not (ended and is_new) and loop.time() - asked < QUICK_POLL:
                await asyncio.sleep(QUICK_POLL)
            return

    def _ended(self, ended: FinishedRequest) -> None:
        response = None
        if ended.body is not None:
            response = Response(200, {"Content-Type": ended.content_type}, ended.body, None)
        if ended.request_id in self._waiting:
            self._give(ended.request_id, response)
            return
        # Its submit is not answered yet, or it is nobody's here.
        self._early[ended.request_id] = response
        if len(self._early) > MAX_EARLY:
            del self._early[next(iter(self._early))]

    def _give(self, request_id: str, response: Response | None) -> None:
        answer, _ = self._waiting.pop(request_id)
        if not answer.done():
            answer.set_result(response)

    def _doubt(self, now: float) -> None:
        """Let the requests that have waited long be asked for by themselves."""
        for request_id, (_, since) in list(self._waiting.items()):
            if now - since < DOUBT_AFTER:
                return  # the others came later
            self._give(request_id, None)

    def _give_up(self, error: Exception) -> None:
        self._refused_until = asyncio.get_running_loop().time() + self._pause
        self._pause = min(2 * self._pause, TRY_AGAIN_LONGEST)
        self._retrieved.clear()
        logger.warning(
            "%s: the trainer offers batch polls, and they fail (%s: %s); results are asked for one "
            "by one",
            self._model_id,
            type(error).__name__,
            error,
        )
        for request_id in list(self._waiting):
            self._give(request_id, None)
