"""Room that is kept for a full disk, and what a database does with it."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest

from fireworks_training.local.store.database import Database, ResourceRow
from fireworks_training.local.store.reserve import BYTES, FILE, DiskFull, Reserve, is_full


def test_it_is_kept_given_up_and_kept_again(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    assert not reserve.held()
    assert not reserve.give_up()
    for _ in range(2):
        assert reserve.fill()
        assert (tmp_path / FILE).stat().st_size == BYTES
    assert reserve.give_up()
    assert not (tmp_path / FILE).exists()
    assert not Reserve(tmp_path / "missing").fill()


def test_errors_that_say_full() -> None:
    for number, full in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)):
        assert is_full(OSError(number, "")) is full
    wrapped = ValueError()
    wrapped.__cause__ = OSError(errno.ENOSPC, "")
    assert is_full(wrapped)
    assert is_full(DiskFull())
    assert not is_full(ValueError())


class _Full:
    """A connection that has no room for changes while the reserve is there."""

    def __init__(self, connection: sqlite3.Connection, folder: Path, for_ever: bool) -> None:
        self._connection, self._folder, self._for_ever = connection, folder, for_ever

    def execute(self, statement: str, values: object = ()) -> sqlite3.Cursor:
        if not statement.startswith("SELECT") and (
            self._for_ever or (self._folder / FILE).exists()
        ):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return self._connection.execute(statement, values)  # type: ignore[arg-type]

    def close(self) -> None:
        self._connection.close()


@pytest.mark.parametrize("for_ever", [False, True])
def test_what_has_happened_is_noted_in_the_kept_room(tmp_path: Path, for_ever: bool) -> None:
    database = Database(tmp_path / "state.db")
    row = ResourceRow("job", "a", "RUNNING")
    database.create(row)
    real = database._connection
    database._connection = _Full(real, tmp_path, for_ever)  # type: ignore[assignment]
    try:
        if for_ever:
            with pytest.raises(DiskFull):
                database.forget("job", "a")
        else:
            database.forget("job", "a")
            assert database.get("job", "a") is None
        assert not (tmp_path / FILE).exists()
        with pytest.raises(DiskFull):
            database.create(ResourceRow("job", "b", "RUNNING"))
    finally:
        database.close()
