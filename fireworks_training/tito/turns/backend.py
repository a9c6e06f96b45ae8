"""Holds what all trajectories of a sidecar share: sampler, renderer, limits and sampling options.

It turns requests into prompts and options. It does not know trajectories: `planning` decides how a
prompt follows the one before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast, get_args

from fireworks_training._checks import one_of
from fireworks_training._wire.completions.request import check_names
from fireworks_training.errors import InvalidArgument, UsageError
from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.tito.evidence.journal import Journal
from fireworks_training.tito.rendering.renderers import (
    TITOIncrementalPrompt,
    TITOIncrementalRenderer,
    TITORenderer,
)
from fireworks_training.tito.values.errors import (
    DISCARD,
    TITOError,
    TITOParseError,
    invalid,
    safe_text,
)
from fireworks_training.tito.values.records import TITOMalformedAnswers, TITOPromptMode
from fireworks_training.tito.values.requests import TITOChatRequest, TITOParsedAssistant

logger = logging.getLogger("fireworks_training.tito")

T = TypeVar("T")

AFFINITY = ("prompt_cache_key", "prompt_cache_isolation_key")
"""Options that mark calls as belonging together: set for a trajectory, never by the agent."""

INTERNAL = (
    *("additional_headers_snapshot", "logical_request_id", "max_seq_len", "n", "echo"),
    *("echo_last", "http_timeout", "sampling_context", "timeout_diagnostic_context"),
    *("ignore_eos", "prompt", "stream", "raw_output", "perf_metrics_in_response"),
)
"""Options that the sidecar sets itself, or that would break a turn."""

Classifier = Callable[[TITOChatRequest], Any]


class ExactTokenSampler(Protocol):
    """Names what the sidecar needs of a sampler; `DeploymentSampler` has it."""

    @property
    def model(self) -> str:
        """Model string for the answers."""
        ...

    @property
    def sample_with_prompt_tokens_result(self) -> Callable[..., Awaitable[SampledRequestResult]]:
        """Samples one completion of token ids."""
        ...


@dataclass(frozen=True, slots=True)
class Budget:
    """Holds the tokens that a call asks for, those that it may sample, and the room left."""

    requested: int
    effective: int
    remaining: int


class Backend:
    """Holds a sampler and a renderer with their limits; the arguments are `TITOSidecar`'s."""

    def __init__(
        self,
        sampler: ExactTokenSampler,
        renderer: TITORenderer,
        *,
        max_context_tokens: int,
        max_output_tokens: int,
        call_classifier: Classifier | None,
        sampling_defaults: Mapping[str, Any],
        headers: Mapping[str, str],
        prompt_mode: TITOPromptMode,
        malformed_answers: TITOMalformedAnswers,
        journal: Journal,
    ) -> None:
        if max_context_tokens < 2 or max_output_tokens < 1:
            raise InvalidArgument(
                "max_context_tokens must be at least 2 and max_output_tokens at least 1, got "
                f"{max_context_tokens} and {max_output_tokens}"
            )
        if not isinstance(renderer, TITORenderer):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidArgument(
                "a renderer has renderer_id, render_conversation_tokens(), parse_assistant(), "
                f"render_contract_id() and stop_sequences(); {type(renderer).__name__} lacks some"
            )
        one_of("prompt_mode", prompt_mode, ("full_history", "incremental"))
        one_of("malformed_answers", malformed_answers, get_args(TITOMalformedAnswers))
        incremental = prompt_mode == "incremental"
        if incremental and not isinstance(renderer, TITOIncrementalRenderer):
            raise InvalidArgument(
                "prompt_mode='incremental' needs a renderer with prepare_incremental_prompt(); "
                f"{type(renderer).__name__} has none"
            )
        defaults = dict(sampling_defaults)
        self._temperature: float | None = defaults.pop("temperature", None)
        _check_defaults(defaults)
        self.sampler = sampler
        self.journal = journal
        self.max_context_tokens = max_context_tokens
        self.max_output_tokens = max_output_tokens
        self.incremental = incremental
        self._keep_malformed = malformed_answers == "content"
        self._renderer: Any = renderer
        self._classifier = call_classifier
        self._defaults = defaults
        self._headers = dict(headers)
        # One thread: renderers and tokenizers refuse use from two at once.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tito-render")

    def classified(self, request: TITOChatRequest) -> tuple[str, str]:
        """Classify a call as "policy" or "auxiliary"; gives also the source of the decision.

        A call whose classifier fails counts as one of the policy: rather a turn too many than one
        whose tokens are lost. The log reports it, without the request.
        """
        if self._classifier is None:
            return "policy", "default"
        try:
            given = self._classifier(request)
        except Exception as error:
            return self._unclassified(f"raised {type(error).__name__}")
        answer = cast(tuple[object, ...], given) if isinstance(given, tuple) else (given, "adapter")
        if len(answer) == 2 and answer[0] in ("policy", "auxiliary") and answer[1]:
            return str(answer[0]), str(answer[1])
        return self._unclassified("gave neither 'policy' nor 'auxiliary'")

    @staticmethod
    def _unclassified(why: str) -> tuple[str, str]:
        logger.warning("call_classifier %s; the call counts as one of the policy", why)
        return "policy", "classifier_failed"

    async def contract(self, request: TITOChatRequest) -> str:
        """Ask the renderer for the name of its way of rendering this request."""
        return str(await self._rendering(self._renderer.render_contract_id, request))

    async def rendered(self, request: TITOChatRequest) -> tuple[int, ...]:
        """Render all messages into a prompt."""
        render = self._renderer.render_conversation_tokens
        ids = tuple(int(i) for i in await self._rendering(render, request))
        if not ids:
            raise TITOError("tito_renderer_contract_error", 500, "the renderer gave no tokens")
        return ids

    async def joined(
        self,
        request: TITOChatRequest,
        stored: Sequence[Mapping[str, Any]],
        checkpoint: Sequence[int],
    ) -> TITOIncrementalPrompt | None:
        """Append the new messages to the exact tokens; None where the renderer declines or fails.

        All messages are rendered then, which finds out whether the request itself is at fault.
        """
        join = self._renderer.prepare_incremental_prompt
        new = request.messages[len(stored) :]
        try:
            made: TITOIncrementalPrompt | None = await self._in_worker(
                join, request, stored, new, checkpoint
            )
        except TITOError:
            raise
        except Exception as error:
            logger.warning(
                "the renderer failed to join new messages (%s); all are rendered instead",
                safe_text(error),
            )
            return None
        return made

    async def parsed(
        self, request: TITOChatRequest, completion: SampledCompletion
    ) -> TITOParsedAssistant:
        """Parse a completion into a message; a malformed one into its text, where that is wanted.

        Raises:
            TITOError: the parser failed, or the completion is malformed and its trajectory is to be
                discarded (422).
        """
        ids = list(completion.completion_tokens)
        parse = self._renderer.parse_assistant
        try:
            message: TITOParsedAssistant = await self._in_worker(
                parse, request, ids, completion.text, completion.finish_reason
            )
        except Exception as error:
            known = isinstance(error, TITOParseError)
            if isinstance(error, TITOParseError) and self._keep_malformed:
                text = {"role": "assistant", "content": completion.text}
                kind = f"malformed:{error.reason_code}"
                return TITOParsedAssistant(text, output_kind=kind, parser_fallback=True)
            raise TITOError(
                "tito_sdk_parse_error" if known else "tito_sdk_parser_internal_error",
                422,
                "the renderer could not read the sampled tokens as a message "
                f"({safe_text(error)}){DISCARD}",
                origin="sdk_parser",
                discard_trajectory=True,
                context={
                    "parser_error_type": type(error).__name__,
                    "parser_reason_code": getattr(error, "reason_code", "unclassified"),
                    "finish_reason": completion.finish_reason,
                    "completion_tokens": completion.completion_len,
                },
            ) from error
        return message

    def budget(self, request: TITOChatRequest, prompt_tokens: int) -> Budget:
        """Compute how many tokens may be sampled after a prompt.

        Raises:
            TITOError: the prompt fills the context (400).
        """
        remaining = self.max_context_tokens - prompt_tokens
        if remaining <= 0:
            raise TITOError(
                "tito_context_overflow",
                400,
                f"the prompt has {prompt_tokens} tokens, and the context takes "
                f"{self.max_context_tokens}: end the trajectory, or shorten the history",
                context={"prompt_tokens": prompt_tokens},
            )
        requested = self.max_output_tokens if request.max_tokens is None else request.max_tokens
        return Budget(requested, min(requested, self.max_output_tokens, remaining), remaining)

    def options(self, request: TITOChatRequest) -> dict[str, Any]:
        """Combine the options of the sampling; the sidecar's own override the agent's.

        Raises:
            TITOError: an option is unknown, or the agent may not set it (400).
        """
        ours = ("stop", "logprobs", "tool_choice")
        asked = {n: v for n, v in request.sampling_fields.items() if n not in ours}
        if taken := [name for name in AFFINITY if name in asked]:
            raise invalid(
                f"{', '.join(taken)}: which calls belong together is the trajectory's to say; "
                "leave it out",
                code="tito_affinity_override",
            )
        if taken := [name for name in INTERNAL if name in asked]:
            raise invalid(
                f"{', '.join(taken)}: set by the sidecar; leave it out",
                code="tito_invalid_sampling_field",
            )
        try:
            check_names(asked)
        except UsageError as error:
            raise invalid(str(error), code="tito_invalid_sampling_field") from error
        options = {**asked, **self._defaults, "logprobs": True}
        options["temperature"] = (
            request.temperature if self._temperature is None else self._temperature
        )
        if self._headers:
            options["additional_headers_snapshot"] = self._headers
        return options

    async def stop(self, request: TITOChatRequest) -> list[str] | None:
        """Join the strings that end the answer, the renderer's and the agent's; None without."""
        stops = list(await self._rendering(self._renderer.stop_sequences, request) or ())
        if not all(isinstance(one, str) for one in stops):
            raise TITOError(
                "tito_renderer_contract_error", 500, "the renderer's stop sequences are no strings"
            )
        return list(dict.fromkeys((*stops, *request.stop))) or None

    async def token_texts(self, completion: SampledCompletion) -> list[str]:
        """Decode tokens one by one; "token_id:ID" where the renderer has no `token_texts`."""
        ids = list(completion.completion_tokens)
        if (decode := getattr(self._renderer, "token_texts", None)) is None:
            return [f"token_id:{token}" for token in ids]
        return list(await self._rendering(decode, ids))

    def close(self) -> None:
        """Stop the worker thread."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _in_worker(self, work: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, *arguments)

    async def _rendering(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            return await self._in_worker(work, *arguments)
        except TITOError:
            raise
        except Exception as error:
            # Its text may hold a prompt.
            raise TITOError(
                "tito_render_error",
                400,
                f"the renderer can't render this request ({safe_text(error)}): send messages "
                "that the model's chat template takes",
                context={"renderer_error_type": type(error).__name__},
            ) from error


def _check_defaults(defaults: Mapping[str, Any]) -> None:
    if owned := [name for name in (*AFFINITY, *INTERNAL) if name in defaults]:
        raise InvalidArgument(f"sampling_defaults may not set {', '.join(owned)}")
    check_names(defaults)
