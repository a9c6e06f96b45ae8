"""Programs for the official SDK, run on this package by their own imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fireworks_training import NotSupported, compat, dropin
from fireworks_training.dropin import http_errors
from fireworks_training.dropin.official_names import OFFICIAL_NAMES
from tests.conftest import RunningPlatform

SDK = "fireworks.training.sdk"


@pytest.fixture
def installed() -> Iterator[None]:
    dropin.install()
    yield
    dropin.uninstall()


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fireworks_training.dropin", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("module", sorted(OFFICIAL_NAMES))
def test_every_public_name_can_be_imported(module: str) -> None:
    found = importlib.import_module(f"{SDK}.{module}" if module else SDK)
    for name in OFFICIAL_NAMES[module]:
        value = getattr(found, name)
        if hasattr(compat, name):
            assert value is getattr(compat, name)
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = found.no_such_name


@pytest.mark.usefixtures("installed")
def test_types_are_those_of_tinker() -> None:
    import tinker

    types = importlib.import_module(f"{SDK}.types")
    datum = importlib.import_module(f"{SDK}.types.datum")
    assert types.Datum is datum.Datum is tinker.Datum
    assert types.AdamParams is compat.AdamParams
    assert importlib.import_module(SDK).types is types
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{SDK}.no_such_module")


@pytest.mark.usefixtures("installed")
def test_what_is_missing_is_refused_by_name_when_it_is_used() -> None:
    client = importlib.import_module(f"{SDK}.client")
    missing = client.QueueStateLogger
    assert not isinstance(3, missing)
    for use in (missing, lambda: missing.anything, lambda: missing + 1, lambda: missing[0]):
        with pytest.raises(NotSupported, match=r"fireworks.training.sdk.client.QueueStateLogger"):
            use()


@pytest.mark.usefixtures("installed")
def test_none_stands_for_routing_that_nobody_recorded() -> None:
    import tinker

    made = tinker.ModelInput.from_ints(tokens=[1, 2], routing_matrices=None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    assert made.to_ints() == [1, 2]
    with pytest.raises(NotSupported, match="routing_matrices"):
        tinker.ModelInput.from_ints([1], routing_matrices=["x"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_uninstalled_nothing_is_left() -> None:
    dropin.install()
    importlib.import_module(f"{SDK}.errors")
    dropin.uninstall()
    assert not [name for name in sys.modules if name.startswith(SDK)]


def test_a_script_runs_as_the_main_program_with_its_arguments_and_its_status(
    tmp_path: Path,
) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 5\n")
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "import helper\n"
        "from fireworks.training.sdk import FiretitanServiceClient\n"
        "from fireworks.training.sdk.errors import DOCS_SDK, format_sdk_error\n"
        "assert __name__ == '__main__'\n"
        "print(FiretitanServiceClient.__module__, sys.argv[1:], helper.VALUE)\n"
        "sys.exit(7)\n"
    )
    ended = run(script, "--steps", "3")
    assert ended.returncode == 7, ended.stderr
    assert ended.stdout == "fireworks_training.compat.service ['--steps', '3'] 5\n"
    script.write_text("raise ValueError('no')\n")
    assert run(script).returncode == 1
    assert run(tmp_path / "nothing.py").returncode == 2


def test_a_guide_of_the_official_sdk_runs_with_none_for_every_optional_argument(
    platform: RunningPlatform, tmp_path: Path
) -> None:
    script = tmp_path / "guide.py"
    script.write_text(
        "import os\n"
        "from fireworks.training.sdk import FiretitanServiceClient\n"
        "from fireworks.training.sdk.types import AdamParams, Datum, ModelInput, TensorData\n"
        "import numpy as np\n"
        "service = FiretitanServiceClient.from_firetitan_config(\n"
        "    base_url=os.environ['FIREWORKS_BASE_URL'], base_model=os.environ['MODEL'],\n"
        "    gradient_accumulation_steps=None, hotload_timeout_s=None, trainer_timeout_s=None,\n"
        "    deployment_timeout_s=None, trainer_pending_timeout_s=None, lora_rank=None,\n"
        "    region=None, extra_args=None, cleanup_trainer_on_close=True,\n"
        "    cleanup_deployment_on_close='delete')\n"
        "client = service.create_training_client()\n"
        "tokens = [5, 6, 7, 8]\n"
        "prompt = ModelInput.from_ints(tokens=tokens[:-1], routing_matrices=None)\n"
        "datum = Datum(model_input=prompt,\n"
        "    loss_fn_inputs={'target_tokens': TensorData.from_numpy(np.array(tokens[1:])),\n"
        "        'weights': TensorData.from_numpy(np.ones(3, np.float32))})\n"
        "out = client.forward_backward([datum], 'cross_entropy').result()\n"
        "client.optim_step(AdamParams(learning_rate=1e-3)).result()\n"
        "print(client.run_name is None, out.metrics['loss:sum'] > 0)\n"
        "service.close()\n"
    )
    ended = run(
        script,
        FIREWORKS_BASE_URL=platform.base_url,
        FIREWORKS_API_KEY=platform.api_key,
        MODEL=platform.model,
        HOME=str(tmp_path),
    )
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr


class Answer:
    """A response as `httpx` and `requests` have it."""

    text = "a page"

    def __init__(self, status: int, body: object = None, **headers: str) -> None:
        self.status_code, self.body, self.headers = status, body, headers

    def json(self) -> object:
        if self.body is None:
            raise ValueError("no JSON")
        return self.body


def test_the_words_of_errors() -> None:
    said = http_errors.format_sdk_error("it failed", "no key", "pass one", docs_url="http://docs")
    for part in ("it failed", "no key", "pass one", "http://docs"):
        assert part in said
    assert http_errors.parse_api_error(Answer(400, {"error": {"message": "bad"}})) == "bad"
    assert http_errors.parse_api_error(Answer(400)) == "a page"
    read = http_errors.parse_retry_after
    assert read(Answer(429, **{"Retry-After": "1.5"})) == 1.5
    assert read(Answer(429, **{"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"})) == 0.0
    assert read(Answer(429)) is read(Answer(429, **{"retry-after": "soon"})) is None


async def test_requests_are_sent_again_until_an_answer_is_final(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []

    async def no_pause(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(http_errors.time, "sleep", pauses.append)
    monkeypatch.setattr(http_errors.asyncio, "sleep", no_pause)
    script: list[object] = [ConnectionError("no"), Answer(503), Answer(200)]

    def get(*_: object) -> object:
        made = script.pop(0)
        if isinstance(made, Exception):
            raise made
        return made

    async def get_async(*_: object) -> object:
        return get()

    assert http_errors.request_with_retries(get, "url").status_code == 200
    script += [Answer(503), Answer(404)]
    assert (await http_errors.async_request_with_retries(get_async)).status_code == 404
    assert pauses == [1.0, 2.0, 1.0]
    script.append(ValueError("a mistake"))
    with pytest.raises(ValueError, match="a mistake"):
        http_errors.request_with_retries(get)
    script.append(Answer(503))
    assert http_errors.request_with_retries(get, max_wait_time=0).status_code == 503
