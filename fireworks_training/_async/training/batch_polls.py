"""One poll for all operations of a model that are under way, where the trainer offers that.

A batch poll tells which requests have ended, with the results of small ones. It is a hint and never
the truth: whatever it leaves open is asked for by `retrieve_future`, as for any other trainer. So a
request that is not told of within `DOUBT_AFTER` is asked for by itself, and where the trainer
refuses batch polls after all, every request is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fireworks_training._async.http.transport import Response
from fireworks_training._async.training.data_plane import (
    QUICK_POLL,
    UNDECIDED,
    DataPlane,
    patient,
    was_refused,
)
from fireworks_training._wire.training.batch_polls import MAX_IDS, FinishedRequest
from fireworks_training.errors import ApiError, FireworksTrainingError, ProtocolError

DOUBT_AFTER = 60.0
"""Seconds without word of a request, until it is asked for by itself."""

EARLY = 4096
"""Completions that are kept for requests which nobody waits for yet."""

Keep = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]

logger = logging.getLogger("fireworks_training.trainer")


class BatchPolls:
    """The batch polls of one model; on its owner loop.

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
        self._refused = False

    async def wait(self, request_id: str) -> Response | None:
        """Wait until the trainer says that a request has ended.

        Returns:
            The answer that `retrieve_future` would give; None where that is to be asked.

        Raises:
            TrainerLost: the trainer's process is gone.
            ApiError: no word from the trainer for long.
        """
        if request_id in self._early:
            return self._early.pop(request_id)
        if self._refused:
            return None
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Response | None] = loop.create_future()
        self._waiting[request_id] = (told, loop.time())
        if self._task is None or self._task.done():
            self._task = self._keep(self._run(), "batch polls")
        try:
            return await told
        finally:
            self._waiting.pop(request_id, None)

    def retrieved(self, request_id: str) -> None:
        """The result of a request is here: the trainer need not keep it."""
        if not self._refused:
            self._retrieved.append(request_id)

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._round()
        except FireworksTrainingError as error:
            while self._waiting:
                told, _ = self._waiting.pop(next(iter(self._waiting)))
                if not told.done():
                    told.set_exception(error)
        except Exception as error:  # those who wait must not wait for ever
            self._give_up(error)

    async def _round(self) -> None:
        """Poll until the trainer answers."""
        loop = asyncio.get_running_loop()
        backoff = patient(UNDECIDED - {409})
        while True:
            named = self._retrieved[:MAX_IDS]
            asked = loop.time()
            try:
                ended, cursor = await self._plane.ended(self._model_id, self._cursor, named)
            except ApiError as error:
                if was_refused(error) or isinstance(error, ProtocolError):
                    self._give_up(error)
                    return
                delay = backoff.next_delay(error, now=loop.time())
                if delay is None:
                    raise
                await asyncio.sleep(delay)
                continue
            del self._retrieved[: len(named)]
            news = cursor != self._cursor  # else the trainer repeats itself
            self._cursor = cursor
            for one in ended:
                self._ended(one)
            self._doubt(loop.time())
            if not (ended and news) and loop.time() - asked < QUICK_POLL:
                await asyncio.sleep(QUICK_POLL)
            return

    def _ended(self, ended: FinishedRequest) -> None:
        answer = None
        if ended.body is not None:
            answer = Response(200, {"Content-Type": ended.content_type}, ended.body, None)
        if ended.request_id in self._waiting:
            self._tell(ended.request_id, answer)
            return
        # Its submit is not answered yet, or it is nobody's here.
        self._early[ended.request_id] = answer
        if len(self._early) > EARLY:
            del self._early[next(iter(self._early))]

    def _tell(self, request_id: str, answer: Response | None) -> None:
        told, _ = self._waiting.pop(request_id)
        if not told.done():
            told.set_result(answer)

    def _doubt(self, now: float) -> None:
        """Let those who have waited long ask for themselves."""
        for request_id, (_, since) in list(self._waiting.items()):
            if now - since < DOUBT_AFTER:
                return  # the others came later
            self._tell(request_id, None)

    def _give_up(self, error: Exception) -> None:
        self._refused = True
        self._retrieved.clear()
        logger.warning(
            "%s: the trainer offers batch polls, and they fail (%s: %s); results are asked for one "
            "by one",
            self._model_id,
            type(error).__name__,
            error,
        )
        for request_id in list(self._waiting):
            self._tell(request_id, None)
