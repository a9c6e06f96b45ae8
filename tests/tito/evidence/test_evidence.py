"""Events for an observer, the log on disk, traces of failures: bounded, private, and in order."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import InvalidArgument, TITOError
from fireworks_training.testing import CompletionsServer
from fireworks_training.tito import (
    TITODistribution,
    TITOFailureTraceConfig,
    TITOLocalDebugConfig,
    TITOLocalDebugSink,
    TITOMetricSummary,
    TITOParseError,
    TITOTrajectoryArtifact,
    dump_tito_failure_trace,
    normalize_openai_tool_arguments,
)
from fireworks_training.tito.evidence import failure_traces
from fireworks_training.tito.evidence.journal import Journal
from tests.async_.sampling.support import until
from tests.tito.conftest import Sidecars
from tests.tito.support import ask, says, user

HELLO = [user("hello sesame")]
ROOM = {"max_local_bytes": 100_000, "min_free_bytes": 0}


def sink(folder: Path, **options: Any) -> TITOLocalDebugSink:
    return TITOLocalDebugSink(TITOLocalDebugConfig(folder, **{**ROOM, **options}))


def rows(log: TITOLocalDebugSink) -> list[dict[str, Any]]:
    files = sorted(log.writer_dir.glob("trajectories/*/events.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def late(log: TITOLocalDebugSink) -> dict[str, Any]:
    return read(log.writer_dir / "tombstones.jsonl")


def read(path: Path | str) -> dict[str, Any]:
    return dict(json.loads(Path(path).read_text()))


def everything(folder: Path) -> str:
    return "".join(file.read_text() for file in folder.rglob("*.json*"))


def modes(folder: Path) -> set[int]:
    """What others may do with anything in a folder."""
    return {path.stat().st_mode & 0o77 for path in folder.rglob("*")}


@pytest.mark.parametrize("redact", [False, True])
async def test_the_log_holds_a_trajectory_in_order(
    server: CompletionsServer, sidecars: Sidecars, tmp_path: Path, redact: bool
) -> None:
    server.otherwise = says("one")
    log = sink(tmp_path, redact_text=redact, run_id="r", writer_id="w")
    sidecar = await sidecars(observer=log)
    blocking = sidecar.create_trajectory(metadata={"api_key": "hush"})
    endpoint = await sidecar.create_trajectory_async()
    await ask(endpoint, HELLO)
    # An agent has its answer before that is noted; what it does next may come first.
    await until(lambda: len(rows(log)) == 5)
    await ask(endpoint, [])
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    await ask(endpoint, HELLO)
    assert [attempt.emission for attempt in artifact.response_attempts] == ["completed"]
    written = [row for row in rows(log) if row["trajectory_id"] == endpoint.trajectory_id]
    assert [row["event"] for row in written] == [
        "trajectory_open",
        "prepare",
        "completion",
        "response_emission",
        "request_rejected",
        "trajectory_terminal",
    ]
    assert [row["event_seq"] for row in written] == list(range(6))
    (turn,) = artifact.segments[0].turns
    assert written[1]["arrays"]["prepared_prompt_ids"] == list(turn.exact_prompt_ids)
    whole = everything(tmp_path)
    assert ("sesame" in whole) is not redact
    assert "hush" not in whole
    assert endpoint.api_key not in whole
    assert late(log)["payload"]["error_code"] == "tito_trajectory_closed"
    assert modes(tmp_path) == {0}
    await sidecar.abandon_trajectory(blocking.trajectory_id)
    await sidecar.close()
    with pytest.raises(OSError, match="closed"):
        log.record("x", "y", {})
    assert log.record_tombstone_event("x", "y", {}) == 0
    with pytest.raises(FileExistsError):
        sink(tmp_path, run_id="r", writer_id="w")


async def test_an_event_is_told_though_its_teller_is_cancelled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also one that waits for the observer to be done with an earlier one."""
    go_on = threading.Event()
    seen: list[str] = []

    class Slow(TITOLocalDebugSink):
        def __init__(self) -> None:
            pass

        def record(self, event: str, *arguments: Any) -> int:
            go_on.wait(10)
            seen.append(event)
            if event == "second":
                raise OSError("full")
            return 0

        def close(self) -> None:
            pass

    journal = Journal(Slow())
    tellers = [asyncio.create_task(journal.record(e, "t", {})) for e in ("first", "second")]
    await asyncio.sleep(0)
    for teller in tellers:
        teller.cancel()
    await asyncio.gather(*tellers, return_exceptions=True)
    assert [teller.cancelled() for teller in tellers] == [True, True]
    go_on.set()
    await until(lambda: "could not be told: OSError" in caplog.text)
    assert seen == ["first", "second"]
    await journal.close()


async def test_evidence_that_does_not_fit_fails_the_call_and_not_in_silence(
    server: CompletionsServer, sidecars: Sidecars, tmp_path: Path
) -> None:
    server.otherwise = says("one")

    class Full:
        """Takes the opening, and nothing after it."""

        def record(
            self,
            event: str,
            trajectory_id: str,
            payload: Mapping[str, Any],
            arrays: Mapping[str, Sequence[Any]] | None = None,
        ) -> None:
            if event != "trajectory_open":
                raise OSError("full")

        def close_trajectory(self, *arguments: Any) -> None:
            raise OSError("full")

        def record_tombstone_event(self, *arguments: Any) -> None:
            raise OSError("full")

    sidecar = await sidecars(observer=Full())
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO)
    assert (answer.status, answer.code) == (507, "tito_debug_storage_error")
    assert server.bodies == []
    with pytest.raises(TITOError, match="observer"):
        await sidecar.finish_trajectory(endpoint.trajectory_id)
    with pytest.raises(TITOError, match="observer"):
        await sidecar.close()
    small = sink(tmp_path, max_local_bytes=400)
    with pytest.raises(OSError, match="400 bytes"):
        small.record("event", "t", {"text": "x" * 400})
    with pytest.raises(OSError, match="free"):
        sink(tmp_path, min_free_bytes=1 << 60)
    for wrong in ({"max_local_bytes": 0}, {"min_free_bytes": -1}, {"run_id": "a/b"}):
        with pytest.raises(InvalidArgument):
            sink(tmp_path, **wrong)
    with pytest.raises(InvalidArgument, match="absolute"):
        sink(Path("here"))


def test_secrets_are_told_by_name_and_look() -> None:
    value = {
        "Authorization": "Basic x",
        "note": "Bearer abc.def and api_key=12345, fine",
        "rows": [{"access_token": 5}, 1.5, None],
    }
    assert TITOLocalDebugSink.sanitize(value) == {
        "Authorization": "<redacted>",
        "note": "Bearer <redacted> and api_key=<redacted>, fine",
        "rows": [{"access_token": "<redacted>"}, 1.5, None],
    }
    told = TITOLocalDebugSink.sanitize({"content": "abc"}, redact_text=True)
    assert told["content"]["bytes"] == 3


def config(folder: Path, **options: Any) -> TITOFailureTraceConfig:
    return TITOFailureTraceConfig(root_dir=folder / "traces", min_free_bytes=0, **options)


async def test_a_failed_trajectory_is_kept_and_can_be_trained_on_its_bytes(
    server: CompletionsServer, sidecars: Sidecars, tmp_path: Path
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(failure_trace_config=config(tmp_path, max_failed_traces=2))
    artifacts: list[TITOTrajectoryArtifact] = []
    for _ in range(3):
        endpoint = await sidecar.create_trajectory_async()
        await ask(endpoint, HELLO)
        artifacts.append(await sidecar.fail_trajectory(endpoint.trajectory_id, "agent_crashed"))
    files = sorted((tmp_path / "traces").rglob("*.json"))
    traces = [json.loads(file.read_text()) for file in files]
    kept = [artifact.trajectory_id for artifact in artifacts[1:]]
    assert [trace["trajectory_id"] for trace in traces] == kept
    assert traces[0]["code"] == "agent_crashed"
    again = TITOTrajectoryArtifact.unpack(base64.b64decode(traces[1]["artifact"]))
    assert again == artifacts[2]
    assert modes(tmp_path) == {0}

    error = ValueError("Bearer abc")
    found = sidecar.dump_failure_trace(artifacts[0], error, code="reward_failed")
    assert found is not None
    assert read(found)["error"]["message"] == "Bearer <redacted>"
    without = await sidecars()
    assert without.dump_failure_trace(artifacts[0], error, code="x") is None


def test_a_trace_of_a_file_follows_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(failure_traces, "_traces", [failure_traces.FailureTraces(config(tmp_path))])
    folder = tmp_path / "collected" / "deep"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("what happened")
    (folder / "link.txt").symlink_to(folder / "log.txt")
    (tmp_path / "collected" / "sideways").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    root = tmp_path / "collected"

    def dumped(source: Path) -> str | None:
        return dump_tito_failure_trace(
            None, OSError("x"), code="c", source_trace=source, source_trace_root=root
        )

    found = dumped(folder / "log.txt")
    assert found is not None
    assert base64.b64decode(json.loads(Path(found).read_text())["source_trace"]) == b"what happened"
    wrong = (folder / "link.txt", root / "sideways" / "log.txt", folder / "pipe", folder)
    for source in (*wrong, folder / "nothing", tmp_path / "outside", root / ".." / "x"):
        assert dumped(source) is None, source
    assert caplog.text.count("could not be kept") == 7


def test_traces_stay_within_their_bounds(tmp_path: Path) -> None:
    def keeper(**options: Any) -> failure_traces.FailureTraces:
        return failure_traces.FailureTraces(config(tmp_path, **options))

    error = RuntimeError("x")
    assert keeper(enabled=False).dump(None, error, "c") is None
    (tmp_path / "big").write_bytes(b"x" * 5000)
    small = keeper(max_trajectory_bytes=1000, max_local_bytes=1500)
    for _ in range(20):
        found = small.dump(None, error, "c", tmp_path / "big")
        assert found is not None
        assert json.loads(Path(found).read_text())["truncated"]
        assert sum(f.stat().st_size for f in Path(found).parent.iterdir()) <= 1500
    old = tmp_path / "traces" / "writer-999999999-old"
    old.mkdir()
    os.utime(old, (0, 0))
    assert keeper().dump(None, error, "c") is not None
    assert not old.exists()
    reused = tmp_path / "traces" / f"writer-{os.getpid()}-reused"  # written before we started
    reused.mkdir()
    os.utime(reused, (0, 0))
    mine = Path(str(keeper().dump(None, error, "c"))).parent
    assert keeper(stale_writer_age_seconds=1e-9).dump(None, error, "c") is not None
    assert (reused.exists(), mine.exists()) == (False, True)
    (tmp_path / "traces").chmod(0o755)
    assert keeper().dump(None, error, "c") is None
    (tmp_path / "traces").chmod(0o700)
    for wrong in (
        {"max_failed_traces": 0},
        {"max_trajectory_bytes": 10, "max_local_bytes": 5},
        {"stale_writer_age_seconds": 0},
    ):
        with pytest.raises(InvalidArgument):
            config(tmp_path, **wrong)


def test_small_values() -> None:
    values = TITODistribution().add(3).add(1)
    assert values == TITODistribution(2, 4.0, 1, 3)
    assert values.merge(TITODistribution()) == values
    flat = TITOMetricSummary({"calls/total": 2}, {"wall": values, "none": TITODistribution()})
    assert flat.flattened("x") == {
        "x/calls/total": 2.0,
        "x/wall_count": 2.0,
        "x/wall_sum": 4.0,
        "x/wall_mean": 2.0,
        "x/wall_min": 1.0,
        "x/wall_max": 3.0,
        "x/none_count": 0.0,
        "x/none_sum": 0.0,
    }
    assert normalize_openai_tool_arguments('{"b": 1, "a": 2}') == '{"a":2,"b":1}'
    assert normalize_openai_tool_arguments({"b": "ä"}) == '{"b":"ä"}'
    assert normalize_openai_tool_arguments("{no") == "{no"
    assert TITOParseError("a", 1, reason_code="r").reason_code == "r"


def test_errors_keep_what_they_know_through_a_pickle() -> None:
    import pickle

    error = TITOError("c", 503, "no", should_retry=True, origin="elsewhere", context={"a": 1})
    again = pickle.loads(pickle.dumps(error))
    assert again.__dict__ == error.__dict__
    assert again.as_error_record() == {
        "a": 1,
        "message": "no",
        "type": "sdk_error",
        "code": "c",
        "origin": "unknown",
        "should_retry": True,
        "discard_trajectory": False,
    }
    assert again.openai_body() == {"error": again.as_error_record()}
