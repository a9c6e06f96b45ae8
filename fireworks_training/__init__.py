"""Train a language model on a remote trainer, hot-load its snapshots, sample from them.

Everything public stands here. Names are loaded when they are first used, so that importing the
package costs next to nothing; type checkers see the real imports.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fireworks_training.models import __version__

if TYPE_CHECKING:
    from fireworks_training._async.gate import (
        AdaptiveConcurrencyController,
        FixedConcurrencyController,
        SamplingConcurrencyController,
    )
    from fireworks_training._async.sampler import DeploymentSampler
    from fireworks_training._async.service import AsyncFiretitanServiceClient
    from fireworks_training._async.trainer import AsyncFiretitanTrainingClient
    from fireworks_training._sync.service import FiretitanServiceClient
    from fireworks_training._sync.trainer import FiretitanTrainingClient
    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse
    from fireworks_training.config import ProvisioningConfig as FiretitanProvisioningConfig
    from fireworks_training.config import ProvisioningOptions
    from fireworks_training.data import rl_datum, supervised_datum
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
        WeightSyncError,
        WrongLoop,
    )
    from fireworks_training.futures import APIFuture, SampleCall
    from fireworks_training.models import (
        DeploymentInfo,
        ReplicaStatus,
        SampledCompletion,
        ServerMetrics,
        Snapshot,
        TrainerJobInfo,
        TrainingProfile,
    )

_HOMES: dict[str, tuple[str, ...]] = {
    "_sync.service": ("FiretitanServiceClient",),
    "_sync.trainer": ("FiretitanTrainingClient",),
    "_async.service": ("AsyncFiretitanServiceClient",),
    "_async.trainer": ("AsyncFiretitanTrainingClient",),
    "_async.sampler": ("DeploymentSampler",),
    "_async.gate": (
        "AdaptiveConcurrencyController",
        "FixedConcurrencyController",
        "SamplingConcurrencyController",
    ),
    "config": ("FiretitanProvisioningConfig", "ProvisioningOptions"),
    "data": ("rl_datum", "supervised_datum"),
    "futures": ("APIFuture", "SampleCall"),
    "models": (
        "DeploymentInfo",
        "ReplicaStatus",
        "SampledCompletion",
        "ServerMetrics",
        "Snapshot",
        "TrainerJobInfo",
        "TrainingProfile",
    ),
    "_tinker_types": ("SaveWeightsForSamplerResponse",),
    "errors": (
        "ApiError",
        "ApiStatusError",
        "AuthenticationFailed",
        "ClientClosed",
        "Conflict",
        "ConnectionFailed",
        "DeploymentSamplerTimeoutError",
        "FireworksTrainingError",
        "GradientsInDoubt",
        "HotLoadFailed",
        "HotLoadTimeout",
        "InvalidArgument",
        "InvalidDatum",
        "LocalPlatformError",
        "LossFailed",
        "MissingExtra",
        "NotFound",
        "NotSupported",
        "OperationCancelled",
        "OperationError",
        "OwnerLoopGone",
        "PrecedingOperationFailed",
        "ProtocolError",
        "ProvisioningError",
        "ProvisioningTimeout",
        "RateLimited",
        "RequestFailed",
        "RequestTimedOut",
        "SamplingClientClosedError",
        "SamplingError",
        "SamplingRequestError",
        "ServerFailed",
        "SessionEnded",
        "SessionLost",
        "TrainerLost",
        "UnknownOption",
        "UsageError",
        "WeightSyncError",
        "WrongLoop",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SPELT = {"FiretitanProvisioningConfig": "ProvisioningConfig"}

__all__ = [  # noqa: PLE0604 - one list, above; a test compares it with the imports for type checkers
    "__version__",
    *sorted(_HOME_OF),
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), _SPELT.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
