"""What is left behind, and its removal: only what carries our mark, and has no live owner."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fireworks_training import (
    AsyncFiretitanServiceClient,
    AsyncResourceLedger,
    LedgerUnavailable,
    ResourceLedger,
)
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._async.runtime.processes import this_process
from fireworks_training._core.ledger import LedgerEntry, fold
from fireworks_training.cli.main import main
from fireworks_training.testing import ControlPlaneServer
from fireworks_training.testing.control_plane_server import DEPLOYMENTS, JOBS

DEAD = replace(this_process(), started="before")
NONCE = "0123456789ab"


@pytest.fixture
def stub() -> Iterator[ControlPlaneServer]:
    with ControlPlaneServer() as running:
        yield running


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: ControlPlaneServer) -> LedgerFile:
    """A ledger of the test's own, and the stub as the platform."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("FIREWORKS_BASE_URL", stub.url)
    monkeypatch.setenv("FIREWORKS_API_KEY", "key")
    return LedgerFile()


def note(
    ledger: LedgerFile, stub: ControlPlaneServer, event: Any = "created", **fields: Any
) -> LedgerEntry:
    entry = LedgerEntry(
        event=event,
        **{
            "at": time.time() - 3600,
            "kind": "deployment",
            "resource_id": "d",
            "account": "me",
            "base_url": stub.url,
            "nonce": NONCE,
            "owner": DEAD,
            **fields,
        },
    )
    ledger.append([entry])
    return entry


def ours(nonce: str = NONCE) -> dict[str, str]:
    return {"fireworks-training-run": nonce}


async def reap(**wish: Any) -> list[tuple[str, str]]:
    async with AsyncResourceLedger.connect() as resources:
        return [(row.resource_id, row.outcome) for row in await resources.reap(**wish)]


async def test_what_a_dead_run_made_is_removed_and_what_is_not_ours_stays(
    ledger: LedgerFile, stub: ControlPlaneServer
) -> None:
    stub.put(DEPLOYMENTS, "d", annotations=ours())
    stub.put(JOBS, "j", displayName=f"mine ft-{NONCE}")
    stub.put(DEPLOYMENTS, "theirs", annotations=ours("f" * 12))
    stub.put(DEPLOYMENTS, "older")
    note(ledger, stub)
    note(ledger, stub, kind="trainer", resource_id="j")
    note(ledger, stub, resource_id="theirs")
    note(ledger, stub, "intent", resource_id="older")  # it was there before the intent
    assert await reap(dry_run=True) == [
        ("d", "remove"),
        ("j", "remove"),
        ("theirs", "leave"),
        ("older", "close"),
    ]
    assert len(stub.left()) == 4
    assert await reap() == [
        ("d", "removed"),
        ("j", "removed"),
        ("theirs", "leave"),
        ("older", "closed"),
    ]
    assert stub.left() == [f"{DEPLOYMENTS}/older", f"{DEPLOYMENTS}/theirs"]
    deleted = [path for method, path, _ in stub.requests if method == "DELETE"]
    assert deleted == [f"{DEPLOYMENTS}/d", f"{JOBS}/j"]  # a trainer goes last
    assert await reap() == [("theirs", "leave")]


async def test_a_live_run_is_left_alone(stub: ControlPlaneServer) -> None:
    async with AsyncFiretitanServiceClient.from_firetitan_config(
        base_model="m", cleanup_trainer_on_close=True, cleanup_deployment_on_close="delete"
    ) as service:
        await service.create_training_client()
        before = stub.left()
        async with AsyncResourceLedger.connect() as resources:
            rows = await resources.ps()
            assert {(row.state, row.owner_alive, row.outcome) for row in rows} == {
                ("JOB_STATE_RUNNING", True, "leave"),
                ("READY", True, "leave"),
            }
        assert {outcome for _, outcome in await reap(kept=True)} == {"leave"}
        assert stub.left() == before


async def test_what_a_live_run_has_taken_up_is_left_too(
    ledger: LedgerFile, stub: ControlPlaneServer
) -> None:
    stub.put(DEPLOYMENTS, "d", annotations=ours())
    note(ledger, stub, "kept")
    note(ledger, stub, "adopted", nonce="b" * 12, owner=this_process())
    assert [outcome for _, outcome in await reap(kept=True)] == ["leave", "leave"]
    note(ledger, stub, "gone", nonce="b" * 12)
    assert await reap() == [("d", "leave")]
    assert await reap(kept=True) == [("d", "removed")]


async def test_age_counts_from_the_intent(ledger: LedgerFile, stub: ControlPlaneServer) -> None:
    stub.put(DEPLOYMENTS, "d", annotations=ours())
    note(ledger, stub, "intent", at=time.time() - 7000)
    note(ledger, stub, "created", at=time.time() - 10)
    assert await reap(older_than_s=7200) == [("d", "leave")]
    assert await reap(older_than_s=6900) == [("d", "removed")]


async def test_other_accounts_platforms_and_machines_are_left(
    ledger: LedgerFile, stub: ControlPlaneServer
) -> None:
    stub.put(DEPLOYMENTS, "d", annotations=ours())
    note(ledger, stub, account="somebody")
    note(ledger, stub, base_url="https://elsewhere.example")
    note(ledger, stub, resource_id="far", owner=replace(DEAD, machine="far"))
    stub.put(DEPLOYMENTS, "far", annotations=ours())
    assert {outcome for _, outcome in await reap()} == {"leave"}
    assert len(stub.left()) == 2
    assert len(fold(ledger.read())) == 3
    assert ("far", "removed") in await reap(other_machines=True)
    assert stub.left() == [f"{DEPLOYMENTS}/d"]


async def test_what_ended_with_its_embedded_platform_is_closed(
    ledger: LedgerFile, stub: ControlPlaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    note(ledger, stub, base_url="local", account="local", embedded=True)
    monkeypatch.setenv("FIREWORKS_BASE_URL", "local")
    assert await reap() == [("d", "closed")]
    assert fold(ledger.read()) == []


async def test_a_failure_does_not_stop_the_others(
    ledger: LedgerFile, stub: ControlPlaneServer
) -> None:
    for name in ("a", "b"):
        stub.put(DEPLOYMENTS, name, annotations=ours())
        note(ledger, stub, resource_id=name)
    stub.deny[("DELETE", f"{DEPLOYMENTS}/a")] = [403]
    assert await reap() == [("a", "failed"), ("b", "removed")]
    assert await reap() == [("a", "removed")]


def test_the_command_line(ledger: LedgerFile, stub: ControlPlaneServer) -> None:
    runner = CliRunner()
    assert "nothing" in runner.invoke(main, ["ps"]).output
    stub.put(DEPLOYMENTS, "d", annotations=ours(), replicaCount=2)
    note(ledger, stub, run="train.py")
    shown = runner.invoke(main, ["ps", "--json"])
    (row,) = json.loads(shown.output)
    assert (row["state"], row["replicas"], row["run"]) == ("READY", 2, "train.py")
    assert (row["outcome"], row["owner_alive"]) == ("remove", False)
    table = runner.invoke(main, ["ps"], terminal_width=200).output
    assert "train.py" in table
    assert "1.0h" in table
    dry = runner.invoke(main, ["reap", "--older-than", "2h", "--dry-run"])
    assert dry.exit_code == 0
    assert "left" in dry.output
    stub.deny[("DELETE", DEPLOYMENTS)] = [403]
    assert runner.invoke(main, ["reap"]).exit_code == 1
    assert "removed" in runner.invoke(main, ["reap", "--older-than", "30m"]).output
    assert stub.left() == []
    wrong = runner.invoke(main, ["reap", "--older-than", "soon"])
    assert wrong.exit_code == 2
    assert "is not a duration" in wrong.output


def test_a_server_that_refuses_is_said(stub: ControlPlaneServer, ledger: LedgerFile) -> None:
    note(ledger, stub)
    stub.deny[("GET", "/v1/accounts")] = [401]
    failed = CliRunner().invoke(main, ["ps"])
    assert failed.exit_code == 1
    assert "401" in failed.output


def test_the_blocking_twin(stub: ControlPlaneServer, ledger: LedgerFile) -> None:
    stub.put(DEPLOYMENTS, "d", annotations=ours())
    note(ledger, stub)
    with ResourceLedger.connect() as resources:
        (row,) = resources.reap()
    assert row.outcome == "removed"


# -- the file ------------------------------------------------------------------------------------


def test_a_torn_line_is_skipped_and_the_next_one_stands_alone(
    ledger: LedgerFile, stub: ControlPlaneServer, caplog: pytest.LogCaptureFixture
) -> None:
    first = note(ledger, stub)
    with ledger.path.open("ab") as file:
        file.write(b'{"at": 1, "event": "crea')
    second = note(ledger, stub, resource_id="e")
    assert ledger.read() == [first, second]
    assert "can't be read" in caplog.text
    assert ledger.path.stat().st_mode & 0o777 == 0o600
    assert ledger.path.parent.stat().st_mode & 0o777 == 0o700


async def test_a_ledger_that_cannot_be_read_is_a_typed_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "fireworks-training" / "ledger.jsonl").mkdir(parents=True)
    async with AsyncResourceLedger.connect(base_url="http://127.0.0.1:9", api_key="key") as ledger:
        with pytest.raises(LedgerUnavailable, match="can't be read"):
            await ledger.ps()
