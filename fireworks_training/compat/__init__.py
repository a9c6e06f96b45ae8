"""The names of the Fireworks training SDK, for scripts that were written for it.

Import `X` from `fireworks_training.compat` in place of `fireworks.training.sdk`: the managers,
configurations and schedules, which stand here alone, and everything else under the name it has
there. All of it is thin over this package's core, so a script may mix both.

`CONTRACTS` names the versions that this was tested with; `README.md` beside this file lists what
differs, and says what each module does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Literal

from fireworks_training import tito
from fireworks_training.config import CleanUp as DeploymentCleanupOnClose

if TYPE_CHECKING:
    from tinker import types
    from tinker.types import (
        Datum,
        EncodedTextChunk,
        ForwardBackwardOutput,
        LoraConfig,
        ModelInput,
        ModelInputChunk,
        OptimStepResponse,
        SamplingParams,
        StopReason,
        TensorData,
    )
    from tinker.types import SampledSequence as FiretitanSampledSequence
    from tinker.types import SampleResponse as FiretitanSampleResponse
    from tinker.types import SamplingParams as FiretitanSamplingParams

    from fireworks_training import (
        AdaptiveConcurrencyController,
        APIFuture,
        DeploymentInfo,
        DeploymentSampler,
        DeploymentSamplerTimeoutError,
        FiretitanProvisioningConfig,
        FiretitanSamplingClient,
        FixedConcurrencyController,
        SampledCompletion,
        SamplingClientClosedError,
        SamplingConcurrencyController,
        SamplingRequestError,
        SaveSamplerResult,
        ServerMetrics,
    )
    from fireworks_training._tinker_types import AdamParams
    from fireworks_training.compat.client import (
        FireworksClient,
        ModelDetailsUnavailableError,
        TrainingShapeProfile,
        validate_output_model_id,
    )
    from fireworks_training.compat.deployment import DeploymentConfig, DeploymentManager
    from fireworks_training.compat.hot_loads import (
        DEFAULT_CHECKSUM_FORMAT,
        DEFAULT_DELTA_COMPRESSION,
    )
    from fireworks_training.compat.schedules import (
        ConstantSchedule,
        CosineSchedule,
        LinearSchedule,
        LRSchedulerSpec,
        WSDSchedule,
        compute_lr,
        default_constant_schedule,
        has_v1_scheduler_fields,
        normalize_lr_scheduler_spec,
        parse_lr_scheduler_spec,
    )
    from fireworks_training.compat.service import FiretitanServiceClient
    from fireworks_training.compat.trainer import (
        CreatedTrainerJob,
        TrainerJobManager,
        TrainerServiceEndpoint,
    )
    from fireworks_training.compat.trainer_config import TrainerJobConfig
    from fireworks_training.compat.training import (
        DEFAULT_MERGED_BASE_EXPORT_PRECISION,
        ExportPrecision,
        FiretitanTrainingClient,
        GradAccNormalization,
        GradNormMetricsMode,
    )
    from fireworks_training.compat.weight_syncer import WeightSyncer
    from fireworks_training.errors import ApiError as APIError
    from fireworks_training.errors import ApiError as TrainingAPIError
    from fireworks_training.errors import ApiStatusError as APIStatusError
    from fireworks_training.errors import ConnectionFailed as APIConnectionError
    from fireworks_training.errors import FireworksTrainingError as TrainingError
    from fireworks_training.errors import RequestFailed as RequestFailedError
    from fireworks_training.errors import RequestTimedOut as APITimeoutError
    from fireworks_training.tito import *  # noqa: F403 - its names are listed there

    SamplingClient = FiretitanSamplingClient
    ServiceClient = FiretitanServiceClient
    TrainingClient = FiretitanTrainingClient

CONTRACTS = {"fireworks-ai": "1.2.30", "tinker": "0.38.0"}
"""Versions of the SDKs whose contracts this package was tested with."""

CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE: Literal["delete"] = "delete"
CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO: Literal["scale_to_zero"] = "scale_to_zero"

_HERE = {
    "client": (
        "FireworksClient",
        "ModelDetailsUnavailableError",
        "TrainingShapeProfile",
        "validate_output_model_id",
    ),
    "deployment": ("DeploymentConfig", "DeploymentManager"),
    "hot_loads": ("DEFAULT_CHECKSUM_FORMAT", "DEFAULT_DELTA_COMPRESSION"),
    "schedules": (
        "ConstantSchedule",
        "CosineSchedule",
        "LRSchedulerSpec",
        "LinearSchedule",
        "WSDSchedule",
        "compute_lr",
        "default_constant_schedule",
        "has_v1_scheduler_fields",
        "normalize_lr_scheduler_spec",
        "parse_lr_scheduler_spec",
    ),
    "trainer": ("CreatedTrainerJob", "TrainerJobManager", "TrainerServiceEndpoint"),
    "trainer_config": ("TrainerJobConfig",),
    "service": ("FiretitanServiceClient",),
    "training": (
        "DEFAULT_MERGED_BASE_EXPORT_PRECISION",
        "ExportPrecision",
        "FiretitanTrainingClient",
        "GradAccNormalization",
        "GradNormMetricsMode",
    ),
    "weight_syncer": ("WeightSyncer",),
}
"""The names that are defined in this folder, by module."""

_RENAMED = {
    "APIConnectionError": "ConnectionFailed",
    "APIError": "ApiError",
    "APIStatusError": "ApiStatusError",
    "APITimeoutError": "RequestTimedOut",
    "FiretitanSampleResponse": "SampleResponse",
    "FiretitanSampledSequence": "SampledSequence",
    "FiretitanSamplingParams": "SamplingParams",
    "RequestFailedError": "RequestFailed",
    "SamplingClient": "FiretitanSamplingClient",
    "ServiceClient": "FiretitanServiceClient",
    "TrainingAPIError": "ApiError",
    "TrainingClient": "FiretitanTrainingClient",
    "TrainingError": "FireworksTrainingError",
}
"""Names of the official SDK, each with the name here or in `tinker` that stands for it."""

__all__ = [
    "CLEANUP_DEPLOYMENT_ON_CLOSE_DELETE",
    "CLEANUP_DEPLOYMENT_ON_CLOSE_SCALE_TO_ZERO",
    "CONTRACTS",
    "DEFAULT_CHECKSUM_FORMAT",
    "DEFAULT_DELTA_COMPRESSION",
    "DEFAULT_MERGED_BASE_EXPORT_PRECISION",
    "APIConnectionError",
    "APIError",
    "APIFuture",
    "APIStatusError",
    "APITimeoutError",
    "AdamParams",
    "AdaptiveConcurrencyController",
    "ConstantSchedule",
    "CosineSchedule",
    "CreatedTrainerJob",
    "Datum",
    "DeploymentCleanupOnClose",
    "DeploymentConfig",
    "DeploymentInfo",
    "DeploymentManager",
    "DeploymentSampler",
    "DeploymentSamplerTimeoutError",
    "EncodedTextChunk",
    "ExportPrecision",
    "FiretitanProvisioningConfig",
    "FiretitanSampleResponse",
    "FiretitanSampledSequence",
    "FiretitanSamplingClient",
    "FiretitanSamplingParams",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "FireworksClient",
    "FixedConcurrencyController",
    "ForwardBackwardOutput",
    "GradAccNormalization",
    "GradNormMetricsMode",
    "LRSchedulerSpec",
    "LinearSchedule",
    "LoraConfig",
    "ModelDetailsUnavailableError",
    "ModelInput",
    "ModelInputChunk",
    "OptimStepResponse",
    "RequestFailedError",
    "SampledCompletion",
    "SamplingClient",
    "SamplingClientClosedError",
    "SamplingConcurrencyController",
    "SamplingParams",
    "SamplingRequestError",
    "SaveSamplerResult",
    "ServerMetrics",
    "ServiceClient",
    "StopReason",
    "TensorData",
    "TrainerJobConfig",
    "TrainerJobManager",
    "TrainerServiceEndpoint",
    "TrainingAPIError",
    "TrainingClient",
    "TrainingError",
    "TrainingShapeProfile",
    "WSDSchedule",
    "WeightSyncer",
    "compute_lr",
    "default_constant_schedule",
    "has_v1_scheduler_fields",
    "normalize_lr_scheduler_spec",
    "parse_lr_scheduler_spec",
    "types",
    "validate_output_model_id",
]
__all__ += tito.__all__


def _find(name: str) -> Any:
    name = _RENAMED.get(name, name)
    for home, names in _HERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    if name == "AdamParams":
        return getattr(importlib.import_module("fireworks_training._tinker_types"), name)
    if name in tito.__all__:
        return getattr(tito, name)
    root = importlib.import_module("fireworks_training")
    if name in root.__all__:
        return getattr(root, name)
    types_ = importlib.import_module("tinker.types")
    return types_ if name == "types" else getattr(types_, name)


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value = _find(name)
        return value


def __dir__() -> list[str]:
    return __all__
