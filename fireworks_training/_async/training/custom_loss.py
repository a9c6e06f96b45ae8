# pyright: standard
"""Runs a caller's loss function away from the loop, checks its result, and differentiates it.

The function sees the logprobs of each datum's targets as leaf tensors and returns a scalar. What
the trainer needs of it is the gradient by each logprob: a cross-entropy pass with the weights
`-dL/dlogprob` has the same gradient by the parameters as the loss itself (chain rule; the trainer's
cross entropy is the sum of `-weight * logprob`).

Runs in a daemon thread of its own, in the caller's context: a loss may take minutes, and must
neither stall the loop nor hold up the interpreter's exit. Needs torch.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from fireworks_training.errors import LossFailed, MissingExtra

if TYPE_CHECKING:
    import tinker
    import torch

    from fireworks_training.options import LossFunction

T = TypeVar("T")
Array = npt.NDArray[np.float32]
logger = logging.getLogger("fireworks_training.trainer")


@dataclass(frozen=True, slots=True)
class LossResult:
    """The value, metrics and gradients of a loss function.

    Attributes:
        loss: its value.
        metrics: those that it returned, as floats.
        gradients: dL/dlogprob for each datum, in the shape of its logprobs; zero where the loss
            does not depend on the datum.
    """

    loss: float
    metrics: dict[str, float]
    gradients: list[Array]


class SpreadMeans:
    """Notices a loss that takes the mean of its own call, twice in one step.

    Such a loss (its `needs_totals` is true) is right where a call is the whole optimizer batch.
    The sum of two calls' means is not the mean of both. Says so once.
    """

    def __init__(self) -> None:
        self._last: tuple[int, str] | None = None
        self._told = False

    def note(self, step: int, loss: object) -> None:
        """Note a pass of a step, in the order of the line."""
        if not getattr(loss, "needs_totals", False):
            return
        this = (step, str(getattr(loss, "name", type(loss).__name__)))
        if this == self._last and not self._told:
            self._told = True
            logger.warning(
                "the loss %r takes the mean of each call, and this step has it in several: their "
                "sum is not the mean of the whole batch. Hand in the totals of all its rows: "
                "loss.over(losses.totals(all_rows))",
                this[1],
            )
        self._last = this


def require_torch() -> None:
    """Raise `MissingExtra` where torch is not installed."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingExtra(
            "forward_backward_custom needs torch to differentiate your loss: "
            "pip install 'fireworks-training[torch]'",
            cause=error,
        ) from error


def run_loss(
    loss_fn: LossFunction, data: Sequence[tinker.Datum], logprobs: Sequence[Array]
) -> LossResult:
    """Call the loss function and differentiate it.

    Raises:
        LossFailed: it raised, returned something else than `(scalar tensor, metrics)`, gave a value
            or a gradient that is not finite, or does not depend on any logprob.
    """
    import torch

    leaves = [torch.tensor(values, dtype=torch.float32, requires_grad=True) for values in logprobs]
    try:
        returned = loss_fn(data, leaves)
    except Exception as error:
        raise LossFailed(
            f"the loss function raised {type(error).__name__}: {error}", cause=error
        ) from error
    loss, metrics = _unpack(returned)
    if not loss.requires_grad:
        raise LossFailed(
            "the loss does not depend on the logprobs it was given (was it detached, made with "
            ".item(), or computed from other numbers?): its gradient would be zero"
        )
    try:
        # Not .backward(): the caller's own leaves, if any, are none of our business.
        gradients: Sequence[torch.Tensor | None] = torch.autograd.grad(
            loss, leaves, allow_unused=True
        )
    except RuntimeError as error:
        raise LossFailed(f"the loss can't be differentiated: {error}", cause=error) from error
    if all(gradient is None for gradient in gradients):
        raise LossFailed("no gradient: the loss does not depend on any of the logprobs")
    arrays = [
        np.zeros(leaf.shape, np.float32) if gradient is None else gradient.detach().cpu().numpy()
        for leaf, gradient in zip(leaves, gradients, strict=True)
    ]
    for index, array in enumerate(arrays):
        if not bool(np.isfinite(array).all()):
            raise LossFailed(f"the loss has a gradient that is not finite, in datum {index}")
    return LossResult(float(loss.detach()), metrics, arrays)


def _unpack(returned: Any) -> tuple[torch.Tensor, dict[str, float]]:
    import torch

    if not isinstance(returned, tuple) or len(returned) != 2:
        raise LossFailed(
            f"the loss function returned {type(returned).__name__}; it must return a tuple "
            "(loss, metrics): a scalar tensor and a dict of floats"
        )
    loss, metrics = returned
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise LossFailed(f"the loss must be a scalar tensor, not {got}")
    if loss.is_complex():
        raise LossFailed("the loss must be a real number, not a complex one")
    if not math.isfinite(loss.item()):
        raise LossFailed(f"the loss is {loss.item()}; it must be finite")
    try:
        return loss.reshape(()), {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise LossFailed(
            f"the metrics must be a dict of names to numbers: {error}", cause=error
        ) from error


async def in_daemon_thread(work: Callable[[], T], *, name: str, context: contextvars.Context) -> T:
    """Run `work` in a daemon thread, in the given context, and await its result.

    A cancelled waiter leaves the thread to itself: Python code can't be stopped from outside.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def give(result: T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def target() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = context.run(work)
        except Exception as error:
            failure = error
        except BaseException as error:  # SystemExit and the like: not the loop's to act on
            failure = LossFailed(f"the loss function raised {type(error).__name__}", cause=error)
        try:
            loop.call_soon_threadsafe(give, result, failure)
        except RuntimeError:
            return  # the loop is closed: nobody waits any more

    threading.Thread(target=target, name=name, daemon=True).start()
    return await done
