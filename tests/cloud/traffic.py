"""What a client sends, request by request, and how ours differs from the official client's.

    python -m tests.cloud.traffic            the differences, each with its reason or UNEXPLAINED
    python -m tests.cloud.traffic --record   the official client's requests, written down anew

Both clients run the same programs against clouds of their own that keep every request. A client's
own ids are replaced, since they differ from run to run; of a route that is asked again and again
only requests that differ are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from tests.cloud.allowed import ALLOWED, Allowed
from tests.cloud.known_worse import KNOWN_UNLIKE
from tests.cloud.runner import OFFICIAL, OURS, run_side
from tests.cloud.scenario import Outcome, Scenario
from tests.cloud.server import OTHER_JOB, QUIET, Cloud, Habits

FILE = Path(__file__).parent / "official_traffic.json"
LORA = {"lora_rank": 8}
# Whether a deployment may name a job that is not there yet is asked by the scenarios; here a
# client that asks too early shows by the order of its requests, and everything else it sends too.
_LENIENT = Habits(checks_references=False)
_ENVIRONMENT = {
    "FIREWORKS_CLIENT_SOURCE": "fireworks-training-skill/1",
    "FIREWORKS_SESSION_ID": "01234567-89ab-4def-8123-456789abcdef",
    "CLOUDFLARE_ACCESS_CLIENT_ID": "an-id",
    "CLOUDFLARE_ACCESS_CLIENT_SECRET": "a-secret",
}
FLOWS = [
    Scenario("managed", "managed", _LENIENT),
    Scenario("managed, LoRA", "managed", _LENIENT, options=LORA),
    Scenario("managed, options", "options", _LENIENT),
    Scenario("managed, LoRA, options", "options", _LENIENT, options=LORA),
    Scenario("no training shape", "manual"),
    Scenario("operations", "operations"),
    Scenario("operations, LoRA", "operations", options=LORA),
    Scenario("state", "state"),
    Scenario("hot loads", "hot_load", options={"loads": 3}),
    Scenario("hot loads, LoRA", "hot_load", options={"loads": 2, **LORA}),
    Scenario("reference", "reference", options={"trainer_replica_count": 4}),
    Scenario("reference, LoRA", "reference", options=LORA),
    Scenario("reconnect", "hot_load", Habits(serves_job=OTHER_JOB)),
    Scenario(
        "a rollout of another quantization",
        "hot_load",
        Habits(deployment_model="accounts/fireworks/models/any-fp8"),
    ),
    Scenario("resume", "train", Habits(job_state="JOB_STATE_FAILED")),
    Scenario("sampling", "sampling"),
    Scenario("promotion", "promote"),
    Scenario("environment", "hot_load", environment=_ENVIRONMENT),
]

_HEADERS = (
    *("authorization", "x-api-key", "content-type", "content-encoding", "x-request-id"),
    *("x-idempotency-key", "prefer"),
)
_HEADER_FAMILIES = ("fireworks-", "x-fireworks-", "x-tinker-", "cf-access-")
# A family of polls, whose number depends on speed.
_REPEATED = ("retrieve_future", "get_job", "get_deployment", "hot_load_get", "healthz", "accounts")
_REPLACED = [
    (re.compile(r"http://127\.0\.0\.1:\d+"), "<url>"),
    (re.compile(r"\bts-[0-9a-f]{32}\b"), "<session>"),
    (re.compile(r"\brequest-\d+\b"), "<request>"),
    (re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"), "<uuid>"),
    (re.compile(r"\b[0-9a-f]{32}\b"), "<hex>"),
    (re.compile(r"\b(snapshot-\d|one|two|merged)-[0-9a-f]{8}\b"), r"\1-<suffix>"),
    (re.compile(r"\b(any|accounts-fireworks-models-any)-[0-9a-f]{8,}\b"), "<deployment>"),
    (re.compile(r"\b[a-z][a-z-]*-[0-9a-f]{8}\b"), "<job>"),
]


@dataclass(frozen=True)
class Difference:
    """One field of one kind of request; `official` or `ours` is None where it is not sent."""

    flow: str
    route: str
    field: str
    official: Any
    ours: Any

    def __str__(self) -> str:
        values = f"official {json.dumps(self.official)}, ours {json.dumps(self.ours)}"
        return f"{self.flow}: {self.route} {self.field}: {values}"


def _plain(value: Any) -> Any:
    """A value with the ids of this run replaced."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, str):
        for pattern, put in _REPLACED:
            value = pattern.sub(put, value)
    return value


def _request(seen: dict[str, Any]) -> dict[str, Any]:
    headers = {
        name: "<seconds>" if name.endswith("-roundtrip-time") else value
        for name, value in seen["headers"].items()
        if name in _HEADERS or name.startswith(_HEADER_FAMILIES)
    }
    if seen["body"] is None:
        headers.pop("content-type", None)  # of nothing
    kept = {key: seen[key] for key in ("method", "path", "query", "body")}
    found: dict[str, Any] = _plain({**kept, "headers": headers})
    return found


def of_cloud(cloud: Cloud) -> list[dict[str, Any]]:
    """The requests that a cloud saw, in order, as they are compared: route and fields."""
    found: list[dict[str, Any]] = []
    for seen in cloud.seen:
        one = {"route": seen["route"], **_request(seen)}
        if seen["route"] in QUIET or (seen["route"] in _REPEATED and one in found):
            continue
        found.append(one)
    return found


def leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The fields of a request and their values; a list is one value."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from leaves(one, f"{where}.{key}" if where else key)
    else:
        yield where, value


def differences(
    flow: str, official: list[dict[str, Any]], ours: list[dict[str, Any]]
) -> list[Difference]:
    """Where ours differs: fields of the n-th request of a route, requests, and their order."""
    found: list[Difference] = []
    for route in dict.fromkeys(one["route"] for one in (*official, *ours)):
        pair = [[r for r in side if r["route"] == route] for side in (official, ours)]
        for one, other in zip(*pair, strict=False):
            theirs, own = dict(leaves(one, "")), dict(leaves(other, ""))
            found += [
                Difference(flow, route, field, theirs.get(field), own.get(field))
                for field in dict.fromkeys((*theirs, *own))
                if theirs.get(field) != own.get(field)
            ]
        counts = [len(side) for side in pair]
        if (min(counts) == 0 and max(counts) > 0) if route in _REPEATED else counts[0] != counts[1]:
            found.append(Difference(flow, route, "count", counts[0] or None, counts[1] or None))
    orders = [
        [one["route"] for one in side if one["method"] != "GET" and one["route"] not in _REPEATED]
        for side in (official, ours)
    ]
    common = set(orders[0]) & set(orders[1])
    one, other = ([route for route in order if route in common] for order in orders)
    if one != other and sorted(one) == sorted(other):
        found.append(Difference(flow, "all", "order", one, other))
    return found


def row_of(
    difference: Difference, rows: tuple[Allowed, ...] = ALLOWED + KNOWN_UNLIKE
) -> Allowed | None:
    """The row that has a difference, or None."""
    for row in rows:
        sent = {
            "missing": difference.ours is None,
            "extra": difference.official is None,
            "differs": None not in (difference.official, difference.ours),
        }
        if (
            fnmatchcase(difference.route, row.route)
            and fnmatchcase(difference.field, row.field)
            and (row.how == "any" or sent[row.how])
        ):
            return row
    return None


async def observe(side: str) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Outcome]]:
    """The requests of one client, by flow, and what came of its programs."""
    clouds = {flow.name: Cloud(flow.habits) for flow in FLOWS}
    for cloud in clouds.values():
        cloud.keep_bodies = True
    outcomes = await run_side(side, FLOWS, clouds)
    return {name: of_cloud(cloud) for name, cloud in clouds.items()}, outcomes


def recorded() -> dict[str, list[dict[str, Any]]]:
    """The official client's requests, by flow."""
    found: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text())
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.cloud.traffic", description=__doc__)
    parser.add_argument("--record", action="store_true")
    if parser.parse_args().record:
        seen, outcomes = asyncio.run(observe(OFFICIAL))
        FILE.write_text(json.dumps(seen, indent=1, sort_keys=True) + "\n")
        for name, outcome in outcomes.items():
            sys.stdout.write(f"{name}: {outcome.failures}\n")
        return 0
    seen, outcomes = asyncio.run(observe(OURS))
    for name, outcome in outcomes.items():
        if outcome.failures:
            sys.stdout.write(f"{name}: {outcome.failures}\n")
    official, unexplained = recorded(), 0
    for name, requests in seen.items():
        for one in differences(name, official[name], requests):
            row = row_of(one)
            unexplained += row is None
            said = "UNEXPLAINED" if row is None else row.reason
            known = "TO BE MENDED: " if row in KNOWN_UNLIKE else ""
            sys.stdout.write(f"{one}\n    {known}{said}\n")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
