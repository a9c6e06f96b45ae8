"""Looks that wait for a change: what ends them, and what they can't hold up."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from fireworks_training.local.gateway.control_plane.routes import CONTROL_PLANE
from fireworks_training.local.gateway.web import long_polls
from fireworks_training.local.gateway.web.long_polls import Waiters
from tests.local.gateway.platform_fakes import HTTP, KEY, MODEL, Gateway, eventually

AN_HOUR = 3600
JOB, DEPLOYMENT = f"{HTTP}/rlorTrainerJobs/j1", f"{HTTP}/deployments/d1"


def waiters(gateway: Gateway) -> Waiters:
    return gateway.app[CONTROL_PLANE].waiters


async def look(gateway: Gateway, path: str, **headers: str) -> tuple[int, Mapping[str, str], Any]:
    sent = {"X-API-Key": KEY} | {name.replace("_", "-"): text for name, text in headers.items()}
    async with gateway.session.get(f"{gateway.base_url}{path}", headers=sent) as answer:
        return answer.status, answer.headers, await answer.json() if answer.status == 200 else None


async def slow_job(gateway: Gateway) -> str:
    """A job that stays CREATING for an hour; the tag of it."""
    await gateway.call("PATCH", "/local/v1/limits", {"trainerDelayS": AN_HOUR})
    body = {"trainingConfig": {"baseModel": MODEL}}
    await gateway.call("POST", f"{HTTP}/rlorTrainerJobs?rlorTrainerJobId=j1", body)
    status, headers, row = await look(gateway, JOB)
    assert (status, row["state"]) == (200, "JOB_STATE_CREATING")
    assert "Preference-Applied" not in headers
    return headers["ETag"]


async def held(gateway: Gateway, path: str, tag: str) -> asyncio.Task[Any]:
    """A look that is held back."""
    before = len(waiters(gateway))
    task = asyncio.create_task(look(gateway, path, If_None_Match=tag, Prefer="wait=30"))
    await eventually(lambda: len(waiters(gateway)) > before, "the look waits")
    return task


async def test_a_look_is_answered_when_the_job_changes(gateway: Gateway) -> None:
    task = await held(gateway, JOB, await slow_job(gateway))
    await gateway.call("PATCH", "/local/v1/limits", {"trainerDelayS": None})
    status, headers, row = await task
    assert (status, row["state"]) == (200, "JOB_STATE_RUNNING")
    assert headers["Preference-Applied"] == "wait=30"
    assert len(waiters(gateway)) == 0


async def test_a_deployment_that_is_deleted_ends_the_wait(gateway: Gateway) -> None:
    await gateway.deployment("d1")
    tag = (await look(gateway, DEPLOYMENT))[1]["ETag"]
    task = await held(gateway, DEPLOYMENT, tag)
    await gateway.call("DELETE", f"{DEPLOYMENT}?hard=true")
    status, headers, row = await task
    if status == 200:  # it was seen on its way out
        assert row["state"] == "DELETING"
        status = (await look(gateway, DEPLOYMENT, If_None_Match=headers["ETag"]))[0]
    assert status == 404


async def test_without_a_change_the_answer_says_so_in_the_end(gateway: Gateway) -> None:
    tag = await slow_job(gateway)
    status, headers, _ = await look(gateway, JOB, If_None_Match=tag, Prefer="wait=1")
    assert (status, headers["ETag"], headers["Preference-Applied"]) == (304, tag, "wait=1")


@pytest.mark.parametrize("prefer", ["", "respond-async", "wait=0", "wait=-5", "wait=soon"])
async def test_who_does_not_ask_for_a_wait_is_answered_at_once(
    gateway: Gateway, prefer: str
) -> None:
    tag = await slow_job(gateway)
    status, headers, _ = await look(gateway, JOB, If_None_Match=tag, Prefer=prefer)
    assert (status, "Preference-Applied" in headers) == (304, False)


async def test_what_was_seen_long_ago_is_no_reason_to_wait(gateway: Gateway) -> None:
    await slow_job(gateway)
    status, headers, _ = await look(gateway, JOB, If_None_Match='"old"', Prefer="wait=30")
    assert (status, "Preference-Applied" in headers) == (200, False)


async def test_the_places_are_bounded_and_come_back(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long_polls, "MOST_WAITERS", 1)
    tag = await slow_job(gateway)
    task = await held(gateway, JOB, tag)
    status, headers, _ = await look(gateway, JOB, If_None_Match=tag, Prefer="wait=30")
    assert (status, "Preference-Applied" in headers) == (304, False)
    task.cancel()
    await eventually(lambda: len(waiters(gateway)) == 0, "who went away has left its place")
    (await held(gateway, JOB, tag)).cancel()
    await eventually(lambda: len(waiters(gateway)) == 0, "and the next one too")
