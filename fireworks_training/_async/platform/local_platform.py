"""Starts and stops the embedded platform, a subprocess that is reached over HTTP like any other.

A process has at most one; its services share it, and the last one stops it. The platform holds the
read end of a pipe whose write end only this process has: when this process ends, in whatever way,
so does the platform. It knows the settings and the ready line of `fireworks_training.local`, and
imports nothing of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from typing import Any, cast

from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._async.runtime.waits import log_if_slow
from fireworks_training.config import Endpoint
from fireworks_training.errors import InvalidArgument, LocalPlatformError, MissingExtra

logger = logging.getLogger("fireworks_training.embedded")

START_TIMEOUT = 120.0
"""Seconds for the platform to print its ready line; it takes about 5."""

STOP_TIMEOUT = 10.0
"""Seconds for the platform to end by itself before it is killed."""


@dataclass(frozen=True, slots=True)
class EmbeddedPlatform:
    """Holds the ready line of a running platform; the repr hides the key."""

    base_url: str
    api_key: str
    account: str
    model: str
    training_shape: str
    tokenizer: str

    def __repr__(self) -> str:
        return f"Platform({self.base_url!r})"


class _Embedded:
    """Holds the platform of this process, if it has one, and counts its users."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.asked: tuple[str | None, str | None] = (None, None)
        self.process: subprocess.Popen[bytes] | None = None
        self.platform: EmbeddedPlatform | None = None

    def acquire(self, endpoint: Endpoint) -> EmbeddedPlatform:
        with self.lock:
            asked = (endpoint.state_dir, endpoint.api_key)
            if self.platform is not None and self.process is not None:
                if self.process.poll() is not None and self.users == 0:
                    self._forget()
                elif asked != self.asked:
                    raise InvalidArgument(
                        "this process has an embedded platform already, with another state folder "
                        "or key: close its services first, or use the same base_url and api_key"
                    )
            if self.platform is None:
                self.process, self.platform = _start(endpoint)
                self.asked = asked
            self.users += 1
            return self.platform

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0 and self.process is not None:
                process = self.process
                self._forget()
                _stop(process)

    def _forget(self) -> None:
        self.process = None
        self.platform = None

    def disown(self) -> None:
        """Close the inherited pipe in a forked child, so that only the parent's end counts."""
        self.lock = threading.Lock()
        process, self.users = self.process, 0
        self._forget()
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                os.close(process.stdin.fileno())
            process.returncode = 0  # not this process's child


_embedded = _Embedded()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_embedded.disown)


async def acquire(endpoint: Endpoint) -> EmbeddedPlatform:
    """Start the embedded platform, or share the running one; pair with `release`.

    Raises:
        MissingExtra: a package that it needs is not installed.
        LocalPlatformError: the platform did not start.
        InvalidArgument: a platform with other settings runs in this process.
    """
    start = _Start(endpoint)
    try:
        return await log_if_slow(
            in_thread(start.run), lambda: "the embedded platform starts (it imports torch)"
        )
    except asyncio.CancelledError:
        start.abandon()
        raise


class _Start:
    """Runs one start in a thread, which can't be stopped: an abandoned start is released."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._started = False
        self._abandoned = False

    def run(self) -> EmbeddedPlatform:
        platform = _embedded.acquire(self._endpoint)
        with self._lock:
            self._started = True
            unwanted = self._abandoned
        if unwanted:
            _embedded.release()
        return platform

    def abandon(self) -> None:
        with self._lock:
            self._abandoned = True
            there = self._started
        if there:
            threading.Thread(target=_embedded.release, name="stop the platform").start()


def release() -> None:
    """Release the platform; the last release stops it and waits. Blocks: call it in a thread."""
    _embedded.release()


def _start(endpoint: Endpoint) -> tuple[subprocess.Popen[bytes], EmbeddedPlatform]:
    settings: dict[str, Any] = {"embedded": True, "output": "json"}
    if endpoint.state_dir is not None:
        settings["state_dir"] = endpoint.state_dir
    if endpoint.api_key is not None:
        settings["api_key"] = endpoint.api_key
    process = subprocess.Popen(
        [sys.executable, "-m", "fireworks_training.local"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C reaches the user's program alone
    )
    try:
        ready = _ready_line(process, json.dumps(settings).encode() + b"\n")
        if "error" in ready:
            raise _start_error(str(ready["error"]))
        return process, EmbeddedPlatform(
            **{name: ready[name] for name in EmbeddedPlatform.__slots__}
        )
    except BaseException as error:
        _stop(process)
        if isinstance(error, (KeyError, TypeError)):
            raise LocalPlatformError("the embedded platform's ready line is incomplete") from error
        raise


def _start_error(reason: str) -> LocalPlatformError | MissingExtra:
    if "No module named" in reason:
        return MissingExtra(
            f"the embedded platform needs packages that are not installed ({reason}): "
            "pip install 'fireworks-training[local]'"
        )
    return LocalPlatformError(f"the embedded platform did not start: {reason}")


def _ready_line(process: subprocess.Popen[bytes], settings: bytes) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(START_TIMEOUT, process.kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(settings)
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    if not line:
        raise LocalPlatformError(
            f"the embedded platform ended before it was ready (exit status {process.poll()}). "
            "Start it by hand to see why: fireworks-training serve"
        )
    try:
        return cast(dict[str, Any], json.loads(line))
    except ValueError as error:
        raise LocalPlatformError("the embedded platform's ready line is not JSON") from error


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the platform by closing its pipe; kill it if it does not end."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(OSError):
        process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        logger.warning("the embedded platform did not end within %.0f s; killed", STOP_TIMEOUT)
        process.kill()
        process.wait()
    process.stdout.close()
