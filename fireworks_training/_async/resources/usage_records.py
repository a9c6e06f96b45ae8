"""Records the usage of runs in the user's state folder, and reads it back.

`usage.jsonl` has one JSON line for each run whose service was closed. A run that goes on has a note
of its own in `usage/`, replaced whole every few seconds, which is left after a kill. The functions
block on the disk: call them in a thread. It does not know how usage is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.processes import is_alive, this_process
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._core.ledger import Owner
from fireworks_training.config import state_dir
from fireworks_training.usage import RunState, RunUsage, Usage

logger = logging.getLogger("fireworks_training.usage")

NAME, FOLDER = "usage.jsonl", "usage"

NOTE_EVERY = 2.0
"""Seconds between two notes of a run's usage: a kill loses that much at most."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Identifies a run: its name, its id, its platform and its model."""

    run: str
    run_id: str
    base_url: str
    base_model: str


# -- files ---------------------------------------------------------------------------------------


def note(run: RunRecord, usage: Usage) -> None:
    """Replace the note of a run that goes on; a reader finds the old note or the new one.

    Raises:
        OSError: the folder can't be written.
    """
    path = _note_of(run.run_id)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(_line(run, usage, owner=asdict(this_process())))
    fresh.replace(path)


def write(run: RunRecord, usage: Usage) -> None:
    """Append the record of a run that has ended, in place of its note.

    Raises:
        OSError: the folder can't be written.
    """
    path = state_dir() / NAME
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One write to a file that is only appended to: lines of several processes do not mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, _line(run, usage))
    finally:
        os.close(descriptor)
    # A crash before this leaves record and note: the record counts.
    with contextlib.suppress(FileNotFoundError):
        _note_of(run.run_id).unlink()


def read_usage_records(path: Path | None = None) -> list[RunUsage]:
    """Read all records, oldest first, then the notes of runs whose service was not closed.

    Lines that can't be read are skipped, with a warning.
    """
    path = path if path is not None else state_dir() / NAME
    found: list[RunUsage] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    for number, line in enumerate(lines, 1):
        _take(found, line, f"{path}:{number}")
    closed = {record.run_id for record in found}
    notes: list[RunUsage] = []
    for file in (path.parent / FOLDER).glob("*.json"):
        try:
            text = file.read_text("utf-8")
        except FileNotFoundError:
            continue  # its run has just ended
        _take(notes, text, str(file))
    left = [record for record in notes if record.run_id not in closed]
    return found + sorted(left, key=lambda record: record.ended)


def _take(found: list[RunUsage], text: str, where: str) -> None:
    try:
        record = cast(dict[str, Any], json.loads(text))
        used = Usage(**record.pop("usage"))
        owner: dict[str, Any] | None = record.pop("owner", None)
        state: RunState = "closed"
        if owner is not None:
            state = "lost" if is_alive(Owner(**owner)) is False else "running"
        found.append(RunUsage(usage=used, state=state, **record))
    except (ValueError, TypeError, KeyError, AttributeError):
        logger.warning("%s can't be read; it is skipped", where)


def _line(run: RunRecord, usage: Usage, **more: object) -> bytes:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    record = {**asdict(run), "ended": at, "usage": asdict(usage), **more}
    return json.dumps(record).encode() + b"\n"


def _note_of(run_id: str) -> Path:
    return state_dir() / FOLDER / f"{run_id}.json"


# -- a run ---------------------------------------------------------------------------------------


class UsageRecorder:
    """Keeps the note of one run up to date, and makes its record.

    Args:
        run: the run.
        read: gives the run's usage so far.
    """

    def __init__(self, run: RunRecord, read: Callable[[], Usage]) -> None:
        self._run = run
        self._read = read
        self._task: asyncio.Task[None] | None = None
        self._lock = threading.Lock()
        self._recorded = False
        self._complained = False

    def start(self) -> None:
        """Keep the note up to date from now on, on the running loop; once."""
        if self._task is None:
            self._task = asyncio.create_task(self._keep(), name="fireworks_training: usage")

    async def _keep(self) -> None:
        noted = Usage()
        while True:
            used = self._read()
            if used != noted:
                noted = used
                await self._in_thread(self._note, used)
            await asyncio.sleep(NOTE_EVERY)

    async def finish(self, used: Usage) -> None:
        """Make the record of the run, unless it used nothing."""
        task, self._task = self._task, None
        # At the interpreter's exit this is another loop, and the task's own has ended.
        if task is not None and task.get_loop() is asyncio.get_running_loop():
            task.cancel()
            await asyncio.wait([task])
        if used != Usage():
            await finish_in_spite_of_cancellation(self._in_thread(self._record, used))

    def _note(self, used: Usage) -> None:
        with self._lock:
            if not self._recorded:  # a thread that a cancelled task left behind may be late
                note(self._run, used)

    def _record(self, used: Usage) -> None:
        with self._lock:
            self._recorded = True
            write(self._run, used)

    async def _in_thread(self, work: Callable[[Usage], None], used: Usage) -> None:
        try:
            await in_thread(work, used)
        except OSError as error:
            if not self._complained:
                self._complained = True
                logger.warning("the usage of this run can't be recorded: %s", error)
