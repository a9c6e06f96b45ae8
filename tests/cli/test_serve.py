"""`fireworks-training serve`: its options become the platform's settings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner, Result

from fireworks_training.cli import main
from fireworks_training.cli import serve as serve_module
from fireworks_training.local.settings import OFFERS
from fireworks_training.models import __version__


class Became(Exception):
    """Carries the settings out of where the process would have been replaced."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Any:
    seen: list[dict[str, Any]] = []

    def become(settings: dict[str, Any]) -> NoReturn:
        seen.append(settings)
        raise Became

    monkeypatch.setattr(serve_module, "become_platform", become)

    def run(*options: str, env: dict[str, str] | None = None) -> tuple[Result, dict[str, Any]]:
        environment = {"FIREWORKS_API_KEY": None, **(env or {})}
        result = CliRunner().invoke(main, ["serve", *options], env=environment)
        return result, seen[-1] if seen else {}

    return run


def test_the_defaults(serve: Any) -> None:
    assert serve()[1] == {
        "host": "127.0.0.1",
        "port": 0,
        "state_dir": None,
        "api_key": None,
        "models": {},
        "output": "text",
        "limits": {},
        "offers": [],
        "until_eof": False,
        "as_cloud": False,
        "cloud_pace": 1.0,
        "trouble": None,
    }


def test_every_option(serve: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    _, settings = serve(
        "--host", "0.0.0.0", "--port", "8123", "--state-dir", str(tmp_path / "state"),
        "--model", f"mine={model}", "--model", f"other={model}", "--json", "--api-key", "k" * 20,
        "--max-trainers", "1", "--max-replicas", "2", "--trainer-delay", "1.5",
        "--deployment-delay", "3", "--inactivity-timeout", "600", "--session-timeout", "60",
        "--offer", "zstd", "--offer", "batch-polling", "--as-cloud",
            "--cloud-pace", "0.25", "--trouble", "7",
    )  # fmt: skip
    assert settings == {
        "host": "0.0.0.0",
        "port": 8123,
        "state_dir": str(tmp_path / "state"),
        "api_key": "k" * 20,
        "models": {"mine": str(model), "other": str(model)},
        "output": "json",
        "limits": {
            "maxTrainers": 1,
            "maxReplicas": 2,
            "trainerDelayS": 1.5,
            "deploymentDelayS": 3.0,
            "inactivityTimeoutS": 600.0,
            "sessionTimeoutS": 60.0,
        },
        "offers": ["zstd", "batch-polling"],
        "until_eof": False,
        "as_cloud": True,
        "cloud_pace": 0.25,
        "trouble": 7,
    }


def test_the_offers_are_those_that_the_platform_knows() -> None:
    assert set(serve_module.OFFERS) == set(OFFERS)


def test_where_the_key_may_come_from(serve: Any, tmp_path: Path) -> None:
    variable = {"FIREWORKS_API_KEY": "from-the-variable"}
    assert serve(env=variable)[1]["api_key"] == "from-the-variable"
    assert serve("--api-key", "from-option", env=variable)[1]["api_key"] == "from-option"
    key_file = tmp_path / "key"
    key_file.write_text("from-the-file\n")
    assert serve("--api-key-file", str(key_file), env=variable)[1]["api_key"] == "from-the-file"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model", "x"], "is not NAME=PATH"),
        (["--model", "=/tmp"], "is not NAME=PATH"),
        (["--model", "x=/no/such/folder"], "is not a folder"),
        (["--model", "x=/", "--model", "x=/"], "given twice"),
        (["--port", "70000"], "70000"),
        (["--offer", "pickle"], "pickle"),
        (["--api-key-file", "/no/such/file"], "does not exist"),
        (["--api-key-file", os.devnull], "is empty"),
        (["--until-eof"], "is no pipe"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_option_is_refused(serve: Any, options: list[str], says: str) -> None:
    result, settings = serve(*options)
    assert result.exit_code == 2
    assert says in result.output
    assert settings == {}


@pytest.mark.slow
def test_it_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fireworks_training.cli", "serve", "--json", "--until-eof"]
    process = subprocess.Popen(
        [*command, "--state-dir", str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert "base_url" in json.loads(process.stdout.readline())
    process.stdin.close()
    assert process.wait(30) == 0
    process.stdout.close()


def test_help_and_version_import_no_command() -> None:
    code = (
        "import sys\n"
        "from fireworks_training.cli import main\n"
        "main(sys.argv[1:], standalone_mode=False)\n"
        "print([m for m in sys.modules if m.startswith('fireworks_training.cli.')])\n"
        "print([m for m in ('torch', 'transformers', 'tinker', 'rich') if m in sys.modules])"
    )
    for option, says in (("--help", "serve"), ("--version", __version__)):
        command = [sys.executable, "-c", code, option]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert says in done.stdout
        assert done.stdout.splitlines()[-2:] == ["['fireworks_training.cli.main']", "[]"]


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(main, ["dance"])
    assert result.exit_code == 2
    assert "No such command 'dance'" in result.output


def test_the_process_becomes_the_platform_and_hides_the_key() -> None:
    """The supervisor's own refusal shows that it runs, has the settings, and knows the output."""
    code = (
        "from fireworks_training.cli.serve import become_platform\n"
        "become_platform({'host': '', 'api_key': 'tml-secret-key', 'output': 'json'})"
    )
    environment = {**os.environ, "FIREWORKS_API_KEY": "tml-secret-key"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"error": "settings: host is empty"}
    assert "secret" not in done.stderr


def test_options_that_do_not_fit_a_pipe_are_refused() -> None:
    from click import ClickException

    with pytest.raises(ClickException, match="too long"):
        serve_module.become_platform({"host": "x" * 40_000})


def test_trouble_without_a_cloud_is_refused(serve: Any) -> None:
    result, settings = serve("--trouble", "7")
    assert result.exit_code == 2
    assert "--as-cloud" in result.output
    assert not settings
