"""Checks the arguments of operations at the call: a wrong kind takes no place in the line.

The content of datums is checked where they are encoded, in `_wire.training.datums`.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import cast, get_args

from fireworks_training.errors import InvalidArgument
from fireworks_training.options import LossName

ADAM_BOUNDS = {"beta1": 1.0, "beta2": 1.0}
"""What settings of an optimizer step must stay below; the others have no upper bound."""

LOSS_NAMES: tuple[str, ...] = get_args(LossName)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_JOB = re.compile(r"[a-z0-9-]{1,63}")
_WHERE = rf"(cross_job://{_JOB.pattern}/|tinker://[A-Za-z0-9:_-]+/)?"
_STATE = re.compile(rf"{_WHERE}{_NAME.pattern}(/[A-Za-z0-9._-]+)*")
_RULE = "1 to 200 letters, digits, '.', '_' and '-', starting with a letter or a digit"


def check_datums(data: object) -> None:
    """Refuse what is not a list of `tinker.Datum`, and an empty one.

    Raises:
        InvalidArgument: names the first element that is none.
    """
    # Loaded by whoever made a datum; not imported here, since that may take seconds.
    kind: type = getattr(sys.modules.get("tinker"), "Datum", object)
    if isinstance(data, (str, bytes)) or not isinstance(data, Sequence):
        raise InvalidArgument(f"data must be a list of tinker.Datum, not {type(data).__name__}")
    if not data:
        raise InvalidArgument("data is empty: a pass needs at least one datum")
    for index, datum in enumerate(cast(Sequence[object], data)):
        if not isinstance(datum, kind):
            raise InvalidArgument(
                f"data[{index}] is a {type(datum).__name__}; a tinker.Datum is needed"
            )


def check_loss_name(loss_fn: object) -> None:
    """Refuse what is not the name of a built-in loss.

    Raises:
        InvalidArgument: names those there are.
    """
    if not isinstance(loss_fn, str):
        raise InvalidArgument(
            f"loss_fn must be the name of a built-in loss, not {type(loss_fn).__name__}; a "
            "function goes to forward_backward_custom"
        )
    if loss_fn not in LOSS_NAMES:
        near = get_close_matches(loss_fn, LOSS_NAMES, 1)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise InvalidArgument(
            f"loss_fn={loss_fn!r} is no built-in loss{hint} There are {', '.join(LOSS_NAMES)}; a "
            "loss of your own goes to forward_backward_custom"
        )


def loss_config(config: object) -> dict[str, float | str] | None:
    """Convert the options of a loss to what can be sent; those that are None are left out.

    Raises:
        InvalidArgument: names the first option that is no finite number, bool or text.
    """
    if config is None:
        return None
    if not isinstance(config, Mapping):
        raise InvalidArgument(f"loss_fn_config must be a mapping, not {type(config).__name__}")
    options: dict[str, float | str] = {}
    for name, value in cast(Mapping[object, object], config).items():
        if not isinstance(name, str):
            raise InvalidArgument(f"loss_fn_config has the key {name!r}; keys are text")
        if isinstance(value, (bool, str)):
            options[name] = value
        elif isinstance(value, Integral) and abs(int(value)) < 1 << 63:
            options[name] = int(value)
        elif isinstance(value, Real) and math.isfinite(number := float(value)):
            options[name] = number
        elif value is not None:
            given = repr(value) if isinstance(value, Real) else f"a {type(value).__name__}"
            raise InvalidArgument(
                f"loss_fn_config[{name!r}] is {given}; options are finite numbers, bools and text"
            )
    return options


def adam_settings(given: Mapping[str, object]) -> dict[str, float]:
    """Check the settings of an optimizer step.

    Raises:
        InvalidArgument: names the first that is no finite number, or out of range.
    """
    settings: dict[str, float] = {}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise InvalidArgument(
                f"adam_params.{name} must be a number, not {type(value).__name__}"
            )
        number, most = float(value), ADAM_BOUNDS.get(name, math.inf)
        if not (math.isfinite(number) and number >= 0 and (number < most or most == math.inf)):
            bound = "" if most == math.inf else f" and below {most:g}"
            raise InvalidArgument(
                f"adam_params.{name} is {value!r}; it must be finite, at least 0{bound}"
            )
        settings[name] = number
    return settings


def check_name(what: str, value: object) -> None:
    """Refuse what can't be the name of a snapshot or a state.

    Raises:
        InvalidArgument: with the rule.
    """
    _check(_NAME, value, f"{what}={value!r} is not a valid name: {_RULE}")


def check_ttl(value: object) -> int | None:
    """Read a time to live, in whole seconds of at least 1; None is none.

    Raises:
        InvalidArgument: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise InvalidArgument(f"ttl_seconds={value!r}: whole seconds of at least 1 are needed")
    return int(value)


def check_job(what: str, value: object) -> None:
    """Refuse what can't be the id of a trainer job.

    Raises:
        InvalidArgument: with the rule.
    """
    _check(_JOB, value, f"{what}={value!r} is not a job id: letters a-z, digits and '-'")


def check_state(what: str, value: object) -> None:
    """Refuse what can't refer to a saved state.

    Raises:
        InvalidArgument: with the rule.
    """
    _check(
        _STATE,
        value,
        f"{what}={value!r} does not refer to a state: a name ({_RULE}), "
        "cross_job://<job>/<name>, or what save_state returned",
    )


def _check(pattern: re.Pattern[str], value: object, message: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value) or ".." in value:
        raise InvalidArgument(message)
