"""Writes a sidecar's events to files: one line of JSON per event, one file per trajectory.

The log is for reading with `grep` and `jq`. It is bounded in size and free of secrets, and leaves
out texts if asked to; the record to train on is the artifact, of which nothing is known here.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from fireworks_training.errors import InvalidArgument
from fireworks_training.tito.values.messages import json_text, plain_json

REDACTED = "<redacted>"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_SECRET_NAME = re.compile(r"authorization|cookie|api[-_]?key|bearer|access[-_]?token|secret", re.I)
_SECRET_TEXT = re.compile(
    r"(bearer\s+)[\w.~+/=-]+|((?:api[-_]?key|token|secret)\s*[:=]\s*)[^\s,;]+", re.I
)
_TEXTS = frozenset(
    {"content", "text", "reasoning_content", "arguments", "instruction", "prompt"}
    | {"problem_statement", "completion_text", "body", "wire_request_body"}
)


class LogFull(OSError):
    """The log has used up its share of the disk."""


@dataclass(frozen=True)
class TITOLocalDebugConfig:
    """Configures the place and the size of an event log.

    Attributes:
        root_dir: an absolute path; the folder is made for this user alone.
        max_local_bytes: size of this log at most; at least 1.
        min_free_bytes: space that the disk keeps free.
        run_id: name of the run's folder; random unless given.
        writer_id: name of this log's folder in it, which must not exist; random unless given.
        redact_text: whether length and SHA-256 of messages are written instead of their text.
        metadata: JSON for the manifest.

    Raises:
        InvalidArgument: a value out of range.
    """

    root_dir: Path
    max_local_bytes: int
    min_free_bytes: int
    run_id: str | None = None
    writer_id: str | None = None
    redact_text: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not self.root_dir.is_absolute():
            raise InvalidArgument(f"root_dir must be an absolute path, got {self.root_dir}")
        if self.max_local_bytes < 1 or self.min_free_bytes < 0:
            raise InvalidArgument(
                "max_local_bytes must be at least 1 and min_free_bytes at least 0, got "
                f"{self.max_local_bytes} and {self.min_free_bytes}"
            )
        for name, value in (("run_id", self.run_id), ("writer_id", self.writer_id)):
            if value is not None and not _NAME.fullmatch(value):
                raise InvalidArgument(f"{name} takes letters, digits, '_', '.' and '-'")
        object.__setattr__(self, "metadata", MappingProxyType(plain_json(self.metadata)))


class TITOLocalDebugSink:
    """Writes events below `run=<run>/writer=<writer>/trajectories/`. Usable from any thread.

    Args:
        config: the place and the size.

    Raises:
        FileExistsError: another log has this run and writer.
        OSError: no room, or no permission.
    """

    def __init__(self, config: TITOLocalDebugConfig) -> None:
        self.config = config
        self.run_id = config.run_id or f"{int(time.time())}-{secrets.token_hex(6)}"
        self.writer_id = config.writer_id or f"pid{os.getpid()}-{secrets.token_hex(6)}"
        self.writer_dir = config.root_dir / f"run={self.run_id}" / f"writer={self.writer_id}"
        self._lock = threading.Lock()
        self._closed = False
        self._written = 0
        self._sequences: dict[str, int] = {}
        _private(config.root_dir)
        _private(self.writer_dir.parent)
        self.writer_dir.mkdir(mode=0o700)
        _private(self.writer_dir / "trajectories")
        manifest = {
            "format": "fireworks-tito-debug-jsonl",
            "schema_version": 1,
            "run_id": self.run_id,
            "writer_id": self.writer_id,
            "created_at": time.time(),
            "redact_text": config.redact_text,
            "metadata": dict(config.metadata),
        }
        self._append(self.writer_dir / "manifest.json", manifest)

    def record(
        self,
        event: str,
        trajectory_id: str,
        payload: Mapping[str, Any],
        arrays: Mapping[str, Sequence[Any]] | None = None,
    ) -> int:
        """Write an event; gives the bytes written.

        Raises:
            OSError: the log's share of the disk is used up, or the log was closed.
        """
        with self._lock:
            if self._closed:
                raise LogFull("the event log was closed")
            number = self._sequences.get(trajectory_id, 0)
            row = self._row(event, trajectory_id, payload) | {"event_seq": number}
            if arrays:
                row["arrays"] = {name: list(values) for name, values in arrays.items()}
            folder = self.writer_dir / "trajectories" / _folder_name(trajectory_id)
            _private(folder)
            written = self._append(folder / "events.jsonl", row)
            self._sequences[trajectory_id] = number + 1
            return written

    def close_trajectory(
        self, trajectory_id: str, status: str, payload: Mapping[str, Any] | None = None
    ) -> int:
        """Write that a trajectory has ended; gives the bytes written."""
        written = self.record(
            "trajectory_terminal", trajectory_id, {**(payload or {})} | {"status": status}
        )
        with self._lock:
            self._sequences.pop(trajectory_id, None)
        return written

    def record_tombstone_event(
        self, event: str, trajectory_id: str, payload: Mapping[str, Any]
    ) -> int:
        """Write an event of a trajectory that had ended; 0 bytes once the log is closed."""
        with self._lock:
            if self._closed:
                return 0
            row = self._row(event, trajectory_id, payload)
            return self._append(self.writer_dir / "tombstones.jsonl", row)

    def close(self) -> None:
        """Close the log: later events raise."""
        with self._lock:
            self._closed = True

    @classmethod
    def sanitize(cls, value: Any, *, key: str | None = None, redact_text: bool = False) -> Any:
        """Copy a value without secrets, found by names of fields and by patterns in texts.

        Args:
            key: name of the field that holds the value.
            redact_text: also replace messages' texts by their length and SHA-256.
        """
        if key is not None and _SECRET_NAME.search(key):
            return REDACTED
        if isinstance(value, Mapping):
            fields = cast(Mapping[object, object], value)
            return {
                str(name): cls.sanitize(item, key=str(name), redact_text=redact_text)
                for name, item in fields.items()
            }
        if isinstance(value, (list, tuple)):
            rows = cast(Sequence[object], value)
            return [cls.sanitize(item, redact_text=redact_text) for item in rows]
        if not isinstance(value, str):
            return value
        if redact_text and key is not None and key.lower() in _TEXTS:
            data = value.encode()
            digest = hashlib.sha256(data).hexdigest()
            return {"redacted": True, "bytes": len(data), "sha256": digest}
        return _SECRET_TEXT.sub(lambda found: (found[1] or found[2]) + REDACTED, value)

    def _row(self, event: str, trajectory_id: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "event": event,
            "recorded_at": time.time(),
            "trajectory_id": trajectory_id,
            "payload": self.sanitize(payload, redact_text=self.config.redact_text),
        }

    def _append(self, path: Path, row: Mapping[str, Any]) -> int:
        line = json_text(row).encode() + b"\n"
        config = self.config
        if self._written + len(line) > config.max_local_bytes:
            raise LogFull(f"the event log has its {config.max_local_bytes} bytes")
        if shutil.disk_usage(self.writer_dir).free - len(line) < config.min_free_bytes:
            raise LogFull(f"the disk would keep fewer than {config.min_free_bytes} bytes free")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(descriptor, "ab") as file:
            file.write(line)
        self._written += len(line)
        return len(line)


def _private(folder: Path) -> None:
    """Make a folder for this user alone; `mode` holds for the last of several new folders only."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)


def _folder_name(trajectory_id: str) -> str:
    return hashlib.sha256(trajectory_id.encode()).hexdigest()
