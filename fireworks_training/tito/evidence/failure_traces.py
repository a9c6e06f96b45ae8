"""Keeps failed trajectories on this disk, in a bounded number of files.

A trace holds the error, and the artifact with its requests and tokens. So its folder is for this
user alone, and nothing is kept unless asked for. The callers decide what counts as a failure.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fireworks_training._async.runtime.processes import has_run_since
from fireworks_training.errors import InvalidArgument
from fireworks_training.tito.evidence.debug_log import TITOLocalDebugSink
from fireworks_training.tito.values.errors import TITOError
from fireworks_training.tito.values.records import TITOTrajectoryArtifact

logger = logging.getLogger("fireworks_training.tito")


def _default_root() -> Path:
    return Path(tempfile.gettempdir()) / "fireworks-tito-traces"


@dataclass(frozen=True)
class TITOFailureTraceConfig:
    """Configures where failed trajectories are kept, and how many.

    Attributes:
        root_dir: an absolute path; an existing folder must be closed to other users. Default:
            `fireworks-tito-traces` in the folder for temporary files.
        max_local_bytes: size of all traces of a process; the oldest go first. Default 256 MiB.
        max_trajectory_bytes: size of one trace; a larger one is kept without its artifact. Default
            32 MiB.
        max_failed_traces: number of traces of a process; the oldest go first. Default 32.
        max_active_traces: traces written at a time; further ones are left out. Default 128.
        min_free_bytes: space that the disk keeps free. Default 64 MiB.
        enabled: False keeps nothing.
        stale_writer_age_seconds: age at which traces of ended processes are removed. Default a
            week.

    Raises:
        InvalidArgument: a value out of range.
    """

    root_dir: Path = field(default_factory=_default_root)
    max_local_bytes: int = 256 * 1024 * 1024
    max_trajectory_bytes: int = 32 * 1024 * 1024
    max_failed_traces: int = 32
    max_active_traces: int = 128
    min_free_bytes: int = 64 * 1024 * 1024
    enabled: bool = True
    stale_writer_age_seconds: float = 7 * 24 * 3600.0

    def __post_init__(self) -> None:
        if not self.root_dir.is_absolute():
            raise InvalidArgument(f"root_dir must be an absolute path, got {self.root_dir}")
        bounds = ("max_local_bytes", "max_trajectory_bytes", "max_failed_traces")
        for name in (*bounds, "max_active_traces", "stale_writer_age_seconds"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be over 0, got {getattr(self, name)}")
        if self.max_trajectory_bytes > self.max_local_bytes or self.min_free_bytes < 0:
            raise InvalidArgument(
                "max_trajectory_bytes must not be over max_local_bytes, nor min_free_bytes below 0"
            )


def dump_tito_failure_trace(
    artifact: TITOTrajectoryArtifact | None,
    error: BaseException,
    *,
    code: str,
    source_trace: Path | None = None,
    source_trace_root: Path | None = None,
) -> str | None:
    """Keep an artifact that a rollout rejected, in the default folder. Blocks on files.

    Args:
        artifact: the trajectory, if there is one.
        error: the reason; its type and, without secrets, its text are kept.
        code: a stable tag, such as "reward_failed".
        source_trace: a file to keep with it, such as a log of the agent's container. Links are not
            followed.
        source_trace_root: the folder that must contain it; its own unless given.

    Returns:
        The file's path; None where no room is left, which is logged.
    """
    return _default_traces().dump(artifact, error, code, source_trace, source_trace_root)


class FailureTraces:
    """Writes the traces of one process into one folder. Usable from any thread."""

    def __init__(self, config: TITOFailureTraceConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._kept: dict[Path, int] = {}
        self._writing = 0

    def dump(
        self,
        artifact: TITOTrajectoryArtifact | None,
        error: BaseException,
        code: str,
        source: Path | None = None,
        root: Path | None = None,
    ) -> str | None:
        """Keep one trace; the arguments are those of `dump_tito_failure_trace`."""
        config = self._config
        if not config.enabled:
            return None
        with self._lock:
            if self._writing >= config.max_active_traces:
                logger.warning("%d failure traces are being written: one left out", self._writing)
                return None
            self._writing += 1
        try:
            data = _trace(artifact, error, code, source, root, config.max_trajectory_bytes)
            with self._lock:
                return str(self._keep(data))
        except OSError as failed:
            logger.warning("a failure trace (%s) could not be kept: %s", code, failed)
            return None
        finally:
            with self._lock:
                self._writing -= 1

    def _keep(self, data: bytes) -> Path:
        config = self._config
        folder = self._own_folder()
        if shutil.disk_usage(folder).free - len(data) < config.min_free_bytes:
            raise OSError(f"the disk has no {config.min_free_bytes} bytes more than the trace")
        while self._kept and (
            len(self._kept) >= config.max_failed_traces
            or sum(self._kept.values()) + len(data) > config.max_local_bytes
        ):
            oldest = next(iter(self._kept))
            oldest.unlink(missing_ok=True)
            del self._kept[oldest]
        path = folder / f"{time.time_ns()}-{secrets.token_hex(4)}.json"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        self._kept[path] = len(data)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        return path

    def _own_folder(self) -> Path:
        if self._folder is None:
            root = self._config.root_dir
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = root.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                raise OSError(f"{root} is not a folder of this user")
            if found.st_mode & 0o077:
                raise OSError(f"others may enter {root}: chmod 700 it, or choose another root_dir")
            self._remove_stale(root)
            self._folder = Path(tempfile.mkdtemp(prefix=f"writer-{os.getpid()}-", dir=root))
        return self._folder

    def _remove_stale(self, root: Path) -> None:
        oldest = time.time() - self._config.stale_writer_age_seconds
        for folder in root.glob("writer-*-*"):
            written, number = folder.stat().st_mtime, folder.name.split("-")[1]
            named = number.isdecimal()
            if written < oldest and named and not has_run_since(int(number), written):
                shutil.rmtree(folder)


_lock = threading.Lock()
_traces: list[FailureTraces] = []


def _default_traces() -> FailureTraces:
    with _lock:
        if not _traces:
            _traces.append(FailureTraces(TITOFailureTraceConfig()))
        return _traces[0]


def _trace(
    artifact: TITOTrajectoryArtifact | None,
    error: BaseException,
    code: str,
    source: Path | None,
    root: Path | None,
    most: int,
) -> bytes:
    record: dict[str, Any] = {"type": type(error).__name__, "message": str(error)[:2000]}
    if isinstance(error, TITOError):
        record |= error.as_error_record()
    trace: dict[str, Any] = {
        "format": "fireworks-tito-failure-trace",
        "schema_version": 1,
        "recorded_at": time.time(),
        "code": code,
        "error": TITOLocalDebugSink.sanitize(record),
        "trajectory_id": None if artifact is None else artifact.trajectory_id,
        "status": None if artifact is None else artifact.status,
    }
    large: dict[str, Any] = {}
    if artifact is not None:
        large["artifact"] = base64.b64encode(artifact.pack()).decode()
    if source is not None:
        with _opened(source, root) as file:
            found = file.read(most + 1)
        large["source_trace"] = base64.b64encode(found[:most]).decode()
        large["source_trace_sha256"] = hashlib.sha256(found[:most]).hexdigest()
        large["source_trace_truncated"] = len(found) > most
    whole = json.dumps({**trace, **large}).encode()
    return whole if len(whole) <= most else json.dumps({**trace, "truncated": True}).encode()


@contextmanager
def _opened(source: Path, root: Path | None) -> Generator[Any, None, None]:
    """Open a regular file below a folder without following any link on the way."""
    base = (source.parent if root is None else root).resolve(strict=True)
    outer = (source.parent if root is None else root).absolute()
    inside = source.absolute().is_relative_to(outer)
    inner = source.absolute().relative_to(outer) if inside else Path()
    if not inner.parts or ".." in inner.parts:
        raise OSError("source_trace is not in source_trace_root")
    folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in inner.parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(inner.parts[-1], flags, dir_fd=folder)
    finally:
        os.close(folder)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("source_trace is not a regular file")
        yield file
