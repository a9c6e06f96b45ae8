"""Builds datums from tokens, completions and chats, owns the shift by one, and checks datums.

A causal model predicts token t+1 from the tokens up to t: of a sequence of N tokens the model input
is the first N-1, the targets are the last N-1, and every per-token array is that of the target.
The builders take arrays in the caller's terms (one entry a token) and check lengths and values;
which losses there are is the trainer's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

from fireworks_training.errors import InvalidArgument, InvalidDatum

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tinker

    from fireworks_training.models import SampledCompletion

SHIFTS = (-2, -1, 1, 2)
"""Lists the misalignments that `check_alignment` looks for, in tokens."""

CLEARLY = 4.0
"""A shifted comparison counts as a misalignment if it is this many times nearer."""

AVERAGED = 2.0
"""Weights whose magnitudes sum to at most this, over many tokens, have been divided by a count."""


class ChatTokenizer(Protocol):
    """A tokenizer as `chat_datum` needs it; those of `transformers` fit."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """Turns messages into token ids."""
        ...


def supervised_datum(tokens: Sequence[int], weights: Sequence[float]) -> tinker.Datum:
    """Build a datum for cross_entropy from tokens and weights.

    Args:
        tokens: N token ids, prompt and completion; N >= 2.
        weights: N weights, entry t for predicting token t; 0 for the prompt. The first is without
            effect, since nothing predicts the first token.

    Returns:
        A datum of N-1 positions with `target_tokens` and `weights`.

    Raises:
        InvalidDatum: the lengths differ, a weight is not finite, or fewer than two tokens.
    """
    import numpy as np

    _check_length("weights", weights, len(tokens))
    return _datum(tokens, weights=_finite("weights", np.asarray(weights[1:], np.float32)))


def rl_datum(
    prompt_tokens: Sequence[int],
    completion_tokens: Sequence[int],
    *,
    logprobs: Sequence[float],
    advantages: float | Sequence[float],
    mask: bool = False,
) -> tinker.Datum:
    """Build a datum for importance_sampling, ppo and their like from a prompt and a completion.

    Args:
        prompt_tokens: P token ids; P >= 1.
        completion_tokens: C token ids; C >= 1.
        logprobs: C natural logprobs of the completion tokens, as they were sampled; at most 0.
        advantages: one for the whole completion, or C of them. Plain: divide by group or length
            before, or let `optim_step` normalise, never both (`check_normalization` looks).
        mask: add `weights`, 1 for completion tokens and 0 for the prompt (custom losses want it).

    Returns:
        A datum of P+C-1 positions with `target_tokens`, `logprobs` and `advantages`; both arrays
        are 0 on prompt positions.

    Raises:
        InvalidDatum: lengths that differ, an empty prompt or completion, a value that is not
            finite, or a logprob above 0.
    """
    import numpy as np

    if not len(prompt_tokens) or not len(completion_tokens):
        empty = "completion" if len(prompt_tokens) else "prompt"
        raise InvalidDatum(f"the {empty} is empty: a datum needs a token of each")
    count = len(completion_tokens)
    _check_length("logprobs", logprobs, count)
    if not isinstance(advantages, (int, float)):
        _check_length("advantages", advantages, count)
    length = len(prompt_tokens) + count - 1

    def on_completion(name: str, values: float | Sequence[float]) -> npt.NDArray[np.float32]:
        array = np.zeros(length, np.float32)
        array[-count:] = values
        return _finite(name, array)

    sampled = _sampled_logprobs(on_completion("logprobs", logprobs))
    arrays = {"logprobs": sampled, "advantages": on_completion("advantages", advantages)}
    if mask:
        arrays["weights"] = on_completion("weights", 1.0)
    return _datum([*prompt_tokens, *completion_tokens], **arrays)


def rollout_datum(
    tokens: Sequence[int],
    *,
    logprobs: Sequence[float],
    loss_mask: Sequence[bool],
    advantages: float | Sequence[float],
    mask: bool = False,
) -> tinker.Datum:
    """Build a datum for importance_sampling, ppo and their like from a row of several completions.

    A segment of a `TITOTrajectoryArtifact` is such a row: completions of the policy stand between
    prompts, tool results and other tokens that it did not sample.

    Args:
        tokens: N token ids; N >= 2.
        logprobs: N natural logprobs as they were sampled, at most 0; those outside the mask are
            without effect.
        loss_mask: N entries: whether the policy sampled the token; False for the first one.
        advantages: one for all sampled tokens, or N of them.
        mask: add `weights`, 1 for sampled tokens and 0 for the others (custom losses want it).

    Returns:
        A datum of N-1 positions with `target_tokens`, `logprobs` and `advantages`; both arrays are
        0 outside the mask.

    Raises:
        InvalidDatum: lengths that differ, nothing or the first token in the mask, a value that is
            not finite, or a logprob above 0.
    """
    import numpy as np

    for name, values in (("logprobs", logprobs), ("loss_mask", loss_mask)):
        _check_length(name, values, len(tokens))
    if not isinstance(advantages, (int, float)):
        _check_length("advantages", advantages, len(tokens))
        advantages = list(advantages)[1:]
    sampled = np.asarray(loss_mask, bool)
    if not sampled[1:].any() or sampled[0]:
        raise InvalidDatum(
            "'loss_mask' must be true for a token that was sampled, and not for the first, which "
            "nothing predicts"
        )
    shares = sampled[1:].astype(np.float32)
    arrays = {
        "logprobs": _sampled_logprobs(np.where(sampled, logprobs, 0.0).astype(np.float32)[1:]),
        "advantages": _finite("advantages", shares * np.asarray(advantages, np.float32)),
    }
    return _datum(tokens, **arrays, **({"weights": shares} if mask else {}))


def completion_datum(
    completion: SampledCompletion, advantages: float | Sequence[float], *, mask: bool = False
) -> tinker.Datum:
    """Build an `rl_datum` from a completion of a sampler.

    Args:
        completion: sampled with `logprobs=True`. Its `inference_logprobs` are used: those of the
            raw model, which the trainer computes too; sample at temperature 1, without top-p and
            top-k, for them to be those that it was sampled with.
        advantages, mask: as for `rl_datum`.

    Raises:
        InvalidDatum: as `rl_datum`; or the completion has no logprobs.
    """
    logprobs = completion.inference_logprobs
    if logprobs is None:
        raise InvalidDatum("the completion has no logprobs: sample with logprobs=True")
    if completion.logprobs_echoed:
        logprobs = logprobs[completion.echoed_prompt_logprob_count :]
    return rl_datum(
        completion.prompt_tokens,
        completion.completion_tokens,
        logprobs=logprobs,
        advantages=advantages,
        mask=mask,
    )


def chat_datum(
    tokenizer: ChatTokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    train_on: Literal["last", "all"] = "last",
) -> tinker.Datum:
    """Build a datum for cross_entropy on the assistant's messages of a conversation.

    Tokens come from the tokenizer's own chat template; weights are 1 on the tokens that it adds for
    an assistant's message after its generation prompt, its end of turn included, else 0.

    Args:
        tokenizer: the model's, as `service.get_tokenizer()` gives it.
        messages: `[{"role": ..., "content": ...}, ...]`; the last one is the assistant's.
        train_on: the "last" message only, or "all" of the assistant's.

    Raises:
        InvalidArgument: the last message is not the assistant's, or `train_on` is something else.
        InvalidDatum: the template writes a message anew when others follow (as those do that drop
            earlier reasoning), so that its tokens can't be told: train on the last only.
    """
    if train_on not in ("last", "all"):
        raise InvalidArgument(f"train_on must be 'last' or 'all', got {train_on!r}")
    if not messages or messages[-1].get("role") != "assistant":
        raise InvalidArgument(
            "the last message must be the assistant's: it is what the datum trains on"
        )
    tokens = _templated(tokenizer, messages, generation_prompt=False)
    weights = [0.0] * len(tokens)
    for place, message in enumerate(messages):
        if message.get("role") != "assistant" or (
            train_on == "last" and place != len(messages) - 1
        ):
            continue
        asked = _templated(tokenizer, messages[:place], generation_prompt=True)
        said = _templated(tokenizer, messages[: place + 1], generation_prompt=False)
        if tokens[: len(said)] != said or said[: len(asked)] != asked:
            raise InvalidDatum(
                f"message {place}: the chat template writes it differently when others follow, or "
                "its generation prompt is no beginning of it. Pass train_on='last', or tokens and "
                "weights of your own to supervised_datum"
            )
        weights[len(asked) : len(said)] = [1.0] * (len(said) - len(asked))
    return supervised_datum(tokens, weights)


def check_alignment(
    data: Sequence[tinker.Datum],
    outputs: Sequence[Mapping[str, tinker.TensorData]],
    *,
    tolerance: float = 0.1,
) -> float:
    """Compare the logprobs that datums carry with those that the trainer computed for them.

    A trainer that still has the weights that sampled computes the same logprobs. When they differ,
    and would agree if the datum's were moved by a token or two, the arrays are misaligned: the
    most common silent error of hand-made datums.

    Args:
        data: datums with `logprobs`; positions whose entry is 0 are left out (the prompt).
        outputs: `loss_fn_outputs` of a forward or forward_backward of these datums.
        tolerance: mean difference that is taken for the same, natural log.

    Returns:
        The mean absolute difference over all tokens compared.

    Raises:
        InvalidDatum: a datum is misaligned; says which, and by how many tokens.
        InvalidArgument: another number of outputs than of datums, or no datum has logprobs.
    """
    import numpy as np

    if len(data) != len(outputs):
        raise InvalidArgument(f"{len(outputs)} outputs for {len(data)} datums: pass both of a pass")
    total, count = 0.0, 0
    for index, (datum, output) in enumerate(zip(data, outputs, strict=True)):
        given = datum.loss_fn_inputs.get("logprobs")
        if given is None:
            continue
        sampled, computed = given.to_numpy().ravel(), output["logprobs"].to_numpy().ravel()
        active = np.flatnonzero(sampled)
        if not active.size:
            continue
        apart = _apart(sampled, computed, active, 0)
        total, count = total + apart * active.size, count + active.size
        if apart <= tolerance or active.size < 3:
            continue
        shift = min(SHIFTS, key=lambda by: _apart(sampled, computed, active, by))
        if _apart(sampled, computed, active, shift) * CLEARLY < apart:
            raise InvalidDatum(
                f"datum {index}: its logprobs are {apart:.2g} from the trainer's on average, and "
                f"agree when moved by {shift:+d}: they are misaligned. Build it with rl_datum or "
                "completion_datum, which own the shift",
                index=index,
            )
    if not count:
        raise InvalidArgument("no datum has logprobs to compare")
    return total / count


def check_normalization(
    data: Sequence[tinker.Datum], grad_accumulation_normalization: str | None
) -> None:
    """Check that a step would not be divided by its tokens or sequences twice.

    Losses are plain sums. Divide in the datums' weights or advantages (or in a custom loss), or
    pass `grad_accumulation_normalization` to `optim_step`; both together make the step too small by
    the number of tokens, and neither makes it too large.

    Args:
        data: all datums of the step.
        grad_accumulation_normalization: what `optim_step` will get; None is "none".

    Raises:
        InvalidArgument: the magnitudes of the weights (times the advantages, where there are any)
            sum to about 1 over all tokens, or over each datum's, and `optim_step` would divide them
            again. Says what to change.
    """
    import numpy as np

    if grad_accumulation_normalization in (None, "none"):
        return
    sizes: list[float] = []
    tokens: list[int] = []
    for datum in data:
        inputs = datum.loss_fn_inputs
        shares = np.ones(inputs["target_tokens"].to_numpy().shape)
        for name in ("weights", "advantages"):
            if name in inputs:
                shares = shares * inputs[name].to_numpy()
        sizes.append(float(np.abs(shares).sum()))
        tokens.append(int(np.count_nonzero(shares)))
    many = max(16, 4 * len(sizes))
    if sum(tokens) >= many and 0 < sum(sizes) <= AVERAGED:
        what, over = "all tokens of the step", sum(tokens)
    elif min(tokens, default=0) >= 8 and 0 < max(sizes) <= AVERAGED:
        what, over = "each datum's tokens", max(tokens)
    else:
        return
    raise InvalidArgument(
        f"the magnitudes of weights and advantages sum to about 1 over {what}: they have been "
        f"divided by a count already (up to {over} tokens), and optim_step would divide once more "
        f"({grad_accumulation_normalization=}). Pass grad_accumulation_normalization=None, or give "
        "plain weights and advantages"
    )


def _apart(
    sampled: npt.NDArray[np.floating[Any]],
    computed: npt.NDArray[np.floating[Any]],
    active: npt.NDArray[np.intp],
    shift: int,
) -> float:
    """Compute the mean difference of active entries from the trainer's, `shift` positions on."""
    moved = active + shift
    inside = (moved >= 0) & (moved < len(computed))
    if not inside.any():
        return math.inf
    differences = abs(sampled[active[inside]] - computed[moved[inside]])
    return float(differences.mean())


def _templated(
    tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool
) -> list[int]:
    ids: object = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tokenize=True,
        add_generation_prompt=generation_prompt,
        return_dict=False,
    )
    if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
        raise InvalidArgument(
            f"the tokenizer's chat template gave a {type(ids).__name__}, not a list of token ids"
        )
    return [int(token) for token in cast(Sequence[int], ids)]


def _datum(tokens: Sequence[int], **arrays: npt.NDArray[np.float32]) -> tinker.Datum:
    import numpy as np
    import tinker

    if len(tokens) < 2:
        raise InvalidDatum(f"{len(tokens)} token: a datum needs two, one to predict the other from")
    targets = np.asarray(tokens[1:], np.int64)
    inputs: dict[str, npt.NDArray[Any]] = {"target_tokens": targets, **arrays}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints([int(token) for token in tokens[:-1]]),
        loss_fn_inputs={
            name: tinker.TensorData.from_numpy(array) for name, array in inputs.items()
        },
    )


def _finite(name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InvalidDatum(
            f"{name!r} has {bad.size} entries that are NaN or infinite, the first at position "
            f"{int(bad[0])} of {len(array)}: mend what computed them; they would make every weight "
            "NaN"
        )
    return array


def _sampled_logprobs(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    _finite("logprobs", array)
    if array.max() > 1e-3:
        raise InvalidDatum(
            f"'logprobs' has an entry of {array.max():.3g}: a logprob is at most 0. Pass natural "
            "logprobs, not probabilities or their negatives"
        )
    return array


def _check_length(name: str, values: Sequence[float], length: int) -> None:
    if len(values) != length:
        raise InvalidDatum(
            f"{name!r} has {len(values)} entries for {length} tokens: one a token is needed"
        )
