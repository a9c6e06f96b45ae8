"""What the platform remembers, and what it refuses to open."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.store.database import AlreadyExists, Database, ResourceRow, WorkerRow


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "state.db")
    yield opened
    opened.close()


def test_a_resource_comes_back_as_it_was_stored(database: Database) -> None:
    row = ResourceRow("job", "a", "JOB_STATE_CREATING", "a notice", {"worker": {"lora_rank": 4}})
    database.create(row)
    assert database.get("job", "a") == row
    assert database.get("deployment", "a") is None
    assert database.rows("deployment") == []


def test_an_id_is_taken_once_a_kind(database: Database) -> None:
    database.create(ResourceRow("job", "a", "x"))
    database.create(ResourceRow("deployment", "a", "x"))
    with pytest.raises(AlreadyExists):
        database.create(ResourceRow("job", "a", "y"))
    database.forget("job", "a")
    database.create(ResourceRow("job", "a", "y"))


def test_an_update_keeps_the_creation_time(database: Database) -> None:
    database.create(ResourceRow("deployment", "a", "CREATING", created="1", updated="1"))
    row = database.get("deployment", "a")
    assert row is not None
    changed = database.update(replace(row, state="READY", loaded_identity="step-1"))
    assert changed.created == "1"
    assert changed.updated != "1"
    assert database.get("deployment", "a") == changed


def test_rows_are_oldest_first(database: Database) -> None:
    for number in (2, 1, 3):
        database.create(ResourceRow("job", f"j{number}", "x", created=str(number)))
    assert [row.id for row in database.rows("job")] == ["j1", "j2", "j3"]


def test_it_survives_being_closed(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    first = Database(path)
    first.create(ResourceRow("job", "a", "x"))
    first.put_worker(WorkerRow("/run/t-1.sock", "trainer", "a"))
    first.put_worker(WorkerRow("/run/t-1.sock", "trainer", "a", 0, 42, "9"))
    assert first.next_number("worker") == 1
    first.close()
    second = Database(path)
    assert second.workers() == [WorkerRow("/run/t-1.sock", "trainer", "a", 0, 42, "9")]
    assert second.next_number("worker") == 2
    second.forget_worker("/run/t-1.sock")
    assert second.workers() == []
    second.close()


def test_a_failed_write_changes_nothing(database: Database) -> None:
    database.create(ResourceRow("job", "a", "x", "kept"))
    with pytest.raises(AlreadyExists):
        database.create(ResourceRow("job", "a", "y", "lost"))
    row = database.get("job", "a")
    assert row is not None
    assert row.message == "kept"


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(LocalPlatformError, match="format 99"):
        Database(path)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LocalPlatformError, match=r"state\.db can't be used"):
        Database(path)
