"""The public names: one list, each of them importable and typed, and nothing heavy behind them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import fireworks_training
from tests.public_types import Package

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
    "ChatTokenizer",
    "CheckpointInfo",
    "CheckpointType",
    "CleanUp",
    "ClientClosed",
    "Conflict",
    "ConnectionFailed",
    "ControlPlane",
    "Conversation",
    "DeploymentConfig",
    "DeploymentInfo",
    "DeploymentSampler",
    "DeploymentSamplerTimeoutError",
    "EvaluatedSample",
    "Evaluation",
    "Event",
    "EventKind",
    "FailureEvent",
    "Fault",
    "FinishEvent",
    "FinishReason",
    "FiretitanProvisioningConfig",
    "FiretitanSamplingClient",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "FireworksTrainingError",
    "FixedConcurrencyController",
    "GradNorms",
    "GradientsInDoubt",
    "HeldResource",
    "HotLoadFailed",
    "HotLoadTimeout",
    "InvalidArgument",
    "InvalidDatum",
    "LedgerUnavailable",
    "LocalPlatformError",
    "LoopBlockedEvent",
    "LossConfig",
    "LossName",
    "LossFailed",
    "LossFunction",
    "MissingExtra",
    "ModelInfo",
    "Normalization",
    "NotFound",
    "NotSupported",
    "Observation",
    "OnDrift",
    "OnEvent",
    "OperationCancelled",
    "OperationError",
    "OperationInfo",
    "Output",
    "OwnerLoopGone",
    "Pooling",
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
    "RetryConfig",
    "RetryEvent",
    "RunState",
    "RunUsage",
    "SampleCall",
    "SampledCompletion",
    "SampledRequestResult",
    "SampledServerAttempt",
    "SamplingClientClosedError",
    "SamplingConcurrencyController",
    "SamplingError",
    "SamplingOptions",
    "SamplingRequestError",
    "SaveSamplerResult",
    "SaveWeightsForSamplerResponse",
    "ServerFailed",
    "ServerMetrics",
    "SessionEnded",
    "SessionLost",
    "Snapshot",
    "SnapshotDtype",
    "SnapshotKind",
    "SubmitEvent",
    "SwapEvent",
    "SyncEvent",
    "SyncStage",
    "TITOError",
    "TITOSidecar",
    "TITOTrajectoryArtifact",
    "TokenDelta",
    "TokenStream",
    "Tokenizer",
    "TrainerJobInfo",
    "TrainerLost",
    "TrainingProfile",
    "TransitionType",
    "UnknownOption",
    "Usage",
    "UsageError",
    "WeightSyncError",
    "WeightSyncResult",
    "WeightsDrifted",
    "WindowEvent",
    "WireDialect",
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

ALIASES = {
    "CheckpointType",
    "CleanUp",
    "Conversation",
    "EventKind",
    "Fault",
    "FinishReason",
    "GradNorms",
    "LossConfig",
    "LossName",
    "Normalization",
    "OnDrift",
    "Output",
    "Pooling",
    "RunState",
    "SnapshotDtype",
    "SnapshotKind",
    "SyncStage",
    "TransitionType",
    "WireDialect",
}
"""Names of other types, which have neither a name nor a docstring of their own."""

MADE_INSIDE = {
    "APIFuture",
    "AsyncControlPlane",
    "AsyncFiretitanServiceClient",
    "AsyncFiretitanTrainingClient",
    "AsyncResourceLedger",
    "FiretitanSamplingClient",
    "SampleCall",
    "TokenStream",
}
"""Classes that have other makers than their constructor: a method, or `connect`."""

ROOMS = {
    "AsyncControlPlane",
    "AsyncFiretitanTrainingClient",
    "ControlPlane",
    "DeploymentSampler",
    "FiretitanSamplingClient",
    "FiretitanTrainingClient",
    "SamplingConcurrencyController",
    "TokenStream",
}
"""Classes with behaviour, which live where their code belongs."""

EXEMPT = {
    "Classifier": "an alias of a callable, spelled out in the docstring of TITOSidecar",
    "ExactTokenSampler": "a protocol that DeploymentSampler fits",
    "RetryPolicy": "only tests hand one to a sampler",
    "TITOStatus": "a literal of tito.values.records, listed at its field",
    "TemplateTokenizer": "a protocol that tokenizers of transformers fit",
    "SaveWeightsForSamplerResponse": "a subclass of a type of tinker, in the module that loads it",
}

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
    if name != "__version__" and name not in ALIASES:
        assert value.__doc__
        assert value.__name__ == name


def test_an_alias_is_no_class() -> None:
    """The exception is for those that need it."""
    assert [name for name in ALIASES if isinstance(getattr(fireworks_training, name), type)] == []


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


def package(root: Path, exempt: frozenset[str] = frozenset(EXEMPT)) -> Package:
    return Package(root, ("", "tito"), frozenset(MADE_INSIDE), frozenset(ROOMS), exempt)


def test_every_type_of_a_public_signature_can_be_imported() -> None:
    assert package(Path(fireworks_training.__file__).parent).missing() == []


def test_each_exemption_is_needed() -> None:
    missing = package(Path(fireworks_training.__file__).parent, frozenset()).missing()
    assert {line.split()[1] for line in missing} == EXEMPT.keys()


SHOP = {
    "__init__.py": """
        if TYPE_CHECKING:
            from shop._room import Till
            from shop.goods import Pen, sell
        __all__ = ["Pen", "Till", "sell"]
    """,
    "goods.py": """
        class Pen: ...
        def sell(pen: Pen) -> int: ...
    """,
    "_room.py": """
        from shop.goods import Pen
        Hue = Literal["red", "blue"]
        T = TypeVar("T")
        if TYPE_CHECKING:
            Pens = list[Pen]
        class Base:
            def take(self, pen: Pen) -> None: ...
        class Till(Base):
            ...
    """,
}


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("def ok(self, pens: Pens, other: T) -> list[Pen] | None: ...", None),
        ("def _private(self, hue: Hue) -> None: ...", None),
        ("def take(self, hue: Hue) -> None: ...", "Till.take: Hue of shop._room is not exported"),
        ("hue: Hue", "Till.hue: Hue of shop._room is not exported"),
        ("def __init__(self, *, hue: 'Hue') -> None: ...", "Till.__init__: Hue of shop._room"),
        ("async def get(self) -> Base: ...", "Till.get: Base of shop._room is not exported"),
        ("def again(self) -> Till: ...", "Till.again: Till stands in shop._room"),
    ],
)
def test_a_type_that_is_missing_is_found(tmp_path: Path, method: str, problem: str | None) -> None:
    root = tmp_path / "shop"
    root.mkdir()
    for name, text in SHOP.items():
        (root / name).write_text(textwrap.dedent(text).replace("    ...\n", f"    {method}\n"))
    found = Package(root).missing()
    assert found == [] if problem is None else found[0].startswith(problem)


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
