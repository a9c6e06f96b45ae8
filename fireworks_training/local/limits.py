"""The limits of the platform: places for workers, delays of their starts, and timeouts.

A laptop gives a trainer at once and keeps it for ever; a cloud does neither. These figures make the
platform behave like one, so that a script meets the waits here that it will meet there. Knows their
names and checks; the gateway carries them out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Self

from fireworks_training.errors import LocalPlatformError

LONGEST_S = 7 * 86400.0
MOST_PLACES = 64


@dataclass(frozen=True, slots=True)
class Limits:
    """Holds the limits; as JSON they are spelt in camel case (`maxTrainers`).

    Attributes:
        max_trainers: trainer jobs that have a trainer at a time; a further one waits in
            JOB_STATE_PENDING. None = as many as the platform can run.
        max_replicas: engines at a time, of all deployments; a further one waits, and its deployment
            stays CREATING or UPDATING.
        trainer_delay_s: seconds that a job stays in JOB_STATE_CREATING before its trainer starts.
        deployment_delay_s: seconds that pass before an engine starts.
        inactivity_timeout_s: a trainer that was sent nothing for so long is stopped, unless its job
            asked for another time; None = never. Operations and heartbeats count as activity.
        max_models: models that a trainer holds at a time; None = as many as memory holds, up to 64.
            Counts for trainers that start later. At the limit the model whose session has been
            silent longest, for 30 s at least, makes room.
        session_timeout_s: a session without a heartbeat for so long is ended, with its models.
    """

    max_trainers: int | None = None
    max_replicas: int | None = None
    max_models: int | None = None
    trainer_delay_s: float = 0.0
    deployment_delay_s: float = 0.0
    inactivity_timeout_s: float | None = None
    session_timeout_s: float = 300.0

    def changed(self, values: Mapping[str, object]) -> Self:
        """Return the limits with some of them replaced; null is the default.

        Raises:
            LocalPlatformError: an unknown name, or a value out of range.
        """
        known = {camel(f.name): f for f in fields(self)}
        given: dict[str, object] = {}
        for name, value in values.items():
            if name not in known:
                raise LocalPlatformError(f"unknown limit {name[:80]!r}; known: {', '.join(known)}")
            f = known[name]
            given[f.name] = f.default if value is None else _checked(name, value)
        return replace(self, **given)  # type: ignore[arg-type]  # each was checked just above

    def shown(self) -> dict[str, object]:
        """Return the limits as JSON."""
        return {camel(f.name): getattr(self, f.name) for f in fields(self)}


def _checked(name: str, value: object) -> int | float:
    if name.startswith("max"):
        least = 1 if name == "maxModels" else 0
        number = value if isinstance(value, int) and not isinstance(value, bool) else -1
        if not least <= number <= MOST_PLACES:
            raise LocalPlatformError(
                f"{name} must be an integer from {least} to {MOST_PLACES}, or null"
            )
        return number
    return seconds(name, value)


def seconds(name: str, value: object) -> float:
    """Return a duration from JSON.

    Raises:
        LocalPlatformError: not a number of seconds, or too many.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= LONGEST_S:
        raise LocalPlatformError(f"{name} must be a number of seconds from 0 to {LONGEST_S:.0f}")
    return float(number)


def camel(name: str) -> str:
    """Spell `max_trainers` as `maxTrainers`."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def parse_duration(text: object) -> float | None:
    """Parse a duration as the API spells it, `"1800s"`; return None if it is not one."""
    if not (isinstance(text, str) and text.endswith("s")):
        return None
    try:
        number = float(text.removesuffix("s"))
    except ValueError:
        return None
    return number if 0 <= number <= LONGEST_S else None
