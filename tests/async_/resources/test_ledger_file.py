"""The ledger among processes: nothing is lost when it is compacted, or when one is killed."""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from fireworks_training._async.resources import ledger_file as module
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._core.ledger import Event, LedgerEntry, Owner, fold

WRITER = """
import sys
from pathlib import Path
from fireworks_training._async.resources import ledger_file as ledger
from tests.async_.resources.test_ledger_file import entry
ledger.COMPACT_EVERY = 4096
file = ledger.LedgerFile(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    name = f"{sys.argv[2]}-{number}"
    file.append([entry("intent", name)])
    file.append([entry("created", name)])
    if number % 20:
        file.append([entry("gone", name)])
    else:
        print(name, flush=True)
"""


def entry(event: Event, name: str) -> LedgerEntry:
    owner = Owner("host", "boot", 7, "100")
    return LedgerEntry(1.0, event, "trainer", name, "me", "http://x", "0123456789ab", owner)


def writer(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), name, str(count)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )


def held(path: Path) -> set[str]:
    return {claim.last.resource_id for claim in fold(LedgerFile(path).read())}


def test_two_processes_lose_nothing_when_both_compact(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    writers = [writer(path, name, 200) for name in ("one", "two")]
    said = set[str]()
    for process in writers:
        said |= set(process.communicate()[0].split())
        assert process.returncode == 0
    assert len(said) == 20
    assert held(path) == said
    # Without compaction it would be over 1,100 lines.
    assert len(path.read_bytes().splitlines()) < 200


def test_a_kill_loses_nothing_that_was_said(tmp_path: Path) -> None:
    path, said = tmp_path / "ledger.jsonl", set[str]()
    for round_ in range(3):
        process = writer(path, f"round{round_}", 100_000)
        assert process.stdout is not None
        for _ in range(4 + 3 * round_):
            said.add(process.stdout.readline().strip())
        process.kill()
        said |= set(process.communicate()[0].split())
        assert said <= held(path)
        LedgerFile(path).append([entry("created", f"after{round_}")])
        said.add(f"after{round_}")
    assert said <= held(path)


def test_a_compaction_that_fails_leaves_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "COMPACT_EVERY", 100)
    file = LedgerFile(tmp_path / "ledger.jsonl")
    file.path.with_suffix(".new").mkdir()
    with caplog.at_level(logging.WARNING):
        file.append([entry("created", "a"), entry("gone", "a"), entry("created", "b")])
    assert "could not be compacted" in caplog.text
    assert (held(file.path), len(file.read())) == ({"b"}, 3)
    file.path.with_suffix(".new").rmdir()
    file.append([entry("gone", "b")])
    assert (held(file.path), file.read()) == (set(), [])


def test_who_waited_for_the_lock_writes_to_the_new_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LedgerFile(tmp_path / "ledger.jsonl")
    file.append([entry("created", "a")])
    really, replaced = fcntl.flock, list[bool]()

    def flock(descriptor: int, lock: int) -> None:
        if not replaced:  # somebody else compacts while this one waits
            replaced.append(True)
            fresh = file.path.with_suffix(".new")
            fresh.write_bytes(file.path.read_bytes())
            fresh.replace(file.path)
        really(descriptor, lock)

    monkeypatch.setattr(fcntl, "flock", flock)
    file.append([entry("created", "b")])
    assert held(file.path) == {"a", "b"}


def test_a_lock_that_another_process_keeps_is_waited_for_in_words_and_with_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LOCK_NOTICE", 0.0)
    monkeypatch.setattr(module, "LOCK_TIMEOUT", 0.05)
    path = tmp_path / "ledger.jsonl"
    LedgerFile(path).append([entry("intent", "mine")])
    with path.open("rb") as held_open:
        fcntl.flock(held_open, fcntl.LOCK_EX)
        for use in (LedgerFile(path).read, lambda: LedgerFile(path).append([])):
            with pytest.raises(TimeoutError, match="another process"):
                use()
    assert "waiting for the lock" in caplog.text
    assert held(path) == {"mine"}
