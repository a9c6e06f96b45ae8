"""Counts what a run uses: tokens, and the seconds that trainers and replicas are held.

Counts may come from several threads. It knows no loop, no file and no price; the values that it
gives are defined in `fireworks_training.usage`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from fireworks_training.usage import Usage

Held = Literal["trainer", "replica"]


class UsageMeter:
    """Counts the usage of one connection pool.

    Args:
        clock: gives monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._trained = self._forward = 0
        self._prefilled = self._cached = self._sampled = 0
        self._seconds: dict[Held, float] = {"trainer": 0.0, "replica": 0.0}  # already released
        self._held: list[tuple[Held, int, float]] = []

    def passed(self, tokens: int, *, trained: bool) -> None:
        """Count the tokens of a pass that came back; `trained`: with gradients."""
        with self._lock:
            if trained:
                self._trained += tokens
            else:
                self._forward += tokens

    def sampled(self, prompt: int | None, cached: int | None, completion: int | None) -> None:
        """Count the tokens of a completion; those that a server does not report count as none."""
        known = min(cached or 0, prompt or 0)
        with self._lock:
            self._prefilled += (prompt or 0) - known
            self._cached += known
            self._sampled += completion or 0

    def hold(self, kind: Held, count: int) -> None:
        """Count the seconds of so many resources of a kind, from now on."""
        with self._lock:
            self._held.append((kind, count, self._clock()))

    def release(self) -> None:
        """Stop counting the seconds of all resources."""
        with self._lock:
            self._seconds = self._held_seconds()
            self._held.clear()

    def read(self) -> Usage:
        """Give the usage so far, including the seconds of resources that are held."""
        with self._lock:
            held = self._held_seconds()
            return Usage(
                trained_tokens=self._trained,
                forward_tokens=self._forward,
                prefilled_tokens=self._prefilled,
                cached_tokens=self._cached,
                sampled_tokens=self._sampled,
                trainer_seconds=held["trainer"],
                replica_seconds=held["replica"],
            )

    def _held_seconds(self) -> dict[Held, float]:
        now, seconds = self._clock(), dict(self._seconds)
        for kind, count, since in self._held:
            seconds[kind] += count * (now - since)
        return seconds
