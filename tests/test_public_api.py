"""The public names: one list, each of them importable and typed, and nothing heavy behind them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fireworks_training

ROOT = Path(__file__).parent.parent
TYPING = Path(__file__).parent / "typing"

NAMES = [
    "APIFuture",
    "AckEvent",
    "AdaptiveConcurrencyController",
    "ApiError",
    "ApiStatusError",
    "AsyncControlPlane",
    "AsyncFiretitanServiceClient",
    "AsyncFiretitanTrainingClient",
    "AsyncResourceLedger",
    "AuthenticationFailed",
    "ChatTemplateRenderer",
    "CheckpointInfo",
    "ClientClosed",
    "Conflict",
    "ConnectionFailed",
    "ControlPlane",
    "DeploymentInfo",
    "DeploymentSampler",
    "DeploymentSamplerTimeoutError",
    "EvaluatedSample",
    "Evaluation",
    "Event",
    "FailureEvent",
    "FinishEvent",
    "FiretitanProvisioningConfig",
    "FiretitanSamplingClient",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "FireworksTrainingError",
    "FixedConcurrencyController",
    "GradientsInDoubt",
    "HeldResource",
    "HotLoadFailed",
    "HotLoadTimeout",
    "InvalidArgument",
    "InvalidDatum",
    "LocalPlatformError",
    "Observation",
    "LoopBlockedEvent",
    "LossFailed",
    "MissingExtra",
    "ModelInfo",
    "NotFound",
    "NotSupported",
    "OnEvent",
    "OperationCancelled",
    "OperationError",
    "OperationInfo",
    "OwnerLoopGone",
    "PrecedingOperationFailed",
    "ProtocolError",
    "ProvisioningError",
    "ProvisioningOptions",
    "ProvisioningTimeout",
    "RateLimited",
    "ReplicaStatus",
    "RequestFailed",
    "RequestTimedOut",
    "ResourceLedger",
    "RetryEvent",
    "RunUsage",
    "SampleCall",
    "SampledCompletion",
    "SampledRequestResult",
    "SampledServerAttempt",
    "SamplingClientClosedError",
    "SamplingConcurrencyController",
    "SamplingError",
    "SamplingRequestError",
    "SaveSamplerResult",
    "SaveWeightsForSamplerResponse",
    "ServerFailed",
    "ServerMetrics",
    "SessionEnded",
    "SessionLost",
    "Snapshot",
    "SubmitEvent",
    "SwapEvent",
    "SyncEvent",
    "TITOError",
    "TITOSidecar",
    "TITOTrajectoryArtifact",
    "TokenDelta",
    "TokenStream",
    "TrainerJobInfo",
    "TrainerLost",
    "TrainingProfile",
    "UnknownOption",
    "Usage",
    "UsageError",
    "WeightSyncError",
    "WeightSyncResult",
    "WeightsDrifted",
    "WindowEvent",
    "WrongLoop",
    "__version__",
    "chat_datum",
    "check_alignment",
    "check_normalization",
    "completion_datum",
    "read_evaluation",
    "read_usage_records",
    "rl_datum",
    "rollout_datum",
    "supervised_datum",
    "write_evaluation",
]

HEAVY = ["torch", "transformers", "tinker", "rich", "click", "matplotlib"]
TINKER_TYPES = {"SaveWeightsForSamplerResponse"}
"""Names whose import loads tinker, which may load torch."""

IMPORT_AND_BUILD = """
import json, sys
import fireworks_training
for name in {names!r}:
    getattr(fireworks_training, name)
service = fireworks_training.FiretitanServiceClient.from_firetitan_config(
    api_key="key", base_url="http://localhost:9", base_model="m"
)
sampler = fireworks_training.DeploymentSampler("http://localhost:9", "m", "key")
print(json.dumps([name for name in {heavy!r} if name in sys.modules]))
sampler.close()
service.close()
"""


def loaded(names: list[str]) -> list[str]:
    """The heavy modules there are in a new process that has used these names."""
    script = IMPORT_AND_BUILD.format(names=names, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stderr == ""
    found: list[str] = json.loads(done.stdout)
    return found


def test_the_list_of_names_is_the_one_agreed() -> None:
    assert sorted(fireworks_training.__all__) == sorted(NAMES)
    assert dir(fireworks_training) == fireworks_training.__all__


def test_the_list_is_sorted_and_without_repeats() -> None:
    assert fireworks_training.__all__ == sorted(set(fireworks_training.__all__))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_importable_and_documented(name: str) -> None:
    value = getattr(fireworks_training, name)
    assert name == "__version__" or value.__doc__
    assert name == "__version__" or value.__name__ == name


def test_another_name_is_refused() -> None:
    name = "FiretitanServisClient"
    with pytest.raises(AttributeError, match=name):
        getattr(fireworks_training, name)


def test_star_import_gives_the_list() -> None:
    namespace: dict[str, object] = {}
    exec("from fireworks_training import *", namespace)
    assert set(NAMES) <= namespace.keys()


def test_nothing_heavy_is_loaded_by_the_names_a_service_and_a_sampler() -> None:
    assert loaded([name for name in NAMES if name not in TINKER_TYPES]) == []


def test_a_heavy_name_would_be_seen() -> None:
    assert "tinker" in loaded(sorted(TINKER_TYPES))


class Checked:
    """What a type checker said of `tests/typing` and of every public name."""

    def __init__(self, errors: set[tuple[str, int]], revealed: dict[int, str]) -> None:
        self.errors = errors
        self.revealed = revealed


def run_mypy(files: list[Path]) -> Checked:
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    errors: set[tuple[str, int]] = set()
    revealed: dict[int, str] = {}
    for file, line, kind, text in re.findall(r"(?m)^(.+?):(\d+): (\w+): (.*)$", done.stdout):
        if kind == "error":
            errors.add((Path(file).name, int(line)))
        elif text.startswith("Revealed type is ") and Path(file).name == "names.py":
            revealed[int(line)] = text
    return Checked(errors, revealed)


def run_pyright(files: list[Path]) -> Checked:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*command, *map(str, files)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    errors: set[tuple[str, int]] = set()
    revealed: dict[int, str] = {}
    for finding in json.loads(done.stdout)["generalDiagnostics"]:
        file, line = Path(finding["file"]).name, finding["range"]["start"]["line"] + 1
        if finding["severity"] == "error":
            errors.add((file, line))
        elif file == "names.py":
            revealed[line] = finding["message"]
    return Checked(errors, revealed)


@pytest.fixture(scope="module", params=[run_mypy, run_pyright], ids=["mypy", "pyright"])
def checked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """One run of each checker over everything, since starting one costs seconds."""
    names = tmp_path_factory.mktemp("typing") / "names.py"
    lines = [f"reveal_type(fireworks_training.{name})" for name in NAMES]
    names.write_text("\n".join(["import fireworks_training", *lines, ""]))
    found: Checked = request.param([TYPING / "api.py", TYPING / "refused.py", names])
    return found


def test_each_name_has_a_type(checked: Checked) -> None:
    assert checked.revealed.keys() == set(range(2, len(NAMES) + 2))
    untyped = {
        NAMES[line - 2]: text
        for line, text in checked.revealed.items()
        if re.search(r'is "(builtins\.)?(Any|Unknown)"', text)
    }
    assert untyped == {}


def test_the_main_calls_have_the_types_they_should(checked: Checked) -> None:
    assert {line for file, line in checked.errors if file == "api.py"} == set()


def test_what_should_be_refused_is(checked: Checked) -> None:
    lines = (TYPING / "refused.py").read_text("utf-8").split("\n")
    marked = {number for number, line in enumerate(lines, 1) if "  # error" in line}
    assert {line for file, line in checked.errors if file == "refused.py"} == marked
