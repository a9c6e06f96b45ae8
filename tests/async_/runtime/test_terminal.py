"""What a terminal shows of a wait; and that a pipe gets nothing."""

from __future__ import annotations

import asyncio
import io
import sys

import pytest

from fireworks_training._async.runtime import terminal as module


class Terminal(io.StringIO):
    """Standard error, on a terminal or not."""

    def __init__(self, *, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


async def wait_for_two(monkeypatch: pytest.MonkeyPatch, *, tty: bool) -> str:
    terminal = Terminal(tty=tty)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "SHOWN_AFTER", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    asked = asyncio.Event()

    def describe() -> str:
        asked.set()
        return "trainer j is JOB_STATE_PENDING: all places are taken (3.2 s)"

    with (
        module.shown_on_terminal(describe),
        module.shown_on_terminal(lambda: "deployment d is CREATING"),
    ):
        if tty:
            await asked.wait()
        await asyncio.sleep(0)
    assert module._waits == {}
    assert module._status == []
    return terminal.getvalue()


async def test_a_terminal_shows_the_waits_and_is_left_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = await wait_for_two(monkeypatch, tty=True)
    assert "all places are taken" in said
    assert said.endswith("\x1b[2K") or "\x1b[?25h" in said  # the line and the cursor are given back


async def test_a_pipe_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await wait_for_two(monkeypatch, tty=False) == ""
