"""The control plane's client: what it sends, reads and refuses; against a stub, and for real."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
from aiohttp import web

from fireworks_training import (
    ApiStatusError,
    AsyncControlPlane,
    Conflict,
    ControlPlane,
    FireworksTrainingError,
    InvalidArgument,
    NotFound,
    ProtocolError,
    ProvisioningError,
    ProvisioningTimeout,
)
from fireworks_training._async.control_plane.promotions import promotion_path
from fireworks_training._core import control_patience
from tests.async_.control_plane.support import StubPlane
from tests.conftest import RunningPlatform

CHECKPOINT = "accounts/me/rlorTrainerJobs/j1/checkpoints/step-5"
PROMOTE = "POST /v1/accounts/me/checkpoints/step-5:promote"


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
    stub.answer(PROMOTE, {"operation": {"name": "accounts/me/operations/o"}})
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
            "trainer_job_id": "accounts/me/rlorTrainerJobs/j1",
        }
    ]


@pytest.mark.parametrize(
    "refusal",
    ["async_promotion: extra inputs are not permitted", 'Unknown name "asyncPromotion": no field'],
)
async def test_a_server_that_does_not_know_async_promotion_is_asked_without(refusal: str) -> None:
    stub = StubPlane()
    stub.answer(
        PROMOTE,
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
        PROMOTE,
        (400, {"error": {"message": "base_model: not the model of the checkpoint"}}),
    )
    async with serving(stub) as plane:
        with pytest.raises(ApiStatusError, match="base_model"):
            await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")
    assert sum(method == "POST" for method, _, _ in stub.seen) == 1


async def test_a_failed_promotion_says_why_and_a_slow_one_names_its_operation() -> None:
    stub = StubPlane()
    name = "accounts/me/operations/o"
    stub.answer(PROMOTE, {"operation": {"name": name}})
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


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (CHECKPOINT, "/v1/accounts/me/checkpoints/step-5:promote"),
        *(
            (name, f"/v1/{name}:promote")
            for name in (
                "accounts/me/trainingSessions/s/checkpoints/c",
                "accounts/me/dpoJobs/j/checkpoints/c",
            )
        ),
    ],
)
def test_a_checkpoint_is_promoted_where_its_kind_of_job_has_them(name: str, path: str) -> None:
    assert promotion_path(name) == path


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


# -- answers that were lost ----------------------------------------------------------------------

JOB = "accounts/me/rlorTrainerJobs/j1"
LOST = (503, {"error": {"message": "the answer was lost"}})


@pytest.mark.parametrize("refusal", [400, 409])
@pytest.mark.parametrize("state", ["JOB_STATE_CREATING", "JOB_STATE_RUNNING", "JOB_STATE_FAILED"])
async def test_a_resume_whose_answer_was_lost_is_judged_by_the_job(
    refusal: int, state: str
) -> None:
    stub = StubPlane()
    stub.answer(f"POST /v1/{JOB}:resume", LOST, (refusal, {"error": {"message": "is starting"}}))
    stub.answer(f"GET /v1/{JOB}", {"name": JOB, "state": state})
    async with serving(stub) as plane:
        await plane.resume_job("j1")


async def test_a_resume_that_is_refused_at_once_is_refused() -> None:
    stub = StubPlane()
    stub.answer(f"POST /v1/{JOB}:resume", (409, {"error": {"message": "is running"}}))
    stub.answer(f"GET /v1/{JOB}", {"name": JOB, "state": "JOB_STATE_RUNNING"})
    async with serving(stub) as plane:
        with pytest.raises(Conflict, match="is running"):
            await plane.resume_job("j1")


async def test_a_promotion_whose_answer_was_lost_is_judged_by_the_model() -> None:
    stub = StubPlane()
    taken = (409, {"error": {"message": "there is such a model"}})
    stub.answer(PROMOTE, LOST, taken)
    model = {"name": "accounts/me/models/mine"}
    stub.answer(
        "GET /v1/accounts/me/models/mine",
        {**model, "state": "UPLOADING"},
        {**model, "state": "UPLOADING"},
        {**model, "state": "READY"},
    )
    async with serving(stub) as plane:
        made = await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")
        assert made.state == "READY"
        # The control: a name that was taken before is refused, and not taken for our own.
        stub.answer(PROMOTE, taken)
        with pytest.raises(Conflict):
            await plane.promote_checkpoint(CHECKPOINT, "mine", "accounts/x/models/base")


# -- answers of any shape ------------------------------------------------------------------------

JUNK: list[Any] = [None, True, 0, 7, -1, 1.5, "", "ab", "\x00", [], [None], [1], ["x"], [[]], [{}]]
JUNK += [{}, {"name": 1}, {"name": None}, {"name": []}, {"name": "n", "state": 3}]
JUNK += [[{"name": "n", "status": "x", "state": None}], {"error": 5}, {"metadata": [1]}]
FIELDS = [
    "name",
    "state",
    "status",
    "statusMessage",
    "trainingConfig",
    "annotations",
    "replicaCount",
    "maxReplicaCount",
    "snapshot",
    "done",
    "error",
    "metadata",
    "response",
    "operation",
    "model",
    "baseModelDetails",
    "contextLength",
    "checkpointType",
    "createTime",
    "displayName",
    "nextPageToken",
    "accounts",
    "rlorTrainerJobs",
    "deployments",
    "models",
    "trainingShapes",
    "trainingShapeVersions",
    "checkpoints",
    "hotLoadTrainerJob",
    "promotable",
]
SHAPE = "accounts/a/trainingShapes/s"

PLANE_CALLS: dict[str, Callable[[AsyncControlPlane], Awaitable[object]]] = {
    "account": lambda plane: plane.account(),
    "get_model": lambda plane: plane.get_model("accounts/me/models/m"),
    "list_models": lambda plane: plane.list_models(),
    "list_training_shapes": lambda plane: plane.list_training_shapes(),
    "training_profile": lambda plane: plane.training_profile(SHAPE),
    "pinned profile": lambda plane: plane.training_profile(
        "accounts/a/trainingShapes/s/versions/1"
    ),
    "create_job": lambda plane: plane.create_job("j", {}),
    "get_job": lambda plane: plane.get_job("j"),
    "look_at_job": lambda plane: plane.look_at_job("j"),
    "list_jobs": lambda plane: plane.list_jobs(),
    "resume_job": lambda plane: plane.resume_job("j"),
    "delete_job": lambda plane: plane.delete_job("j"),
    "create_deployment": lambda plane: plane.create_deployment("d", {}),
    "get_deployment": lambda plane: plane.get_deployment("d"),
    "look_at_deployment": lambda plane: plane.look_at_deployment("d"),
    "list_deployments": lambda plane: plane.list_deployments(),
    "update_deployment": lambda plane: plane.update_deployment("d", {}),
    "list_checkpoints": lambda plane: plane.list_checkpoints("j"),
    "promote": lambda plane: plane.promote_checkpoint(CHECKPOINT, "m", "b", timeout_s=0.05),
    "get_operation": lambda plane: plane.get_operation("accounts/me/operations/o"),
}


class Babbling(StubPlane):
    """Answers every request with the same JSON, the account's aside."""

    said: Any = None
    account_too = False

    async def handle(self, request: web.Request) -> web.Response:
        if request.path == "/v1/accounts" and not self.account_too:
            return web.json_response({"accounts": [{"name": "accounts/me"}]})
        return web.json_response(self.said)


@pytest.mark.parametrize("call", PLANE_CALLS)
async def test_no_answer_of_any_route_raises_an_untyped_error(call: str) -> None:
    """Whole answers, and each field of an otherwise sound row, replaced by junk."""
    stub = Babbling()
    random = Random(call)
    answers = [*JUNK]
    sound = {"name": "accounts/me/x/y", "state": "READY", "done": True}
    for name in FIELDS:
        answers += [{**sound, name: value} for value in random.sample(JUNK, 8)]
        answers.append({name: [{**sound, other: random.choice(JUNK)} for other in FIELDS[:6]]})
    failures = 0
    async with stub.running() as url:
        stub.account_too = call == "account"
        for answer in answers:
            stub.said = answer
            async with AsyncControlPlane.connect(api_key="key", base_url=url) as plane:
                try:
                    await PLANE_CALLS[call](plane)
                except FireworksTrainingError:
                    failures += 1
    assert failures > 0  # the control: much of it is refused


@pytest.mark.parametrize("accounts", [None, [1], [{}], "ab", {"name": "x"}, [{"name": 3}]])
async def test_accounts_of_any_shape_are_a_typed_error_that_names_the_route(accounts: Any) -> None:
    stub = StubPlane()
    stub.answer("GET /v1/accounts", {"accounts": accounts})
    async with serving(stub) as plane:
        with pytest.raises((ProtocolError, InvalidArgument), match=r"account"):
            await plane.account()


async def test_an_explicit_null_is_an_empty_list() -> None:
    stub = StubPlane()
    stub.answer("GET /v1/accounts/me/rlorTrainerJobs", {"rlorTrainerJobs": None})
    stub.answer("GET /v1/accounts/me/rlorTrainerJobs/j1/checkpoints", {"checkpoints": None})
    async with serving(stub) as plane:
        assert await plane.list_jobs() == []
        assert await plane.list_checkpoints("j1") == []


async def test_a_paused_account_is_said_in_words(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_patience, "BILLING_PAUSE", 0.0)
    stub = StubPlane()
    unpaid = (402, {"error": {"message": "no funds"}})
    stub.answer("GET /v1/accounts/me/deployments", unpaid, unpaid, {"deployments": []})
    async with serving(stub) as plane:
        assert await plane.list_deployments() == []
    said = [record.getMessage() for record in caplog.records if "billing" in record.getMessage()]
    assert len(said) == 1
