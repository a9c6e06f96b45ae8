"""How the terms of a batch become one number: part of a loss's algorithm, so it has a name.

A mean is over the *optimizer batch*: all rows of all calls up to the `optim_step`. A batch that
goes to the trainer in one call is its own total, in however many chunks it is sent. One that is
spread over several calls needs its totals beforehand: `loss.over(losses.totals(all_rows))`.

A token counts if its mask says so. The mask is a row's `weights` (or `loss_mask`, `mask`,
`sequence_ratio_mask`); an RL row without any counts the positions where `advantages` or `logprobs`
is not zero, a supervised row without any counts every position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fireworks_training._checks import number, one_of
from fireworks_training.errors import InvalidArgument, InvalidDatum

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tinker

MASKS = ("weights", "loss_mask", "mask", "sequence_ratio_mask")
"""Names of a row's mask; where several are given they must be equal."""

ReductionName = Literal["sum", "per_token", "per_sequence", "constant"]
NAMES: tuple[ReductionName, ...] = ("sum", "per_token", "per_sequence", "constant")


@dataclass(frozen=True, slots=True)
class Reduction:
    """One way to add the terms x_t of N rows with n_i counted tokens each, T in all.

    Attributes:
        name: "sum": sum x_t, as the trainer's built-in losses. "per_token": sum x_t / T (DAPO).
            "per_sequence": the mean over rows of each row's mean (GRPO). "constant":
            sum x_t / (N L) (Dr. GRPO).
        length: L of "constant", in tokens.
    """

    name: ReductionName
    length: float | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown name, and a length where it has no place or is missing."""
        one_of("reduction", self.name, NAMES)
        if (self.length is not None) != (self.name == "constant"):
            raise InvalidArgument(
                "a length belongs to the reduction 'constant' and to no other: "
                "losses.constant(1024) divides by 1,024 tokens a row"
            )
        if self.length is not None and number("length", self.length, 0.0) == 0.0:
            raise InvalidArgument("the length of a constant reduction must be above 0")

    @property
    def needs_totals(self) -> bool:
        """Whether it divides by something that a part of a batch can't know."""
        return self.name != "sum"


plain_sum = Reduction("sum")
per_token = Reduction("per_token")
per_sequence = Reduction("per_sequence")


def constant(length: float) -> Reduction:
    """Make the reduction of Dr. GRPO: divide by `length` tokens a row, whatever their lengths."""
    return Reduction("constant", length)


def reduction_of(value: Reduction | str) -> Reduction:
    """Take a reduction or the name of one.

    Raises:
        InvalidArgument: no reduction has that name; or it is "constant", which needs a length.
    """
    if isinstance(value, Reduction):
        return value
    if value == "constant":
        raise InvalidArgument("a constant reduction needs its length: losses.constant(1024)")
    for known in (plain_sum, per_token, per_sequence):
        if value == known.name:
            return known
    raise InvalidArgument(
        f"reduction={value!r}: allowed are sum, per_token, per_sequence, losses.constant(length)"
    )


@dataclass(frozen=True, slots=True)
class Totals:
    """The size of an optimizer batch, for losses that see a part of it.

    Attributes:
        sequences: rows with at least one token that counts.
        tokens: the sum of the mask over all rows: the number of tokens, for a mask of ones.
    """

    sequences: int
    tokens: float

    def __post_init__(self) -> None:
        """Refuse a batch without anything in it."""
        if self.sequences < 1 or not (math.isfinite(self.tokens) and self.tokens > 0):
            raise InvalidArgument("the totals are those of a batch in which no token counts")


def totals(data: Sequence[tinker.Datum]) -> Totals:
    """Count the rows and tokens of a whole optimizer batch that will be sent in several calls.

    Raises:
        InvalidDatum: a row's masks contradict each other, or it has none and nothing to tell by.
        InvalidArgument: no token counts.
    """
    masks = [unchecked_mask(datum, index) for index, datum in enumerate(data)]
    for mask in masks:
        check_masks(mask, masks)
    sizes = [float(mask.sum(dtype="float64")) for mask in masks]
    return Totals(sum(size > 0 for size in sizes), sum(sizes))


def unchecked_mask(datum: tinker.Datum, index: int) -> npt.NDArray[np.floating[Any]]:
    """The mask of a row: one entry for each target, 0 for a token that does not count.

    Its values are for `check_masks`, once for a whole batch.

    Raises:
        InvalidDatum: masks of several names contradict each other, or an RL row has no mask and
            both its `advantages` and `logprobs` are all 0.
    """
    import numpy as np

    inputs = datum.loss_fn_inputs
    given = [(name, inputs[name].to_numpy()) for name in MASKS if name in inputs]
    for name, values in given[1:]:
        if not np.array_equal(values, given[0][1]):
            raise InvalidDatum(
                f"datum {index}: {given[0][0]!r} and {name!r} are both a mask and differ: "
                "give one of them",
                index=index,
            )
    if given:
        return given[0][1]
    if "target_tokens" not in inputs:
        raise InvalidDatum(f"datum {index} has no 'target_tokens'", index=index)
    counted = np.zeros(inputs["target_tokens"].to_numpy().shape, bool)
    signals = [inputs[name].to_numpy() for name in ("advantages", "logprobs") if name in inputs]
    if not signals:
        return np.ones(counted.shape, np.float32)
    for values in signals:
        if values.shape == counted.shape:
            counted |= values != 0
    if not counted.any():
        raise InvalidDatum(
            f"datum {index} has no 'weights', and its 'advantages' and 'logprobs' are 0 "
            "everywhere: nothing says which tokens were sampled. Build it with rl_datum or "
            "rollout_datum, or add 'weights'",
            index=index,
        )
    return counted.astype(np.float32)


def check_masks(
    flat: npt.NDArray[np.floating[Any]], masks: Sequence[npt.NDArray[np.floating[Any]]]
) -> None:
    """Check the values of the masks of a batch, laid end to end.

    Raises:
        InvalidDatum: an entry is negative or not finite.
    """
    import numpy as np

    if not flat.size or (flat.min() >= 0 and flat.max() < np.inf):  # a NaN fails both
        return
    for index, mask in enumerate(masks):
        if not bool(np.isfinite(mask).all()) or bool((mask < 0).any()):
            raise InvalidDatum(
                f"datum {index}: the mask ('weights') must be finite and not negative", index=index
            )
