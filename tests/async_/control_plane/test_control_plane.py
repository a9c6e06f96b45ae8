"""The control plane's client: what it sends, reads and refuses; against a stub, and for real."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fireworks_training import (
    ApiStatusError,
    AsyncControlPlane,
    ControlPlane,
    InvalidArgument,
    NotFound,
    ProtocolError,
    ProvisioningError,
    ProvisioningTimeout,
)
from tests.async_.control_plane.support import StubPlane
from tests.conftest import RunningPlatform

CHECKPOINT = "accounts/me/rlorTrainerJobs/j1/checkpoints/step-5"


@asynccontextmanager
async def serving(stub: StubPlane) -> AsyncIterator[AsyncControlPlane]:
    async with (
        stub.running() as url,
        AsyncControlPlane.connect(api_key="key", base_url=url) as plane,
    ):
        yield plane


async def test_a_list_is_followed_page_by_page() -> None:
    stub = StubPlane()
    jobs = [{"name": f"accounts/me/rlorTrainerJobs/j{n}", "state": "S"} for n in range(3)]
    stub.answer(
        "GET /v1/accounts/me/rlorTrainerJobs",
        {"rlorTrainerJobs": jobs[:2], "nextPageToken": "a b"},
        {"rlorTrainerJobs": jobs[2:], "nextPageToken": ""},
    )
    async with serving(stub) as plane:
        assert [job.job_id for job in await plane.list_jobs()] == ["j0", "j1", "j2"]
    assert stub.seen[-1][1].endswith("?pageSize=200&pageToken=a+b")


async def test_a_list_that_repeats_a_page_is_an_error() -> None:
    stub = StubPlane()
    stub.answer("GET /v1/accounts/me/deployments", {"deployments": [], "nextPageToken": "1"})
    async with serving(stub) as plane:
        with pytest.raises(ProtocolError, match="same page twice"):
            await plane.list_deployments()


@pytest.mark.parametrize("key", ["checkpoints", "rlorTrainerJobCheckpoints"])
async def test_checkpoints_are_listed_under_either_name(key: str) -> None:
    stub = StubPlane()
    row = {"name": CHECKPOINT, "checkpointType": "CHECKPOINT_TYPE_INFERENCE_BASE"}
    stub.answer(
        "GET /v1/accounts/me/rlorTrainerJobs/j1/checkpoints", {key: [{**row, "promotable": True}]}
    )
    async with serving(stub) as plane:
        (found,) = await plane.list_checkpoints("j1")
    assert (found.checkpoint_id, found.promotable) == ("step-5", True)


async def test_an_unknown_job_is_no_empty_list_of_checkpoints() -> None:
    async with serving(StubPlane()) as plane:
        with pytest.raises(NotFound):
            await plane.list_checkpoints("j1")


async def test_a_promotion_is_waited_for() -> None:
    stub = StubPlane()
    stub.answer(
        f"POST /v1/{CHECKPOINT}:promote", {"operation": {"name": "accounts/me/operations/o"}}
    )
    running = {"name": "accounts/me/operations/o", "metadata": {"statusMessage": "copying"}}
    stub.answer("GET /v1/accounts/me/operations/o", running, {**running, "done": True})
    model = {"name": "accounts/me/models/mine", "state": "READY", "baseModelDetails": {"moe": True}}
    stub.answer("GET /v1/accounts/me/models/mine", model)
    async with serving(stub) as plane:
        made = await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")
    assert (made.name, made.moe) == ("accounts/me/models/mine", True)
    assert [body for method, _, body in stub.seen if method == "POST"] == [
        {
            "output_model": "accounts/me/models/mine",
            "base_model": "accounts/x/models/base",
            "async_promotion": True,
            "trainer_job_id": "j1",
        }
    ]


@pytest.mark.parametrize(
    "refusal",
    ["async_promotion: extra inputs are not permitted", 'Unknown name "asyncPromotion": no field'],
)
async def test_a_server_that_does_not_know_async_promotion_is_asked_without(refusal: str) -> None:
    stub = StubPlane()
    stub.answer(
        f"POST /v1/{CHECKPOINT}:promote",
        (400, {"error": {"message": refusal}}),
        {"model": {"name": "accounts/me/models/mine", "state": "READY"}},
    )
    async with serving(stub) as plane:
        made = await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")
    assert made.name == "accounts/me/models/mine"
    assert "async_promotion" not in stub.seen[-1][2]


async def test_a_promotion_that_is_refused_for_another_reason_is_not_asked_for_again() -> None:
    stub = StubPlane()
    stub.answer(
        f"POST /v1/{CHECKPOINT}:promote",
        (400, {"error": {"message": "base_model: not the model of the checkpoint"}}),
    )
    async with serving(stub) as plane:
        with pytest.raises(ApiStatusError, match="base_model"):
            await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")
    assert sum(method == "POST" for method, _, _ in stub.seen) == 1


async def test_a_failed_promotion_says_why_and_a_slow_one_names_its_operation() -> None:
    stub = StubPlane()
    name = "accounts/me/operations/o"
    stub.answer(f"POST /v1/{CHECKPOINT}:promote", {"operation": {"name": name}})
    stub.answer(f"GET /v1/{name}", {"name": name, "done": True, "error": {"message": "no space"}})
    async with serving(stub) as plane:
        with pytest.raises(ProvisioningError, match="no space"):
            await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")
        stub.answer(f"GET /v1/{name}", {"name": name})
        with pytest.raises(ProvisioningTimeout, match=name):
            await plane.wait_for_operation(name, timeout_s=0.05)


@pytest.mark.parametrize("wrong", ["", "-a", "A", "a" * 64, "a/b"])
async def test_a_model_id_that_is_not_allowed_is_refused_before_anything_is_sent(
    wrong: str,
) -> None:
    stub = StubPlane()
    async with serving(stub) as plane:
        with pytest.raises(InvalidArgument, match="output_model_id"):
            await plane.promote_checkpoint(CHECKPOINT, wrong, "accounts/x/models/base")
    assert stub.seen == []


async def test_a_short_shape_name_is_refused() -> None:
    async with serving(StubPlane()) as plane:
        with pytest.raises(InvalidArgument, match="full name"):
            await plane.training_profile("cpu")


def test_an_embedded_platform_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="embedded"):
        AsyncControlPlane.connect(base_url="local")


def test_the_blocking_twin_on_the_platform(platform: RunningPlatform) -> None:
    with ControlPlane.connect(api_key=platform.api_key, base_url=platform.base_url) as plane:
        assert plane.account() == "local"
        (profile,) = plane.list_training_shapes()
        assert profile == plane.training_profile(platform.training_shape)
        assert profile.shape == platform.training_shape
        assert plane.get_model(platform.model) in plane.list_models()
        assert plane.get_model("accounts/local/models/none") is None
        assert plane.get_job("never-made") is None
        assert isinstance(plane.list_jobs(), list)
        assert isinstance(plane.list_deployments(), list)
    assert "key" not in repr(plane)


# -- looks that wait -----------------------------------------------------------------------------


async def test_a_platform_that_can_not_wait_answers_at_once() -> None:
    stub = StubPlane()
    stub.answer(
        "GET /v1/accounts/me/rlorTrainerJobs/j",
        {"name": "accounts/me/rlorTrainerJobs/j", "state": "JOB_STATE_PENDING"},
        (404, {}),
    )
    async with serving(stub) as plane:
        first = await plane.look_at_job("j")
        assert first.row is not None
        assert (first.row.state, first.tag, first.held_s) == ("JOB_STATE_PENDING", None, None)
        gone = await plane.look_at_job("j", first, 10)
        assert (gone.row, gone.held_s) == (None, None)


async def test_a_look_waits_for_a_change_where_the_platform_can(
    platform: RunningPlatform,
) -> None:
    async with AsyncControlPlane.connect(
        base_url=platform.base_url, api_key=platform.api_key
    ) as plane:
        await plane.create_deployment("seen", {"baseModel": platform.model})
        try:
            look = await plane.look_at_deployment("seen")
            while look.row is not None and look.row.state != "READY":
                look = await plane.look_at_deployment("seen", look, 10)
            same = await plane.look_at_deployment("seen", look, 1)
            assert same.row is look.row
            assert same.held_s is not None
        finally:
            await plane.delete_deployment("seen")
        assert (await plane.look_at_deployment("seen", look, 10)).row is None
