"""What a run used, from its service to the command that shows it."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import tinker
from click.testing import CliRunner

from fireworks_training import FiretitanServiceClient, Usage, read_usage_records, supervised_datum
from fireworks_training._async import usage_records
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
    usage_records.write("run", "id", "local", "m", Usage(trained_tokens=3))
    (path,) = tmp_path.rglob("usage.jsonl")
    path.write_text('{"run": "torn\n' + path.read_text() + '{"usage": {"gold": 1}}\n3\n')
    with caplog.at_level(logging.WARNING):
        (record,) = read_usage_records()
    assert record.usage.trained_tokens == 3
    assert "usage.jsonl:1 can't be read" in caplog.text
