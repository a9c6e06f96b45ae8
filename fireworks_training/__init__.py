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
    from fireworks_training._async.gate import (
        AdaptiveConcurrencyController,
        FixedConcurrencyController,
        SamplingConcurrencyController,
    )
    from fireworks_training._async.reaper import AsyncResourceLedger
    from fireworks_training._async.sampler import DeploymentSampler
    from fireworks_training._async.sampling_client import FiretitanSamplingClient
    from fireworks_training._async.service import AsyncFiretitanServiceClient
    from fireworks_training._async.token_stream import TokenStream
    from fireworks_training._async.trainer import AsyncFiretitanTrainingClient
    from fireworks_training._async.usage import RunUsage, Usage
    from fireworks_training._async.usage_records import read_usage_records
    from fireworks_training._core.events import (
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
    from fireworks_training._sync.control_plane.client import ControlPlane
    from fireworks_training._sync.reaper import ResourceLedger
    from fireworks_training._sync.service import FiretitanServiceClient
    from fireworks_training._sync.trainer import FiretitanTrainingClient
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
    from fireworks_training.futures import APIFuture, SampleCall
    from fireworks_training.models import (
        CheckpointInfo,
        DeploymentInfo,
        HeldResource,
        Look,
        ModelInfo,
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
    from fireworks_training.tito.chat_template import ChatTemplateRenderer
    from fireworks_training.tito.errors import TITOError
    from fireworks_training.tito.records import TITOTrajectoryArtifact
    from fireworks_training.tito.sidecar import TITOSidecar

_HEAVY = {
    "AdaptiveConcurrencyController": "_async.gate",
    "AsyncControlPlane": "_async.control_plane.client",
    "AsyncFiretitanServiceClient": "_async.service",
    "AsyncFiretitanTrainingClient": "_async.trainer",
    "AsyncResourceLedger": "_async.reaper",
    "ChatTemplateRenderer": "tito",
    "ControlPlane": "_sync.control_plane.client",
    "DeploymentSampler": "_async.sampler",
    "FiretitanSamplingClient": "_async.sampling_client",
    "FiretitanServiceClient": "_sync.service",
    "FiretitanTrainingClient": "_sync.trainer",
    "FixedConcurrencyController": "_async.gate",
    "ResourceLedger": "_sync.reaper",
    "SamplingConcurrencyController": "_async.gate",
    "TITOError": "tito",
    "TITOSidecar": "tito",
    "TITOTrajectoryArtifact": "tito",
    "RunUsage": "_async.usage",
    "Usage": "_async.usage",
    "read_usage_records": "_async.usage_records",
    "SaveWeightsForSamplerResponse": "_tinker_types",
    "TokenStream": "_async.token_stream",
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
        "_core.events",
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
    "Look",
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
