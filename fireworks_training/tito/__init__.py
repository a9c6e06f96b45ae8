"""Serves agents an OpenAI-compatible endpoint that keeps the tokens as they were sampled.

An agent that exchanges text with a model loses the tokens: text tokenizes otherwise than it was
sampled, and a loss on such tokens trains on what the policy never sampled. `TITOSidecar` (token in,
token out) stands between the two: agents send chat messages, the deployment gets token ids, and
each trajectory leaves an artifact with tokens, logprobs and loss masks.

Names are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fireworks_training.tito.evidence.debug_log import TITOLocalDebugConfig, TITOLocalDebugSink
    from fireworks_training.tito.evidence.failure_traces import (
        TITOFailureTraceConfig,
        dump_tito_failure_trace,
    )
    from fireworks_training.tito.evidence.journal import TITOEventObserver
    from fireworks_training.tito.rendering.chat_template import ChatTemplateRenderer
    from fireworks_training.tito.rendering.renderers import (
        TITOIncrementalPrompt,
        TITOIncrementalRenderer,
        TITORenderer,
    )
    from fireworks_training.tito.sidecar import TITOSidecar
    from fireworks_training.tito.values.errors import TITOError, TITOParseError
    from fireworks_training.tito.values.messages import normalize_openai_tool_arguments
    from fireworks_training.tito.values.metrics import TITODistribution, TITOMetricSummary
    from fireworks_training.tito.values.records import (
        TITOCallRecord,
        TITOCallResult,
        TITOMalformedAnswers,
        TITOPromptMode,
        TITOResponseAttempt,
        TITOSegmentResult,
        TITOTrajectoryArtifact,
        TITOTrajectoryEndpoint,
        TITOTurn,
        TrajectoryDriftPolicy,
    )
    from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant

_HOMES = (
    *("values.errors", "values.messages", "values.metrics", "values.records", "values.requests"),
    *("rendering.chat_template", "rendering.renderers"),
    *("evidence.debug_log", "evidence.failure_traces", "evidence.journal"),
    "sidecar",
)
"""The modules that define the names of `__all__`."""

__all__ = [
    "ChatTemplateRenderer",
    "TITOCallRecord",
    "TITOCallResult",
    "TITOChatRequest",
    "TITODistribution",
    "TITOError",
    "TITOEventObserver",
    "TITOFailureTraceConfig",
    "TITOIncrementalPrompt",
    "TITOIncrementalRenderer",
    "TITOLocalDebugConfig",
    "TITOLocalDebugSink",
    "TITOMalformedAnswers",
    "TITOMetricSummary",
    "TITOParseError",
    "TITOParsedAssistant",
    "TITOPromptMode",
    "TITORenderer",
    "TITOResponseAttempt",
    "TITOSegmentResult",
    "TITOSidecar",
    "TITOTrajectoryArtifact",
    "TITOTrajectoryEndpoint",
    "TITOTurn",
    "TrajectoryDriftPolicy",
    "dump_tito_failure_trace",
    "normalize_openai_tool_arguments",
]


if not TYPE_CHECKING:  # a checker that saw it would take every misspelt name for Any

    def __getattr__(name: str) -> Any:
        for home in _HOMES if name in __all__ else ():
            module = importlib.import_module(f"{__name__}.{home}")
            if hasattr(module, name):
                globals()[name] = value = getattr(module, name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
