"""The platform's memory across restarts: rows of resources, and of the workers that serve them.

Knows SQLite and rows. Does not know what a state means: the control plane does. Calls are short
(one row, no disk flush but at a checkpoint of the write-ahead log), so they run on the event loop's
thread.

A full disk refuses what is new (`DiskFull`); what has happened is noted in room that is kept for it
(`reserve`), so that a platform can delete, and start again.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.store.reserve import DiskFull, Reserve

log = logging.getLogger(__name__)

FILE = "state.db"
SCHEMA_VERSION = 1

ResourceKind = Literal["job", "deployment", "model", "operation"]
Body = dict[str, object]

_SCHEMA = """
CREATE TABLE resources (
    kind TEXT NOT NULL,
    id TEXT NOT NULL,
    state TEXT NOT NULL,
    message TEXT NOT NULL,
    body TEXT NOT NULL,
    loaded_identity TEXT,
    created TEXT NOT NULL,
    updated TEXT NOT NULL,
    PRIMARY KEY (kind, id)
) STRICT;
CREATE TABLE workers (
    socket TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    owner TEXT NOT NULL,
    replica INTEGER NOT NULL,
    pid INTEGER,
    started TEXT
) STRICT;
CREATE TABLE counters (
    name TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT;
"""


def now() -> str:
    """Return the time as resources show it: RFC 3339, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class ResourceRow:
    """Stores a job, a deployment, a promoted model, or an operation.

    Attributes:
        kind: which of them.
        id: last part of its resource name.
        state: state that the control plane reports.
        message: its status message.
        body: fields that the creator asked for, in the wire's spelling.
        loaded_identity: deployments: the snapshot that all engines loaded last.
        created: RFC 3339.
        updated: RFC 3339.
    """

    kind: ResourceKind
    id: str
    state: str
    message: str = ""
    body: Body = field(default_factory=dict[str, object])
    loaded_identity: str | None = None
    created: str = field(default_factory=now)
    updated: str = field(default_factory=now)


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """Stores a worker process, from before it is spawned until it is known to be gone.

    Attributes:
        socket: path of its Unix socket; names the worker.
        kind: "trainer" or "engine".
        owner: id of its job or deployment.
        replica: 0 for trainers; the replica's number for engines.
        pid: process id; None until the spawn is answered.
        started: the process's start time, see `lifetime.ProcessIdentity`.
    """

    socket: str
    kind: str
    owner: str
    replica: int = 0
    pid: int | None = None
    started: str | None = None


class AlreadyExists(LookupError):
    """Raised when a resource of this kind and id is there, perhaps as a tombstone."""


class Database:
    """Holds the tables of one state folder. Not thread-safe: one thread owns it.

    Attributes:
        on_change: called with kind and id of each resource that was created, updated or forgotten.
    """

    def __init__(self, path: Path) -> None:
        """Open or create the file.

        Raises:
            LocalPlatformError: it is not a database, or one of another version.
        """
        self.on_change: Callable[[ResourceKind, str], None] = lambda _kind, _id: None
        self._reserve = Reserve(path.parent)
        try:
            self._connection = self._opened(path)
        except sqlite3.DatabaseError as error:
            if not (_says_full(error) and self._reserve.give_up()):
                raise _unusable(path, error) from error
            try:
                self._connection = self._opened(path)
            except sqlite3.DatabaseError as again:
                raise _unusable(path, again) from again
        self._reserve.fill()

    def _opened(self, path: Path) -> sqlite3.Connection:
        """Return a connection to a database of this version, which is made if it is missing."""
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            # A gateway that is about to die may still hold the file for a moment.
            connection.execute("PRAGMA busy_timeout=2000")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                with _transaction(connection):
                    for statement in _SCHEMA.split(";"):
                        connection.execute(statement)
                    connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            elif version != SCHEMA_VERSION:
                raise LocalPlatformError(
                    f"{path} has format {version}, this version reads {SCHEMA_VERSION};"
                    " choose another state folder"
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _note(self, statement: str, values: Mapping[str, object] | tuple[object, ...]) -> None:
        """Write what has happened already: where the disk is full, into the room kept for that."""
        try:
            self._connection.execute(statement, values)
        except sqlite3.OperationalError as error:
            if not _says_full(error):
                raise
            if not self._reserve.give_up():
                raise DiskFull from error
            log.warning("the disk is full: what was kept for that is given up")
            try:
                self._connection.execute(statement, values)
            except sqlite3.OperationalError as again:
                raise (DiskFull() if _says_full(again) else again) from error

    def require_room(self) -> None:
        """Raise DiskFull unless there is room for something new beside what is kept."""
        if not self._reserve.fill():
            raise DiskFull

    # -- resources -------------------------------------------------------------------------------

    def create(self, row: ResourceRow) -> None:
        """Insert a resource.

        Raises:
            AlreadyExists: there is one of this kind and id.
            DiskFull: there is no room for it.
        """
        self.require_room()
        try:
            self._connection.execute(
                "INSERT INTO resources VALUES"
                " (:kind, :id, :state, :message, :body, :loaded_identity, :created, :updated)",
                asdict(row) | {"body": json.dumps(row.body)},
            )
        except sqlite3.IntegrityError:
            raise AlreadyExists(f"{row.kind} {row.id!r} exists already") from None
        except sqlite3.OperationalError as error:
            raise (DiskFull() if _says_full(error) else error) from None
        self.on_change(row.kind, row.id)

    def get(self, kind: ResourceKind, id_: str) -> ResourceRow | None:
        """Return a resource, or None."""
        found = self._connection.execute(
            "SELECT * FROM resources WHERE kind = ? AND id = ?", (kind, id_)
        ).fetchone()
        return None if found is None else _resource(found)

    def rows(self, kind: ResourceKind) -> list[ResourceRow]:
        """Return all resources of a kind, oldest first, tombstones too."""
        rows = self._connection.execute(
            "SELECT * FROM resources WHERE kind = ? ORDER BY created, id", (kind,)
        )
        return [_resource(row) for row in rows]

    def update(self, row: ResourceRow) -> ResourceRow:
        """Write a changed resource; return it with its new time."""
        row = replace(row, updated=now())
        self._note(
            "UPDATE resources SET state = :state, message = :message, body = :body,"
            " loaded_identity = :loaded_identity, updated = :updated"
            " WHERE kind = :kind AND id = :id",
            asdict(row) | {"body": json.dumps(row.body)},
        )
        self.on_change(row.kind, row.id)
        return row

    def forget(self, kind: ResourceKind, id_: str) -> None:
        """Remove a resource without a tombstone."""
        self._note("DELETE FROM resources WHERE kind = ? AND id = ?", (kind, id_))
        self.on_change(kind, id_)

    # -- workers ---------------------------------------------------------------------------------

    def put_worker(self, row: WorkerRow) -> None:
        """Insert or replace a worker."""
        self._note("INSERT OR REPLACE INTO workers VALUES (?, ?, ?, ?, ?, ?)", astuple(row))

    def workers(self) -> list[WorkerRow]:
        """Return all workers that were not yet known to be gone."""
        rows = self._connection.execute("SELECT * FROM workers ORDER BY socket")
        return [WorkerRow(**dict(row)) for row in rows]

    def forget_worker(self, socket: str) -> None:
        """Remove a worker that is gone."""
        self._note("DELETE FROM workers WHERE socket = ?", (socket,))

    def next_number(self, name: str) -> int:
        """Count a name up from 1; never the same number twice in one state folder."""
        self._note(
            "INSERT INTO counters VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1",
            (name,),
        )
        found = self._connection.execute("SELECT value FROM counters WHERE name = ?", (name,))
        return int(found.fetchone()[0])


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Generator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _says_full(error: sqlite3.Error) -> bool:
    """Return whether SQLite had no room: it says so, or could not write or lengthen a file."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code == sqlite3.SQLITE_FULL or code in _NO_ROOM


_NO_ROOM = (
    sqlite3.SQLITE_IOERR_WRITE,
    sqlite3.SQLITE_IOERR_SHMSIZE,
    sqlite3.SQLITE_IOERR_SHMMAP,
    sqlite3.SQLITE_IOERR_TRUNCATE,
    sqlite3.SQLITE_IOERR_FSYNC,
)


def _unusable(path: Path, error: sqlite3.Error) -> LocalPlatformError:
    return LocalPlatformError(f"{path} can't be used: {error}")


def _resource(row: sqlite3.Row) -> ResourceRow:
    return ResourceRow(**dict(row) | {"body": json.loads(row["body"])})
