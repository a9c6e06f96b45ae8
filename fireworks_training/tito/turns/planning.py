"""Plans a turn: its prompt, how that follows the tokens so far, and how much may be sampled.

It asks the renderer and `lineage`. It changes nothing, so that a call that fails later leaves the
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
    history_of,
    new_segment,
    place_joined,
    place_rendered,
    rewrite_kind,
)
from fireworks_training.tito.values.errors import DISCARD, TITOError
from fireworks_training.tito.values.metrics import RunningMetrics
from fireworks_training.tito.values.records import TITOTurn, TrajectoryDriftPolicy
from fireworks_training.tito.values.requests import TITOChatRequest


@dataclass(frozen=True, slots=True)
class TurnPlan:
    """Holds a turn before it is sampled.

    Attributes:
        join: how an incremental prompt was made; None for one of all messages.
        fallback_reason: why an incremental prompt was not made, where it was wanted.
    """

    request: TITOChatRequest
    contract: str
    prompt_ids: tuple[int, ...]
    placement: Placement
    budget: Budget
    join: TITOIncrementalPrompt | None = None
    fallback_reason: str | None = None


@dataclass(frozen=True, slots=True)
class SegmentTip:
    """Holds a trajectory's last turn, if any, with its contract, and the trajectory's policy."""

    last: TITOTurn | None
    contract: str
    policy: TrajectoryDriftPolicy


async def plan_turn(
    backend: Backend,
    tip: SegmentTip,
    request: TITOChatRequest,
    contract: str,
    measured: RunningMetrics,
) -> TurnPlan:
    """Plan the next turn of a trajectory.

    Raises:
        TITOError: the prompt drifts and the policy rejects that (409), or it does not fit the
            context (400).
    """
    last = tip.last
    join, fallback = None, None
    if last is None:
        prompt = await backend.rendered(request)
        placement = Placement("new_segment", reason="initial")
    elif reason := break_reason(last, tip.contract, contract, request.messages):
        measured.count(f"lineage/boundary_reason_{reason}")
        if reason == "history_rewrite":
            measured.count(f"lineage/history_rewrite_{rewrite_kind(last, request.messages)}")
        placement = new_segment(reason, tip.policy)
        prompt = await backend.rendered(request)
        fallback = reason if backend.incremental else None
    else:
        request = request.continuing(last.request, last.assistant)
        if backend.incremental:
            join = await backend.joined(request, history_of(last), last.exact_checkpoint_ids)
            fallback = None if join is not None else "renderer_declined"
        if join is not None:
            prompt, placement = join.prompt_ids, place_joined(last, join)
        else:
            prompt = await backend.rendered(request)
            placement = place_rendered(last, prompt, tip.policy)
    return TurnPlan(
        request,
        contract,
        prompt,
        placement,
        backend.budget(request, len(prompt)),
        join,
        fallback,
    )


def check_completion(plan: TurnPlan, sampled: SampledRequestResult) -> SampledCompletion:
    """Check that a sampled completion belongs to its plan.

    Raises:
        TITOError: its tokens do not fit the plan; the trajectory is to be discarded (422).
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
