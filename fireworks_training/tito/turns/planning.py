"""Prepares a turn: its prompt, how that stands to the tokens so far, and what may be sampled.

It asks the renderer and `lineage`; it changes nothing, so that a call that fails later leaves the
trajectory as it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireworks_training.models import SampledCompletion, SampledRequestResult
from fireworks_training.tito.rendering.renderers import TITOIncrementalPrompt
from fireworks_training.tito.turns.backend import Backend, Budget
from fireworks_training.tito.turns.lineage import (
    Placement,
    break_reason,
    fresh,
    history_of,
    joined,
    placed,
    rewrite_kind,
)
from fireworks_training.tito.values.errors import DISCARD, TITOError
from fireworks_training.tito.values.metrics import Measured
from fireworks_training.tito.values.records import TITOTurn, TrajectoryDriftPolicy
from fireworks_training.tito.values.requests import TITOChatRequest


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """A turn before it is sampled.

    Attributes:
        join: how an incremental prompt was made; None for one of all messages.
        fallback_reason: why an incremental one was not made, where it was wanted.
    """

    request: TITOChatRequest
    contract: str
    prompt_ids: tuple[int, ...]
    placement: Placement
    budget: Budget
    join: TITOIncrementalPrompt | None = None
    fallback_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a trajectory stands: its last turn, if any, that turn's contract, and its policy."""

    last: TITOTurn | None
    contract: str
    policy: TrajectoryDriftPolicy


async def planned(
    backend: Backend,
    standing: Standing,
    request: TITOChatRequest,
    contract: str,
    measured: Measured,
) -> TurnPlan:
    """The next turn of a trajectory.

    Raises:
        TITOError: it drifts and the policy rejects that (409), or does not fit the context (400).
    """
    last = standing.last
    join, fallback = None, None
    if last is None:
        prompt = await backend.rendered(request)
        placement = Placement("new_segment", reason="initial")
    elif reason := break_reason(last, standing.contract, contract, request.messages):
        measured.count(f"lineage/boundary_reason_{reason}")
        if reason == "history_rewrite":
            measured.count(f"lineage/history_rewrite_{rewrite_kind(last, request.messages)}")
        placement = fresh(reason, standing.policy)
        prompt = await backend.rendered(request)
        fallback = reason if backend.incremental else None
    else:
        if backend.incremental:
            join = await backend.joined(request, history_of(last), last.exact_checkpoint_ids)
            fallback = None if join is not None else "renderer_declined"
        if join is not None:
            prompt, placement = join.prompt_ids, joined(last, join)
        else:
            prompt = await backend.rendered(request)
            placement = placed(last, prompt, standing.policy)
    return TurnPlan(
        request,
        contract,
        prompt,
        placement,
        backend.budget(request, len(prompt)),
        join,
        fallback,
    )


def checked(plan: TurnPlan, sampled: SampledRequestResult) -> SampledCompletion:
    """The completion of a plan, if it is one.

    Raises:
        TITOError: its tokens are not what was asked for; the trajectory is to be discarded (422).
    """
    if len(sampled.completions) != 1:
        raise _mismatch("completions", f"{len(sampled.completions)} completions came, not one")
    completion = sampled.completions[0]
    if tuple(completion.prompt_tokens) != plan.prompt_ids:
        raise _mismatch("prompt", "the deployment reports another prompt than was sent")
    count = len(completion.completion_tokens)
    if not count or count != completion.completion_len:
        raise _mismatch("count", f"{count} tokens came, reported as {completion.completion_len}")
    if count > plan.budget.effective:
        raise _mismatch("budget", f"{count} tokens came, {plan.budget.effective} were asked for")
    rows = (completion.inference_logprobs, completion.sampling_logprobs, completion.top_logprobs)
    if any(row is not None and len(row) != count for row in rows):
        raise _mismatch("alignment", "the logprobs are not one a token")
    return completion


def _mismatch(what: str, message: str) -> TITOError:
    return TITOError(
        "tito_sdk_sampling_parse_error",
        422,
        f"{message}{DISCARD}",
        origin="sdk_parser",
        discard_trajectory=True,
        context={"validation_error_code": what},
    )
