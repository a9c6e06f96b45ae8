"""Reads tasks, from a plain or an async iterable, in a seeded order."""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Sequence
from typing import Any

from fireworks_training.errors import InvalidArgument
from fireworks_training.rollouts.law import seed_of

Tasks = Iterable[Any] | AsyncIterable[Any]


def check_tasks(tasks: object, shuffle: bool) -> None:
    """Check that tasks can be iterated, and shuffled if they are to be.

    Raises:
        InvalidArgument: they can't.
    """
    if not isinstance(tasks, (Iterable, AsyncIterable)) or isinstance(tasks, (str, bytes)):
        raise InvalidArgument(
            f"tasks must be an iterable or async iterable of tasks, got {type(tasks).__name__}"
        )
    if shuffle and not isinstance(tasks, Sequence):
        raise InvalidArgument(
            "shuffle=True needs all tasks at once: pass a list, or shuffle the iterable yourself"
        )


async def read(
    tasks: Tasks, *, seed: int, shuffle: bool, epochs: int | None
) -> AsyncGenerator[Any, None]:
    """Yield the tasks.

    Args:
        tasks: a sequence is read `epochs` times (None: without end); an iterable once.
        seed: of the run; each epoch of a shuffled sequence has an order of its own.
        shuffle: whether to shuffle; only a sequence can be.
        epochs: as above.
    """
    if isinstance(tasks, AsyncIterable):
        async for task in tasks:
            yield task
    elif isinstance(tasks, Sequence):
        epoch = 0
        while len(tasks) and (epochs is None or epoch < epochs):
            order = list(range(len(tasks)))
            if shuffle:
                random.Random(seed_of(seed, "epoch", epoch)).shuffle(order)  # noqa: S311
            for place in order:
                yield tasks[place]
            epoch += 1
    else:
        for task in tasks:
            yield task
