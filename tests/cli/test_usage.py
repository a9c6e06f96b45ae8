"""Usage of a run, from its service to the command that shows it."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tinker
from click.testing import CliRunner

from fireworks_training import (
    ControlPlane,
    FiretitanServiceClient,
    Usage,
    read_usage_records,
    supervised_datum,
)
from fireworks_training._async.resources import usage_records
from fireworks_training._async.resources.usage_records import RunRecord
from fireworks_training.cli import main
from tests.conftest import RunningPlatform


def test_a_run_is_counted_noted_and_priced(
    platform: RunningPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    service = FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        cleanup_deployment_on_close="delete",
        cleanup_trainer_on_close=True,
    )
    assert service.usage() == Usage()
    with service:
        client = service.create_training_client()
        datum = supervised_datum([5, 6, 7, 8, 9], [1.0] * 5)
        client.forward([datum], "cross_entropy").result()
        client.forward_backward([datum, datum], "cross_entropy").result()
        client.forward_backward_custom([datum], lambda _, found: (-found[0].sum(), {})).result()
        client.optim_step(tinker.AdamParams(learning_rate=1e-4)).result()
        sampler = service.create_deployment_sampler()
        sampler.sample_with_prompt_tokens([1, 2, 3], n=2, max_tokens=4).result()
        used = service.usage()
    assert (used.forward_tokens, used.trained_tokens) == (8, 12)
    assert used.prefilled_tokens + used.cached_tokens == 6
    assert 2 <= used.sampled_tokens <= 8
    assert used.trainer_seconds > 0
    assert math.isclose(used.replica_seconds, used.trainer_seconds, rel_tol=0.01)
    (record,) = read_usage_records()
    assert record.usage.trained_tokens == 12
    assert record.usage.trainer_seconds >= used.trainer_seconds
    assert record.base_model == platform.model

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main, ["usage", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    prices = tmp_path / "prices.json"
    prices.write_text(json.dumps({"trained": 1e6}))
    (row,) = json.loads(run(record.run_id, "--prices", str(prices), "--json"))
    assert (row["trained_tokens"], row["cost"]) == (12, 12.0)
    text = run("--prices", str(prices))
    assert record.run_id in text
    assert "in all: 12.00" in text
    unknown = CliRunner().invoke(main, ["usage", "nothing"])
    assert (unknown.exit_code, "no run" in unknown.output) == (1, True)
    prices.write_text(json.dumps({"gold": 1}))
    wrong = CliRunner().invoke(main, ["usage", "--prices", str(prices)])
    assert (wrong.exit_code, "gold" in wrong.output) == (1, True)
    prices.write_text("[]")
    assert CliRunner().invoke(main, ["usage", "--prices", str(prices)]).exit_code == 2


def test_a_torn_line_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert read_usage_records() == []
    usage_records.write(RunRecord("run", "id", "local", "m"), Usage(trained_tokens=3))
    (path,) = tmp_path.rglob("usage.jsonl")
    path.write_text('{"run": "torn\n' + path.read_text() + '{"usage": {"gold": 1}}\n3\n')
    with caplog.at_level(logging.WARNING):
        (record,) = read_usage_records()
    assert record.usage.trained_tokens == 3
    assert "usage.jsonl:1 can't be read" in caplog.text


KILLED = """
import sys
import fireworks_training as ft
service = ft.FiretitanServiceClient.from_firetitan_config(
    base_url=sys.argv[1], api_key=sys.argv[2], base_model=sys.argv[3],
    create_deployment=False, trainer_job_id="killed-run",
)
client = service.create_training_client()
client.forward([ft.supervised_datum([5, 6, 7, 8, 9], [1.0] * 5)], "cross_entropy").result()
print("used", flush=True)
sys.stdin.readline()
"""


def test_a_killed_run_says_what_it_had_used(
    platform: RunningPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    arguments = [platform.base_url, platform.api_key, platform.model]
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"used\n"
        # Noted within seconds, while it goes on.
        while not (found := [r for r in read_usage_records() if r.usage.forward_tokens]):
            assert process.poll() is None
        assert [(r.state, r.usage.forward_tokens) for r in found] == [("running", 4)]
    finally:
        process.kill()
        process.communicate()
        with ControlPlane.connect(base_url=platform.base_url, api_key=platform.api_key) as plane:
            plane.delete_job("killed-run")
    (record,) = read_usage_records()
    assert (record.state, record.usage.forward_tokens) == ("lost", 4)
    result = CliRunner().invoke(main, ["usage", record.run_id, "--json"])
    (row,) = json.loads(result.output)
    assert (row["state"], row["forward_tokens"]) == ("lost", 4)


def test_a_note_is_whole_and_gives_way_to_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    run = RunRecord("run", "id", "local", "m")
    usage_records.note(run, Usage(trained_tokens=1))
    (path,) = tmp_path.rglob("id.json")
    # A kill in the middle of a note leaves the one before.
    path.with_suffix(".new").write_text('{"run": "to')
    assert [r.usage.trained_tokens for r in read_usage_records()] == [1]
    noted = path.read_text()
    usage_records.write(run, Usage(trained_tokens=2))
    assert not path.exists()
    # A kill between record and removal leaves both: the record counts.
    path.write_text(noted)
    assert [(r.usage.trained_tokens, r.state) for r in read_usage_records()] == [(2, "closed")]
