"""`FireworksClient` over HTTP, where the local platform has no such resources: what it sends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fireworks_training.compat import DeploymentManager, FireworksClient
from fireworks_training.errors import ApiStatusError, InvalidArgument, ProtocolError
from tests.async_.control_plane.support import StubPlane

JOB = "accounts/me/supervisedFineTuningJobs/j1"
SESSION = "accounts/me/trainingSessions/s1"
BASE = "accounts/x/models/base"
MODEL = {"name": "accounts/me/models/mine", "state": "READY"}
OPERATION = "accounts/me/operations/o"


async def calling(stub: StubPlane, call: Callable[[FireworksClient], Any]) -> Any:
    """The result of a blocking call against the stub."""

    def blocking(url: str) -> Any:
        with FireworksClient("key", url) as client:
            return call(client)

    async with stub.running() as url:
        return await asyncio.to_thread(blocking, url)


@pytest.mark.parametrize("parent", [JOB, "accounts/me/dpoJobs/j1"])
async def test_the_checkpoints_of_a_fine_tuning_job(parent: str) -> None:
    stub, rows = StubPlane(), [{"name": f"{parent}/checkpoints/c{n}"} for n in range(2)]
    stub.answer(
        f"GET /v1/{parent}/checkpoints",
        {"checkpoints": rows[:1], "nextPageToken": "t"},
        {"checkpoints": rows[1:]},
    )
    call = lambda client: client.list_training_job_checkpoints(parent, page_size=1)  # noqa: E731
    assert await calling(stub, call) == rows
    assert stub.seen[-1][1].endswith("?pageSize=1&pageToken=t")


@pytest.mark.parametrize("key", ["trainingSessionCheckpoints", "checkpoints"])
async def test_the_checkpoints_of_a_session(key: str) -> None:
    stub, rows = StubPlane(), [{"name": f"{SESSION}/checkpoints/c1"}]
    stub.answer(f"GET /v1/{SESSION}/checkpoints", {key: rows})
    found = await calling(stub, lambda client: client.list_training_session_checkpoints(SESSION))
    assert found == rows


async def test_a_sessions_checkpoint_is_promoted() -> None:
    stub, name = StubPlane(), f"{SESSION}/checkpoints/c1"
    stub.answer(f"POST /v1/{name}:promote", {"model": MODEL})
    made = await calling(stub, lambda client: client.promote_session_checkpoint(name, "mine", BASE))
    assert made == MODEL
    assert [body for method, _, body in stub.seen if method == "POST"] == [
        {"output_model": MODEL["name"], "base_model": BASE}
    ]


async def test_a_fine_tuning_jobs_checkpoint_is_promoted_and_waited_for() -> None:
    stub, name = StubPlane(), f"{JOB}/checkpoints/c1"
    stub.answer(f"POST /v1/{name}:promote", {"operation": {"name": OPERATION}})
    done = {"name": OPERATION, "done": True, "response": {"@type": "t", **MODEL}}
    stub.answer(f"GET /v1/{OPERATION}", {"name": OPERATION}, done)
    made = await calling(
        stub, lambda client: client.promote_training_job_checkpoint(name, "mine", BASE)
    )
    assert made == MODEL
    assert [body for method, _, body in stub.seen if method == "POST"] == [
        {"output_model": MODEL["name"], "base_model": BASE, "async_promotion": True}
    ]


@pytest.mark.parametrize(
    "refusal",
    ["async_promotion: extra inputs are not permitted", 'Unknown name "asyncPromotion": no field'],
)
async def test_a_platform_that_promotes_while_the_caller_waits(refusal: str) -> None:
    stub, name = StubPlane(), f"{JOB}/checkpoints/c1"
    stub.answer(
        f"POST /v1/{name}:promote", (400, {"error": {"message": refusal}}), {"model": MODEL}
    )
    made = await calling(
        stub, lambda client: client.promote_training_job_checkpoint(name, "mine", BASE)
    )
    assert made == MODEL
    assert "async_promotion" not in stub.seen[-1][2]


async def test_a_promotion_that_is_refused_or_names_no_model_is_an_error() -> None:
    stub, name = StubPlane(), f"{JOB}/checkpoints/c1"
    promote = lambda client: client.promote_training_job_checkpoint(name, "mine", BASE)  # noqa: E731
    stub.answer(f"POST /v1/{name}:promote", (400, {"error": {"message": "not promotable"}}))
    with pytest.raises(ApiStatusError, match="not promotable"):
        await calling(stub, promote)
    assert sum(method == "POST" for method, _, _ in stub.seen) == 1
    stub.answer(f"POST /v1/{name}:promote", {})
    with pytest.raises(ProtocolError, match="names no model"):
        await calling(stub, promote)


async def test_a_session_is_ended_once_or_twice() -> None:
    stub = StubPlane()
    stub.answer(f"DELETE /v1/{SESSION}", {}, (404, {}))
    await calling(stub, lambda client: client.delete_training_session(SESSION))
    await calling(stub, lambda client: client.delete_training_session(SESSION))
    assert [path for method, path, _ in stub.seen if method == "DELETE"] == 2 * [f"/v1/{SESSION}"]


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.list_training_job_checkpoints(SESSION),
        lambda client: client.list_training_session_checkpoints(JOB),
        lambda client: client.promote_session_checkpoint(SESSION, "mine", BASE),
        lambda client: client.promote_training_job_checkpoint(f"{JOB}/x/c1", "mine", BASE),
        lambda client: client.promote_training_job_checkpoint(f"{JOB}/checkpoints/c1", "-", BASE),
        lambda client: client.promote_session_checkpoint(f"{SESSION}/checkpoints/c1", "mine", ""),
    ],
)
async def test_what_is_not_such_a_name_is_refused_before_anything_is_sent(
    call: Callable[[FireworksClient], Any],
) -> None:
    stub = StubPlane()
    with pytest.raises(InvalidArgument):
        await calling(stub, call)
    assert stub.seen == []


async def test_the_checkpoints_of_another_account_are_refused() -> None:
    other = JOB.replace("/me/", "/you/")
    with pytest.raises(InvalidArgument, match="me"):
        await calling(StubPlane(), lambda client: client.list_training_job_checkpoints(other))


async def test_a_hot_load_by_hand() -> None:
    """What is asked for is in the body and the headers; a field that is refused is left out."""
    stub, path = StubPlane(), "POST /hot_load/v1/models/hot_load"
    refusal = {"error": {"message": "Extra inputs are not permitted: 'reset_prompt_cache'"}}
    stub.answer(path, (400, refusal), {"notice": "ok"})

    def load(url: str) -> Any:
        with DeploymentManager("key", url) as manager:
            delta = {"previous_snapshot_identity": "a"}
            return manager.hotload("d1", BASE, "b", delta, path="gs://bucket/b")

    async with stub.running() as url:
        assert await asyncio.to_thread(load, url) == {"notice": "ok"}
    sent = {"identity": "b", "incremental_snapshot_metadata": {"previous_snapshot_identity": "a"}}
    assert [body for method, _, body in stub.seen if method == "POST"] == [
        {**sent, "reset_prompt_cache": True},
        sent,
    ]
