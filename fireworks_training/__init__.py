"""Train a language model on a remote trainer, hot-load its snapshots, sample from them.

Everything public stands here. Names are loaded when they are first used, so that importing the
package costs next to nothing; type checkers see the real imports. A new name of a module of values
(`_VALUES`) needs its line in `__all__` and no other.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fireworks_training.models import __version__

if TYPE_CHECKING:
    from fireworks_training._async.control_plane.client import AsyncControlPlane
    from fireworks_training._async.resources.reaper import AsyncResourceLedger
    from fireworks_training._async.resources.usage_records import read_usage_records
    from fireworks_training._async.sampling.concurrency import (
        AdaptiveConcurrencyController,
        FixedConcurrencyController,
        SamplingConcurrencyController,
    )
    from fireworks_training._async.sampling.sampler import DeploymentSampler
    from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
    from fireworks_training._async.sampling.token_stream import TokenStream
    from fireworks_training._async.service import AsyncFiretitanServiceClient
    from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
    from fireworks_training._sync.control_plane.client import ControlPlane
    from fireworks_training._sync.resources.reaper import ResourceLedger
    from fireworks_training._sync.service import FiretitanServiceClient
    from fireworks_training._sync.training.client import FiretitanTrainingClient
    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse
    from fireworks_training.config import *
    from fireworks_training.data import *
    from fireworks_training.errors import *
    from fireworks_training.evaluation import *
    from fireworks_training.events import *
    from fireworks_training.futures import *
    from fireworks_training.models import *
    from fireworks_training.options import *
    from fireworks_training.tito.rendering.chat_template import ChatTemplateRenderer
    from fireworks_training.tito.sidecar import TITOSidecar
    from fireworks_training.tito.values.errors import TITOError
    from fireworks_training.tito.values.records import TITOTrajectoryArtifact
    from fireworks_training.usage import *

_HOMES = {
    "AdaptiveConcurrencyController": "_async.sampling.concurrency",
    "AsyncControlPlane": "_async.control_plane.client",
    "AsyncFiretitanServiceClient": "_async.service",
    "AsyncFiretitanTrainingClient": "_async.training.client",
    "AsyncResourceLedger": "_async.resources.reaper",
    "ChatTemplateRenderer": "tito",
    "ControlPlane": "_sync.control_plane.client",
    "DeploymentSampler": "_async.sampling.sampler",
    "FiretitanSamplingClient": "_async.sampling.sampling_client",
    "FiretitanServiceClient": "_sync.service",
    "FiretitanTrainingClient": "_sync.training.client",
    "FixedConcurrencyController": "_async.sampling.concurrency",
    "ResourceLedger": "_sync.resources.reaper",
    "SamplingConcurrencyController": "_async.sampling.concurrency",
    "SaveWeightsForSamplerResponse": "_tinker_types",
    "TITOError": "tito",
    "TITOSidecar": "tito",
    "TITOTrajectoryArtifact": "tito",
    "TokenStream": "_async.sampling.token_stream",
    "read_usage_records": "_async.resources.usage_records",
}
"""The modules of names whose import loads more than the standard library."""

_VALUES = (
    "errors",
    "models",
    "futures",
    "config",
    "options",
    "events",
    "usage",
    "data",
    "evaluation",
)
"""The modules of all other names, searched in this order."""

__all__ = [
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
    "LossFailed",
    "LossFunction",
    "LossName",
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


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in __all__:
            for home in (_HOMES[name],) if name in _HOMES else _VALUES:
                module = importlib.import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    globals()[name] = value = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
