"""The pending hot load of an engine: prepared beside the decoding, swapped in between two steps.

Knows the weights, the order of load requests and the frames that report them. Does not know batches
but for whether one is running. The rules:
1. A snapshot is prepared in a thread of its own; decoding and admission go on meanwhile.
2. ASYNC: it is swapped in before the next step; completions in flight go on with it.
   SYNC: once it is ready no request is admitted, and it is swapped in when no completion is in
   flight any more: none mixes two snapshots.
3. Of two pending loads the newer wins; the older is reported as superseded.
4. Loading what is held is a no-op. A load that fails changes nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fireworks_training.local.engine.weights import Prepared, SnapshotRefused, WeightSet
from fireworks_training.local.engine_frames import encode_control

Stage = Literal["ready", "pending", "loading", "error"]
Transition = Literal["ASYNC", "SYNC"]
LoadOutcome = Literal["loaded", "superseded", "failed"]
Run = Callable[[Callable[[], None]], None]
"""Runs a function, at once or in a thread."""


def in_a_thread(work: Callable[[], None]) -> None:
    """Runs a function in a daemon thread, for which a worker that ends does not wait."""
    threading.Thread(target=work, name="hot load", daemon=True).start()


def at_once(work: Callable[[], None]) -> None:
    """Runs a function here and now."""
    work()


@dataclass(slots=True, eq=False)
class _Load:
    """Follows one requested load: from its request to `prepared` weights or a `refused` reason."""

    number: int
    identity: str
    transition: Transition
    restore: bool
    started: bool = False
    prepared: Prepared | None = None
    refused: str | None = None
    prepare_s: float = 0.0

    @property
    def ready(self) -> bool:
        return self.prepared is not None or self.refused is not None


class SnapshotLoads:
    """Prepares, swaps in and reports hot loads, by the module's rules.

    Every method is called by the engine's thread.

    Args:
        weights: the weights that are served.
        send: takes a frame for the gateway.
        swapped: called when the weights have changed.
        run: runs the preparation.
        wake: called from the preparation's thread when it has ended.
    """

    def __init__(
        self,
        weights: WeightSet,
        send: Callable[[bytes], None],
        swapped: Callable[[], None],
        *,
        run: Run = at_once,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self.wake = wake
        self._weights = weights
        self._send = send
        self._swapped = swapped
        self._run = run
        self._load: _Load | None = None
        self._failed: tuple[str, str] | None = None
        self._timings: dict[str, float] | None = None
        # One at a time: a preparation reads what is served, and the last one's result is dropped.
        self._one = threading.Lock()

    @property
    def busy(self) -> bool:
        """Tells whether `advance` would do something now."""
        return self._load is not None and (self._load.ready or not self._load.started)

    @property
    def closes_admission(self) -> bool:
        """Tells whether requests have to wait until the snapshot is swapped in."""
        load = self._load
        return load is not None and load.ready and load.transition == "SYNC"

    def request(
        self, number: int, identity: str, transition: Transition = "SYNC", *, restore: bool = False
    ) -> None:
        """Begin the load of a snapshot; it supersedes one that is pending.

        Args:
            number: names the request in the report of its end.
            transition: what happens to completions in flight.
            restore: passed to `WeightSet.prepare`.
        """
        if self._load is not None:
            self._end(self._load, "superseded", f"{identity!r} was requested after it")
            self._load = None
        self._failed = None
        load = _Load(number, identity, transition, restore)
        if identity == self._weights.held.identity:
            self._end(load, "loaded")
        else:
            self._load = load
        self._send_status()

    def advance(self, *, running: bool) -> None:
        """Do the next part of the pending load, if there is one.

        Args:
            running: whether any completion is in flight.
        """
        load = self._load
        if load is None:
            return
        if not load.started:
            load.started = True
            self._send_status()
            self._run(lambda: self._prepare(load))
        elif load.refused is not None:
            self._fail(load, load.refused)
        elif load.prepared is not None and not (running and load.transition == "SYNC"):
            self._swap(load, load.prepared)

    def _prepare(self, load: _Load) -> None:
        with self._one:
            if self._load is load:
                started = time.perf_counter()
                try:
                    load.prepared = self._weights.prepare(load.identity, restore=load.restore)
                except SnapshotRefused as error:
                    load.refused = str(error)
                except Exception as error:
                    load.refused = f"the engine failed: {type(error).__name__}: {error}"
                load.prepare_s = time.perf_counter() - started
        self.wake()

    def _swap(self, load: _Load, prepared: Prepared) -> None:
        started = time.perf_counter()
        try:
            self._weights.swap(prepared)
        except SnapshotRefused as error:
            self._fail(load, str(error))
            return
        self._swapped()
        self._timings = {"prepare": load.prepare_s, "swap": time.perf_counter() - started}
        self._load = None
        self._send_status()
        self._end(load, "loaded")

    def _fail(self, load: _Load, reason: str) -> None:
        self._failed = (load.identity, reason)
        self._load = None
        self._send_status()
        self._end(load, "failed", reason)

    def _end(self, load: _Load, outcome: LoadOutcome, reason: str | None = None) -> None:
        message = {"op": "load_ended", "number": load.number, "outcome": outcome, "reason": reason}
        self._send(encode_control(message))

    def _send_status(self) -> None:
        self._send(encode_control(self.status()))

    def status(self) -> dict[str, object]:
        """Report the snapshot that is held, and the stage of the pending or last load."""
        held = self._weights.held
        stage: Stage = "ready"
        target, error = held.identity, None
        if self._load is not None:
            stage = "loading" if self._load.started else "pending"
            target = self._load.identity
        elif self._failed is not None:
            stage = "error"
            target, error = self._failed
        return {
            "op": "status",
            "identity": held.identity,
            "kind": held.kind,
            "tensors_sha256": held.tensors_sha256,
            "version": held.version,
            "stage": stage,
            "target": target,
            "error": error,
            "timings": self._timings,
        }
