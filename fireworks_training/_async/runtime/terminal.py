"""Shows the waits of this process on its terminal, all of them in one line that is updated.

Where standard error is no terminal it shows nothing: the log has the same facts. The line appears
when a wait has lasted for `SHOWN_AFTER` seconds, and goes away with the last one. It knows `rich`,
and nothing of what is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.status import Status

SHOWN_AFTER = 1.0
"""Seconds after which a wait is shown."""

PERIOD = 0.5
"""Seconds between two updates of the line."""

_waits: dict[object, Callable[[], str]] = {}
_status: list[Status] = []


@contextlib.contextmanager
def shown_on_terminal(describe: Callable[[], str]) -> Generator[None]:
    """Show a wait on the terminal, if there is one, for as long as the block lasts.

    Args:
        describe: gives the text, each time the line is updated.
    """
    if not sys.stderr.isatty():
        yield
        return
    key = object()
    timer = asyncio.get_running_loop().create_task(_show(key, describe))
    try:
        yield
    finally:
        timer.cancel()
        _waits.pop(key, None)
        _draw()


async def _show(key: object, describe: Callable[[], str]) -> None:
    await asyncio.sleep(SHOWN_AFTER)
    _waits[key] = describe
    while True:
        _draw()
        await asyncio.sleep(PERIOD)


def _draw() -> None:
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    if not _waits:
        while _status:
            _status.pop().stop()
        return
    text = Text("; ".join(describe() for describe in _waits.values()))
    if _status:
        _status[0].update(text)
    else:
        status = Status(text, console=Console(stderr=True))
        _status.append(status)
        status.start()
