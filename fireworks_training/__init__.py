"""Train a language model on a remote trainer, hot-load its snapshots, sample from them.

Everything public stands here. Names are loaded when they are first used, so that importing the
package costs next to nothing; type checkers see the real imports.
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
    from fireworks_training.config import FiretitanProvisioningConfig, ProvisioningOptions
    from fireworks_training.data import (
        chat_datum,
        check_alignment,
        check_normalization,
        completion_datum,
        rl_datum,
        rollout_datum,
        supervised_datum,
    )
    from fireworks_training.errors import (
        ApiError,
        ApiStatusError,
        AuthenticationFailed,
        ClientClosed,
        Conflict,
        ConnectionFailed,
        DeploymentSamplerTimeoutError,
        FireworksTrainingError,
        GradientsInDoubt,
        HotLoadFailed,
        HotLoadTimeout,
        InvalidArgument,
        InvalidDatum,
        LocalPlatformError,
        LossFailed,
        MissingExtra,
        NotFound,
        NotSupported,
        OperationCancelled,
        OperationError,
        OwnerLoopGone,
        PrecedingOperationFailed,
        ProtocolError,
        ProvisioningError,
        ProvisioningTimeout,
        RateLimited,
        RequestFailed,
        RequestTimedOut,
        SamplingClientClosedError,
        SamplingError,
        SamplingRequestError,
        ServerFailed,
        SessionEnded,
        SessionLost,
        TrainerLost,
        UnknownOption,
        UsageError,
        WeightsDrifted,
        WeightSyncError,
        WrongLoop,
    )
    from fireworks_training.evaluation import (
        EvaluatedSample,
        Evaluation,
        read_evaluation,
        write_evaluation,
    )
    from fireworks_training.events import (
        AckEvent,
        Event,
        FailureEvent,
        FinishEvent,
        LoopBlockedEvent,
        OnEvent,
        RetryEvent,
        SubmitEvent,
        SwapEvent,
        SyncEvent,
        WindowEvent,
    )
    from fireworks_training.futures import APIFuture, SampleCall
    from fireworks_training.models import (
        CheckpointInfo,
        DeploymentInfo,
        HeldResource,
        ModelInfo,
        Observation,
        OperationInfo,
        ReplicaStatus,
        SampledCompletion,
        SampledRequestResult,
        SampledServerAttempt,
        SaveSamplerResult,
        ServerMetrics,
        Snapshot,
        TokenDelta,
        TrainerJobInfo,
        TrainingProfile,
        WeightSyncResult,
    )
    from fireworks_training.tito.rendering.chat_template import ChatTemplateRenderer
    from fireworks_training.tito.sidecar import TITOSidecar
    from fireworks_training.tito.values.errors import TITOError
    from fireworks_training.tito.values.records import TITOTrajectoryArtifact
    from fireworks_training.usage import RunUsage, Usage

_HEAVY = {
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
    "TITOError": "tito",
    "TITOSidecar": "tito",
    "TITOTrajectoryArtifact": "tito",
    "RunUsage": "usage",
    "Usage": "usage",
    "read_usage_records": "_async.resources.usage_records",
    "SaveWeightsForSamplerResponse": "_tinker_types",
    "TokenStream": "_async.sampling.token_stream",
    **dict.fromkeys(
        (
            "AckEvent",
            "Event",
            "FailureEvent",
            "FinishEvent",
            "LoopBlockedEvent",
            "OnEvent",
            "RetryEvent",
            "SubmitEvent",
            "SwapEvent",
            "SyncEvent",
            "WindowEvent",
        ),
        "events",
    ),
}
_LIGHT = ("errors", "models", "futures", "config", "data", "evaluation")

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
    "LoopBlockedEvent",
    "LossFailed",
    "MissingExtra",
    "ModelInfo",
    "NotFound",
    "NotSupported",
    "Observation",
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


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name in __all__:
            for home in (_HEAVY[name],) if name in _HEAVY else _LIGHT:
                module = importlib.import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    globals()[name] = value = getattr(module, name)
                    return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
