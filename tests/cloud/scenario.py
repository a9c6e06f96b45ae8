"""What a scenario is, what came of one, and when ours is worse than the official client's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.cloud.server import Fault, Habits

MORE_REQUESTS, MORE_TIME, MORE_SECONDS = 2.0, 1.25, 2.0


@dataclass(frozen=True)
class Scenario:
    """A program against a cloud with habits and faults.

    Attributes:
        name: `group: what is special`.
        program: one of `programs.PROGRAMS`, called with `options`.
        environment: variables of the client's process; `{url}` is the cloud's.
        alone: run in a process of its own, since it leaves others little of the processor.
        url: the URL that the program is given, where it is not the cloud's own.
        limit_s: a program that has not ended by then is cut off; the steps it had count.
    """

    name: str
    program: str
    habits: Habits = field(default_factory=Habits)
    faults: tuple[Fault, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    alone: bool = False
    url: str = "{url}"
    limit_s: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What came of one side.

    Attributes:
        steps: names of the program's steps, and how each ended.
        requests: how many the cloud got, heartbeats and telemetry not counted.
        routes: the same by route.
        applied: optimizer steps that the trainer carried out.
        stale: completions that were asked for while a load was under way on some replica.
        left: jobs and deployments that the program made and did not delete.
        seconds: from the program's beginning to its end, or to its limit.
        finished: the program ended before its limit.
    """

    steps: list[tuple[str, str]]
    requests: int
    routes: Mapping[str, int]
    applied: int
    stale: int
    left: int
    seconds: float
    finished: bool

    @property
    def succeeded(self) -> int:
        """How many operations did; `close` is none: what it left behind counts instead.

        The official client swallows what goes wrong there, and ours raises it.
        """
        return sum(said == "ok" and name != "close" for name, said in self.steps)

    @property
    def alive(self) -> bool:
        """The last operation of the program shows the client at work."""
        return ("alive", "ok") in [(name, said) for name, said in self.steps]

    @property
    def failures(self) -> list[str]:
        """The failed operations, with what was said."""
        failed = [(name, said) for name, said in self.steps if said != "ok" and name != "close"]
        return [f"{name}: {said}" for name, said in failed]

    def as_json(self) -> dict[str, Any]:
        """For the file of recorded outcomes."""
        return asdict(self) | {"seconds": round(self.seconds, 2)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Outcome:
        """As `as_json` wrote it."""
        steps = [(name, said) for name, said in value["steps"]]
        return cls(**{**value, "steps": steps})


def worse(official: Outcome, ours: Outcome, timed: bool = True) -> list[str]:
    """In what ours is worse; nothing where it is not.

    Fewer operations succeed; the client is dead where the official one lives; an optimizer step is
    applied that nobody asked for; more completions come from replicas that still load; more
    resources are left behind; more than twice its requests, or a load asked for more than twice;
    more than 1.25 times its time and 2 s. Requests and time are only compared where ours did no
    more than the official client did: who gives up early is quick and asks little.

    Args:
        timed: compare the times; only of runs side by side.
    """
    found = []
    if ours.succeeded < official.succeeded:
        failure = ours.failures[0] if ours.failures else "cut off at the limit"
        found.append(f"{ours.succeeded} of {official.succeeded} operations; {failure}")
    if official.alive and not ours.alive:
        found.append("dead")
    asked = sum(name.startswith("optim_step") for name, _ in ours.steps)
    if ours.applied > asked:
        found.append(f"{ours.applied} optimizer steps applied, {asked} asked for")
    if ours.stale > official.stale:
        found.append(f"{ours.stale} completions of replicas that load, not {official.stale}")
    if ours.left > official.left:
        found.append(f"{ours.left} resources left behind, not {official.left}")
    if ours.succeeded > official.succeeded:
        return found
    if ours.requests > MORE_REQUESTS * official.requests:
        found.append(f"{ours.requests} requests, not {official.requests}")
    found += _more_loads(official, ours)
    if timed and ours.seconds > MORE_TIME * official.seconds + MORE_SECONDS:
        found.append(f"{ours.seconds:.1f} s, not {official.seconds:.1f}")
    return found


def _more_loads(official: Outcome, ours: Outcome) -> list[str]:
    """Each request for a load may empty the deployment's cache: not twice for a snapshot.

    Only where the official client asked once for each, so that none was refused.
    """
    wanted = sum(name.startswith("hot load") for name, _ in official.steps)
    loads = [side.routes.get("hot_load_post", 0) for side in (official, ours)]
    if loads[0] == wanted and loads[1] > MORE_REQUESTS * wanted:
        return [f"{loads[1]} loads asked for, not {wanted}"]
    return []
