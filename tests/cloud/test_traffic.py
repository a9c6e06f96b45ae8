"""Our requests beside the recorded ones of the official client, field by field."""

from __future__ import annotations

import asyncio
import copy
from typing import Any

import pytest

from tests.cloud.allowed import ALLOWED
from tests.cloud.known_worse import KNOWN_FAILING
from tests.cloud.runner import OFFICIAL, OURS
from tests.cloud.scenario import Outcome
from tests.cloud.traffic import FLOWS, Difference, differences, observe, recorded, row_of

Requests = dict[str, list[dict[str, Any]]]
RECORDED = recorded()


@pytest.fixture(scope="module")
def ours() -> tuple[Requests, dict[str, Outcome]]:
    """What our client sends in all flows, and what came of their programs."""
    return asyncio.run(observe(OURS))


@pytest.mark.parametrize("flow", [flow.name for flow in FLOWS])
def test_every_difference_has_its_reason(
    ours: tuple[Requests, dict[str, Outcome]], flow: str
) -> None:
    requests, outcomes = ours
    found = differences(flow, RECORDED[flow], requests[flow])
    assert [str(one) for one in found if row_of(one) is None] == []
    assert flow in KNOWN_FAILING or outcomes[flow].failures == []


def test_every_reason_has_its_difference(ours: tuple[Requests, dict[str, Outcome]]) -> None:
    found = [
        one
        for flow in FLOWS
        for one in differences(flow.name, RECORDED[flow.name], ours[0][flow.name])
    ]
    used = {row_of(one, ALLOWED) for one in found}
    assert [row for row in ALLOWED if row not in used] == []


def changed(flow: str, change: Any) -> list[Difference]:
    """The differences that a change of the recorded requests makes."""
    requests = copy.deepcopy(RECORDED[flow])
    change(requests)
    return differences(flow, RECORDED[flow], requests)


def first(requests: list[dict[str, Any]], route: str) -> dict[str, Any]:
    return next(one for one in requests if one["route"] == route)


def test_a_change_of_any_kind_is_found() -> None:
    assert changed("managed", lambda requests: None) == []

    def more(requests: list[dict[str, Any]]) -> None:
        first(requests, "optim_step")["body"]["adam_params"]["momentum"] = 0.9

    def less(requests: list[dict[str, Any]]) -> None:
        del first(requests, "hot_load_post")["headers"]["fireworks-deployment"]

    def other(requests: list[dict[str, Any]]) -> None:
        first(requests, "create_job")["query"]["trainingShape"] = "another"

    def missing(requests: list[dict[str, Any]]) -> None:
        requests.remove(first(requests, "create_session"))

    def polls(requests: list[dict[str, Any]]) -> None:
        requests[:] = [one for one in requests if one["route"] != "retrieve_future"]

    def order(requests: list[dict[str, Any]]) -> None:
        job, deployment = first(requests, "create_job"), first(requests, "create_deployment")
        at, behind = requests.index(job), requests.index(deployment)
        requests[at], requests[behind] = requests[behind], requests[at]

    for change, route, field in (
        (more, "optim_step", "body.adam_params.momentum"),
        (less, "hot_load_post", "headers.fireworks-deployment"),
        (other, "create_job", "query.trainingShape"),
        (missing, "create_session", "count"),
        (polls, "retrieve_future", "count"),
        (order, "all", "order"),
    ):
        (found,) = changed("managed", change)
        assert (found.route, found.field) == (route, field)
        assert row_of(found, ALLOWED) is None


@pytest.mark.slow
async def test_the_record_is_what_the_official_client_sends() -> None:
    requests, outcomes = await observe(OFFICIAL)
    assert {name: outcome.failures for name, outcome in outcomes.items() if outcome.failures} == {}
    found = [
        str(one) for flow in RECORDED for one in differences(flow, RECORDED[flow], requests[flow])
    ]
    assert found == []
