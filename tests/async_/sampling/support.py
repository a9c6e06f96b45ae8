"""What the tests of the sampler share: quick retries, a tokenizer, checks of what is left."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from fireworks_training._async.sampling import retries
from fireworks_training._async.sampling.concurrency import FixedConcurrencyController
from fireworks_training._async.sampling.retries import RetryPolicy
from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._core.backoff import Backoff, is_billing
from fireworks_training.errors import (
    ApiError,
)

MODEL = "accounts/a/deployments/d"
KEY = "fw_secretkey"
PROMPT = [987001, 987002]


class RecordedBackoff(Backoff):
    """A budget that waits for nothing, and tells how long it would have."""

    def __init__(self, delays: list[float], **options: Any) -> None:
        super().__init__(**options)
        self._delays = delays

    def next_delay(self, error: ApiError, *, now: float) -> float | None:
        delay = super().next_delay(error, now=now)
        if delay is None:
            return None
        self._delays.append(delay)
        return 0.0


def quick(delays: list[float] | None = None, *, attempts: int = 7) -> RetryPolicy:
    """The usual budgets without their waiting."""
    seen = [] if delays is None else delays
    usual = RetryPolicy()
    assert usual.hot_load()._attempts == 11
    return RetryPolicy(
        transient=lambda: RecordedBackoff(seen, attempts=attempts, uniform=lambda: 0.0),
        hot_load=lambda: RecordedBackoff(
            seen, attempts=11, base=0.5, cap=8.0, retryable=retries.is_hot_load
        ),
        flawed=lambda: RecordedBackoff(seen, attempts=3, retryable=lambda _: True),
        billing=lambda: RecordedBackoff(seen, attempts=attempts, retryable=is_billing),
    )


def endless() -> RetryPolicy:
    """Back-off that does not end within a test."""
    return RetryPolicy(transient=lambda: Backoff(base=3600.0, cap=3600.0, uniform=lambda: 0.0))


Make = Callable[..., DeploymentSampler]


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that other tasks bring about."""
    for _ in range(4000):
        if holds():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came about")


SPECIAL = ord("#")


class CharacterTokenizer:
    """One token a character; notes the threads that it is used in."""

    def __init__(self) -> None:
        self.threads: set[int] = set()

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, **kwargs: Any
    ) -> list[int]:
        assert kwargs == {"tokenize": True, "return_dict": False}
        self.threads.add(threading.get_ident())
        text = "".join(f"{m['role']}:{m['content']};" for m in messages)
        return [ord(letter) for letter in text + ("a:" if add_generation_prompt else "")]

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        shown = [token for token in ids if not (skip_special_tokens and token == SPECIAL)]
        return "".join(chr(token) if token < 1000 else "\ufffd" for token in shown)


@contextlib.asynccontextmanager
async def nothing_left(controller: FixedConcurrencyController) -> AsyncIterator[None]:
    """No slot, no waiter and no task of ours is left behind."""
    yield
    await until(lambda: (controller.in_flight, controller.waiting) == (0, 0))

    def ours() -> list[str]:
        names = [task.get_name() for task in asyncio.all_tasks()]
        return [name for name in names if name.startswith("fireworks_training")]

    await until(lambda: not ours())


async def cancel(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
