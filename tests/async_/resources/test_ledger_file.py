"""The ledger among processes: nothing is lost when it is compacted, or when one is killed."""

from __future__ import annotations

import fcntl
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from fireworks_training import LedgerUnavailable
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


class SteppedClock:
    """A clock that only a sleeper moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_lock_that_another_process_keeps_is_waited_for_in_words_and_with_an_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "ledger.jsonl", SteppedClock()
    file = LedgerFile(path, clock=clock, sleep=clock.sleep)
    file.append([entry("intent", "one")])
    with path.open("rb") as other, caplog.at_level(logging.WARNING):
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LedgerUnavailable, match="another process has kept its lock"):
            file.append([entry("intent", "two")])
        with pytest.raises(LedgerUnavailable, match="can't be read"):
            file.read()
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2  # once a wait
    assert "locked by another process" in caplog.text
    assert 2 * module.LOCK_PATIENCE <= clock.now <= 2 * module.LOCK_PATIENCE + 1
    assert held(path) == {"one"}


def test_a_lock_that_is_given_back_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    LedgerFile(path).append([entry("intent", "one")])
    with path.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def give_back(_: float) -> None:
            fcntl.flock(other, fcntl.LOCK_UN)

        LedgerFile(path, sleep=give_back).append([entry("intent", "two")])
    assert held(path) == {"one", "two"}


def test_a_folder_in_its_place_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnavailable, match="must be a file"):
        LedgerFile(tmp_path).append([entry("intent", "one")])
    (tmp_path / "plain").write_text("")
    with pytest.raises(LedgerUnavailable):
        LedgerFile(tmp_path / "plain" / "ledger.jsonl").append([entry("intent", "one")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resource_id", ["x"]), ("resource_id", 5), ("base_url", []), ("account", None),
        ("nonce", {}), ("run", 1), ("embedded", "yes"), ("note", []), ("at", float("nan")),
        ("owner", {"machine": [], "boot": "", "pid": 7, "started": ""}),
        ("owner", {"machine": "", "boot": "", "pid": "7", "started": ""}),
        ("event", []), ("kind", {}),
    ],
)  # fmt: skip
def test_a_line_of_wrong_types_is_skipped(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "ledger.jsonl"
    file = LedgerFile(path)
    file.append([entry("intent", "one")])
    row = json.loads(path.read_bytes())
    row[name] = value
    with path.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    file.append([entry("created", "two")])
    assert held(path) == {"one", "two"}
