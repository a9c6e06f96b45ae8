"""AdamW over fp32 masters, for a module that holds rounded values.

Knows masters, accumulated gradients, clipping, normalisation and both moments. Does not know
losses, the failure rules of steps, or files.

The module's parameters are the masters at the precision of the snapshot dtype; gradients are taken
at that rounded point and applied to the masters by `torch.optim.AdamW` itself, after which the
module gets the new rounded values. It is torch's fused AdamW: one pass over the memory where the
plain one takes ten, and nothing that it needs is allocated between two weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from fireworks_training.local.model.model import SnapshotDtype

Moments = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Running means of the gradient and of its square, by the name of the parameter."""

Normalization = Literal["none", "num_loss_tokens", "num_sequences"]
NORMALIZATIONS: tuple[Normalization, ...] = ("none", "num_loss_tokens", "num_sequences")

_ROUNDED_AT_ONCE = 1 << 18
"""Numbers that are rounded at a time: they stay in the processor's cache on their way."""


class NonFinite(ArithmeticError):
    """Raised where a gradient holds an infinity or a NaN."""


class NoGradients(RuntimeError):
    """Raised for a step with nothing accumulated."""


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """Sets one step. `weight_decay` is decoupled; `grad_clip_norm` 0 means no clipping."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


@dataclass(slots=True)
class _Accumulated:
    """Sums the gradients since the last step, and counts what they were taken of."""

    gradients: list[Tensor]
    loss_tokens: int
    sequences: int


class MasterAdamW:
    """Keeps masters, moments and accumulated gradients of a set of parameters.

    Making one rounds the parameters in place.

    Args:
        parameters: the parameters to train, by name; fp32.
        dtype: precision of the values that the module holds.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], dtype: SnapshotDtype) -> None:
        self._parameters = dict(parameters)
        self._dtype: SnapshotDtype = dtype
        self._masters = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._adam = torch.optim.AdamW(list(self._masters.values()), fused=True)
        self._accumulated: _Accumulated | None = None
        self.steps = 0
        """Steps since the moments were zero."""
        self._publish()

    @property
    def masters(self) -> Mapping[str, Tensor]:
        """The fp32 values; not to be written to."""
        return self._masters

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """The module's own tensors, in the order of `accumulate`'s gradients."""
        return list(self._parameters.values())

    @property
    def has_gradients(self) -> bool:
        """Whether any gradient was accumulated since the last step."""
        return self._accumulated is not None

    def accumulate(self, gradients: Sequence[Tensor], *, loss_tokens: int, sequences: int) -> None:
        """Adds one gradient a parameter, all or nothing; keeps the tensors.

        Raises:
            NonFinite: nothing was added.
        """
        _check_finite(self._parameters, gradients)
        if self._accumulated is None:
            self._accumulated = _Accumulated(list(gradients), loss_tokens, sequences)
            return
        for total, gradient in zip(self._accumulated.gradients, gradients, strict=True):
            total.add_(gradient)
        self._accumulated.loss_tokens += loss_tokens
        self._accumulated.sequences += sequences

    def drop_gradients(self) -> None:
        """Forgets the accumulated gradients."""
        self._accumulated = None

    def step(self, settings: AdamSettings, normalization: Normalization) -> dict[str, float]:
        """Applies the accumulated gradients and drops them.

        With a normalisation they are divided by the number of tokens with a nonzero weight, or of
        datums, that were accumulated (by 1 if that is zero: the gradients are zero then too).
        Returns metrics; `grad_norm` is taken after the normalisation and before clipping.

        Raises:
            NoGradients: nothing was accumulated.
            NonFinite: the sum overflowed; the weights are unchanged and the gradients dropped.
            RuntimeError: torch found no memory; likewise.
        """
        accumulated, self._accumulated = self._accumulated, None
        if accumulated is None:
            raise NoGradients("no gradients were accumulated since the last step")
        divisor = {
            "none": 1,
            "num_loss_tokens": max(accumulated.loss_tokens, 1),
            "num_sequences": max(accumulated.sequences, 1),
        }[normalization]
        if divisor != 1:
            for gradient in accumulated.gradients:
                gradient.div_(divisor)
        norm = torch.nn.utils.get_total_norm(accumulated.gradients)
        if not torch.isfinite(norm):
            raise NonFinite("the norm of the accumulated gradient is not finite")
        for master, gradient in zip(self._masters.values(), accumulated.gradients, strict=True):
            master.grad = gradient
        if settings.grad_clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(
                self._masters.values(), settings.grad_clip_norm, norm
            )
        self._adam.param_groups[0].update(
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        try:
            self._adam.step()
        except BaseException:
            if self.steps == 0:  # moments are allocated by the first step, all before it begins
                self._adam.state.clear()
            raise
        finally:
            self._adam.zero_grad(set_to_none=True)
        self.steps += 1
        self._publish()
        return {"grad_norm": norm.item(), "learning_rate": settings.learning_rate}

    def moments(self) -> Moments:
        """Returns running means of gradient and square by name; empty before the first step."""
        first: dict[str, Tensor] = {}
        second: dict[str, Tensor] = {}
        for name, master in self._masters.items():
            state = self._adam.state.get(master)
            if state:
                first[name] = cast(Tensor, state["exp_avg"])
                second[name] = cast(Tensor, state["exp_avg_sq"])
        return first, second

    def restore(
        self,
        masters: Mapping[str, Tensor],
        moments: Moments | None,
        steps: int,
    ) -> None:
        """Sets masters, and moments with the number of steps behind them (None: fresh ones).

        Drops accumulated gradients. Names and shapes must be those of `masters` here.
        """
        self._accumulated = None
        self._adam.state.clear()
        self.steps = steps if moments is not None else 0
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(masters[name])
                if moments is not None and steps > 0:
                    self._adam.state[master] = {
                        "step": torch.tensor(float(steps), device=master.device),
                        "exp_avg": moments[0][name].to(master.device, copy=True),
                        "exp_avg_sq": moments[1][name].to(master.device, copy=True),
                    }
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if self._dtype == "float32":
                parameter.copy_(master)
                continue
            flat = (tensor.detach().view(-1) for tensor in (parameter, master))
            pieces = (torch.split(tensor, _ROUNDED_AT_ONCE) for tensor in flat)
            for target, piece in zip(*pieces, strict=True):
                target.copy_(piece.bfloat16())


def _check_finite(names: Mapping[str, object], gradients: Sequence[Tensor]) -> None:
    # The norm takes a twentieth of the time of a look at each number; it may overflow by itself.
    if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        return
    for name, gradient in zip(names, gradients, strict=True):
        if not torch.isfinite(gradient).all():
            raise NonFinite(f"the gradient of {name} is not finite")
