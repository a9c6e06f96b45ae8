"""The state folder: whose it is, by what is in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes.state_folder import DATABASE, OWN_NAMES, open_state_folder
from fireworks_training.local.store import database


def test_the_database_has_one_name() -> None:
    assert DATABASE == database.FILE


@pytest.mark.parametrize("names", [[], ["lock"], ["lost+found"], ["lock", "state.db", "notes.txt"]])
def test_an_empty_folder_and_a_platforms_are_taken(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    os.close(open_state_folder(tmp_path))


@pytest.mark.parametrize("names", [["notes.txt"], ["state.db", "notes.txt"], ["lock", "a"]])
def test_others_are_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(LocalPlatformError, match="left as it is"):
        open_state_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert "lock" in OWN_NAMES
