"""Provisioning: together, cancelled anywhere, never leaking, never touching what was there."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from fireworks_training import (
    ApiError,
    ApiStatusError,
    AsyncFiretitanServiceClient,
    ClientClosed,
    FiretitanProvisioningConfig,
    FiretitanServiceClient,
    InvalidArgument,
    NotSupported,
    ProvisioningError,
    ProvisioningTimeout,
)
from fireworks_training._async.control_plane.bodies import job_body, job_query
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.resources import ownership, readiness
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._async.resources.ownership import RunResources
from fireworks_training._async.resources.plans import Resources, provision, reference_config
from fireworks_training._core.ledger import OpenClaim, fold
from fireworks_training.options import DeploymentConfig
from fireworks_training.testing import ControlPlaneServer
from fireworks_training.testing.control_plane_server import DEPLOYMENTS, JOBS


@pytest.fixture
def stub() -> Iterator[ControlPlaneServer]:
    with ControlPlaneServer() as running:
        yield running


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "fireworks-training" / "ledger.jsonl"


def service_on(stub: ControlPlaneServer, **options: Any) -> AsyncFiretitanServiceClient:
    options = {"base_model": "accounts/x/models/tiny", "cleanup_trainer_on_close": True} | options
    options = {"cleanup_deployment_on_close": "delete"} | options
    return AsyncFiretitanServiceClient.from_firetitan_config(
        api_key="key", base_url=stub.url, **options
    )


def events(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [f"{row['event']} {row['kind']}" for row in rows]


def open_claims() -> list[OpenClaim]:
    return fold(LedgerFile().read())


class OfAnotherAccount(AsyncControlPlane):
    def __init__(self) -> None:
        pass

    async def account(self) -> str:
        return "somebody"


async def test_an_option_of_the_local_platform_is_refused_elsewhere() -> None:
    config = FiretitanProvisioningConfig(base_model="m", snapshot_dtype="float32")
    resources = Resources()
    with pytest.raises(NotSupported, match="snapshot_dtype"):
        await provision(OfAnotherAccount(), config, resources, RunResources("http://x"))
    assert resources == Resources()


async def test_what_is_made_carries_the_nonce_and_stands_in_the_ledger(
    stub: ControlPlaneServer, ledger: Path
) -> None:
    async with service_on(stub, display_name="n" * 63) as service:
        await service.create_training_client()
        nonce = service._provisioner.holdings.nonce
        assert {claim.last.nonce for claim in open_claims()} == {nonce}
        (job,) = stub.sent("POST", JOBS)
        assert job["displayName"].endswith(f"… ft-{nonce}")
        assert len(job["displayName"]) == 63
        (deployment,) = stub.sent("POST", DEPLOYMENTS)
        assert deployment["annotations"] == {"fireworks-training-run": nonce}
        assert deployment["hotLoadTrainerJob"].endswith(service.trainer_job_id or "-")
    assert stub.left() == []
    kinds = ("trainer", "deployment")
    assert sorted(events(ledger)) == sorted(
        f"{event} {kind}" for event in ("intent", "created", "gone") for kind in kinds
    )


async def test_kept_by_policy_is_noted(stub: ControlPlaneServer) -> None:
    options = {"cleanup_trainer_on_close": False, "cleanup_deployment_on_close": "scale_to_zero"}
    async with service_on(stub, **options) as service:
        await service.create_training_client()
    assert len(stub.left()) == 2
    (patch,) = stub.sent("PATCH", DEPLOYMENTS)
    assert patch == {"minReplicaCount": 0, "maxReplicaCount": 0}
    assert {claim.last.event for claim in open_claims()} == {"kept"}


async def test_an_answer_that_was_lost_does_not_lose_the_ownership(
    stub: ControlPlaneServer,
) -> None:
    stub.lost_answers = ["POST"]
    async with service_on(stub, create_deployment=False) as service:
        await service.create_training_client()
        assert len(stub.sent("POST", JOBS)) == 2  # the second was answered 409
    assert stub.left() == []


async def test_what_was_found_is_never_touched(stub: ControlPlaneServer) -> None:
    stub.put(JOBS, "mine")
    stub.put(DEPLOYMENTS, "serving", hotLoadTrainerJob="accounts/me/rlorTrainerJobs/mine")
    before = stub.left()
    async with service_on(stub, trainer_job_id="mine", deployment_id="serving") as service:
        await service.create_training_client()
        assert service.requires_initial_sampler_sync()
    assert stub.left() == before
    assert {method for method, path, _ in stub.requests if "/api/v1/" not in path} == {"GET"}
    assert open_claims() == []


async def test_the_trainer_fails_and_the_deployment_is_not_waited_for(
    stub: ControlPlaneServer,
) -> None:
    stub.states = {
        JOBS: ["JOB_STATE_CREATING", ("JOB_STATE_FAILED", "no such image")],
        DEPLOYMENTS: ["CREATING"],
    }
    service = service_on(stub)
    async with asyncio.timeout(20):  # the deployment would take for ever
        with pytest.raises(ProvisioningError, match="FAILED: no such image") as failure:
            await service.create_training_client()
    assert failure.value.state == "JOB_STATE_FAILED"
    assert stub.left() == []
    assert open_claims() == []
    await service.close()


async def test_the_deployment_fails_and_the_trainer_that_was_found_stays(
    stub: ControlPlaneServer,
) -> None:
    stub.put(JOBS, "mine")
    stub.states = {JOBS: ["JOB_STATE_CREATING"], DEPLOYMENTS: [("FAILED", "no capacity")]}
    async with service_on(stub, trainer_job_id="mine") as service:
        with pytest.raises(ProvisioningError, match="no capacity"):
            await service.create_training_client()
        assert stub.left() == [f"{JOBS}/mine"]
        # The next attempt starts from nothing.
        stub.states = {}
        await service.create_training_client()


async def test_capacity_and_readiness_have_budgets_of_their_own(stub: ControlPlaneServer) -> None:
    stub.states = {JOBS: [("JOB_STATE_PENDING", "all places are taken")]}
    async with service_on(
        stub, create_deployment=False, trainer_pending_timeout_s=0.1, trainer_timeout_s=60
    ) as service:
        with pytest.raises(ProvisioningTimeout, match=r"all places are taken.*budget 0 s"):
            await service.create_training_client()
    stub.states = {JOBS: ["JOB_STATE_PENDING", "JOB_STATE_CREATING"]}
    async with service_on(
        stub, create_deployment=False, trainer_pending_timeout_s=60, trainer_timeout_s=0.1
    ) as service:
        with pytest.raises(ProvisioningTimeout, match="CREATING"):
            await service.create_training_client()
    assert stub.left() == []


async def test_a_control_plane_that_is_away_for_a_while_does_not_end_a_wait(
    stub: ControlPlaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fireworks_training._async.http import transport

    monkeypatch.setattr(
        transport.Backoff.__init__,
        "__kwdefaults__",
        {**transport.Backoff.__init__.__kwdefaults__, "attempts": 1},
    )
    stub.states = {JOBS: ["JOB_STATE_PENDING", "JOB_STATE_PENDING", "JOB_STATE_RUNNING"]}
    async with service_on(stub, create_deployment=False) as service:
        stub.deny[("GET", f"{JOBS}/")] = [503, 503]
        await service.create_training_client()
        assert stub.deny[("GET", f"{JOBS}/")] == []
        # The negative control: what will not pass ends the wait.
    stub.deny[("GET", f"{JOBS}/")] = [403]
    async with service_on(stub, create_deployment=False) as service:
        with pytest.raises(ApiStatusError, match="403"):
            await service.create_training_client()
    assert stub.left() == []


async def test_a_deployment_that_answers_is_ready_though_it_is_creating(
    stub: ControlPlaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "PROBE_EVERY", 0.001)
    stub.states, stub.serving = {DEPLOYMENTS: ["CREATING"]}, True
    async with service_on(stub) as service:
        await service.create_training_client()
        assert service.deployment_id is not None
        (probe, *_) = stub.sent("POST", "/inference/v1/completions")
        assert probe["model"] == f"accounts/me/deployments/{service.deployment_id}"
    # The negative control: without an answer it is not.
    stub.serving = False
    async with service_on(stub, deployment_timeout_s=0.2) as service:
        with pytest.raises(ProvisioningTimeout, match="CREATING"):
            await service.create_training_client()
    assert stub.left() == []


# -- reconnecting --------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "PAUSED", "COMPLETED"])
async def test_a_job_that_stands_is_resumed(stub: ControlPlaneServer, state: str) -> None:
    stub.put(JOBS, "mine")
    # The old state shows a little longer than the answer to the resume.
    stub.states = {JOBS: [f"JOB_STATE_{state}"] * 3 + ["JOB_STATE_CREATING", "JOB_STATE_RUNNING"]}
    async with service_on(stub, trainer_job_id="mine", create_deployment=False) as service:
        await service.create_training_client()
    assert stub.resumed == [f"{JOBS}/mine"]


async def test_a_job_that_is_stopping_is_resumed_once_it_stands(stub: ControlPlaneServer) -> None:
    stub.put(JOBS, "mine")
    stub.states = {
        JOBS: ["JOB_STATE_CANCELLING"] * 2 + ["JOB_STATE_CANCELLED", "JOB_STATE_RUNNING"]
    }
    async with service_on(stub, trainer_job_id="mine", create_deployment=False) as service:
        await service.create_training_client()
    assert stub.resumed == [f"{JOBS}/mine"]


async def test_a_job_that_somebody_else_resumed_is_waited_for(stub: ControlPlaneServer) -> None:
    stub.put(JOBS, "mine", state="JOB_STATE_CANCELLED")
    stub.states = {JOBS: ["JOB_STATE_CANCELLED", "JOB_STATE_CREATING", "JOB_STATE_RUNNING"]}
    stub.deny[("POST", f"{JOBS}/mine:resume")] = [409]
    async with service_on(stub, trainer_job_id="mine", create_deployment=False) as service:
        await service.create_training_client()
    assert stub.deny[("POST", f"{JOBS}/mine:resume")] == []
    # The control: a job that stands, and may not be resumed.
    stub.put(JOBS, "other", state="JOB_STATE_CANCELLED")
    stub.states = {JOBS: ["JOB_STATE_CANCELLED"]}
    stub.deny[("POST", f"{JOBS}/other:resume")] = [409]
    async with service_on(stub, trainer_job_id="other", create_deployment=False) as service:
        with pytest.raises(ApiStatusError, match="409"):
            await service.create_training_client()


async def test_a_job_that_is_deleted_is_refused(stub: ControlPlaneServer) -> None:
    stub.put(JOBS, "mine", state="JOB_STATE_DELETED")
    async with service_on(stub, trainer_job_id="mine", create_deployment=False) as service:
        with pytest.raises(ProvisioningError, match="can't be used again"):
            await service.create_training_client()


async def test_a_job_of_an_id_that_does_not_exist_is_made_under_it(
    stub: ControlPlaneServer,
) -> None:
    async with service_on(stub, trainer_job_id="mine", create_deployment=False) as service:
        await service.create_training_client()
        assert stub.left() == [f"{JOBS}/mine"]
    assert stub.left() == []  # it was made here, so it goes


async def test_a_deployment_is_changed_by_one_patch_of_what_differs(
    stub: ControlPlaneServer,
) -> None:
    stub.put(DEPLOYMENTS, "serving", hotLoadTrainerJob="accounts/me/rlorTrainerJobs/old")
    async with service_on(
        stub, deployment_id="serving", hot_load_transition_type="sync"
    ) as service:
        await service.create_training_client()
        (patch,) = stub.sent("PATCH", DEPLOYMENTS)
        assert patch == {
            "hotLoadTrainerJob": f"accounts/me/rlorTrainerJobs/{service.trainer_job_id}",
            "hotLoadTransitionType": "SYNC",
        }
    assert stub.left() == [f"{DEPLOYMENTS}/serving"]


async def test_a_deployment_that_is_updating_is_changed_once_it_is_ready(
    stub: ControlPlaneServer,
) -> None:
    old = "accounts/me/rlorTrainerJobs/old"
    stub.put(DEPLOYMENTS, "serving", state="UPDATING", hotLoadTrainerJob=old)
    stub.states = {DEPLOYMENTS: ["UPDATING", "UPDATING", "UPDATING", "READY"]}
    async with service_on(stub, deployment_id="serving") as service:
        await service.create_training_client()
    of_it = [m for m, path, _ in stub.requests if path == f"{DEPLOYMENTS}/serving"]
    assert of_it.index("PATCH") >= 4


async def test_a_deployment_is_asked_for_when_its_trainer_exists(
    stub: ControlPlaneServer,
) -> None:
    """A control plane that checks references refuses a job that it does not have yet."""
    stub.slow = {"POST": threading.Event()}
    async with service_on(stub) as service:
        making = asyncio.ensure_future(service.create_training_client())
        await stub.until(lambda: bool(stub.sent("POST", JOBS)))
        assert stub.sent("POST", DEPLOYMENTS) == []
        stub.slow["POST"].set()
        await making
        posts = [path for method, path, _ in stub.requests if method == "POST"]
        assert posts.index(JOBS) < posts.index(DEPLOYMENTS)


async def test_a_reference_trainer_has_neither_the_policys_shape_nor_its_replicas(
    stub: ControlPlaneServer,
) -> None:
    config = FiretitanProvisioningConfig(
        base_model="m",
        training_shape_id="accounts/a/trainingShapes/policy",
        trainer_replica_count=4,
        use_reservation=False,
    )
    of_reference = reference_config(config)
    body = job_body(of_reference, "n")
    assert "trainerReplicaCount" not in body
    assert job_query(of_reference, None) == {}
    assert body["forwardOnly"] is True
    assert body["useReservation"] is False
    own = replace(config, reference_training_shape_id="accounts/a/trainingShapes/forward")
    assert job_query(reference_config(own), None)["trainingShape"].endswith("/forward")


async def test_what_fails_is_raised_without_the_group_that_it_came_in(
    stub: ControlPlaneServer,
) -> None:
    """A notebook that shows a context can't show a group."""
    stub.states = {JOBS: [("JOB_STATE_FAILED", "no such image")]}
    async with service_on(stub) as service:
        with pytest.raises(ProvisioningError) as failure:
            await service.create_training_client()
    seen: BaseException | None = failure.value
    while seen is not None:
        assert not isinstance(seen, BaseExceptionGroup)
        seen = seen.__cause__ or seen.__context__


async def test_a_change_that_does_not_settle_is_a_timeout(stub: ControlPlaneServer) -> None:
    stub.put(DEPLOYMENTS, "serving", hotLoadTrainerJob="accounts/me/rlorTrainerJobs/old")
    stub.states = {DEPLOYMENTS: ["READY", "UPDATING"]}
    async with service_on(stub, deployment_id="serving", reattach_settle_timeout_s=0.1) as service:
        with pytest.raises(ProvisioningTimeout, match="UPDATING"):
            await service.create_training_client()
    assert stub.left() == [f"{DEPLOYMENTS}/serving"]


async def test_a_deployment_of_another_shape_is_refused(stub: ControlPlaneServer) -> None:
    shapes = "accounts/x/deploymentShapes"
    stub.put(DEPLOYMENTS, "serving", deploymentShape=f"{shapes}/big/versions/3")
    async with service_on(
        stub, deployment_id="serving", deployment_shape=f"{shapes}/small"
    ) as service:
        with pytest.raises(InvalidArgument, match="has the shape"):
            await service.create_training_client()
    assert stub.left() == [f"{DEPLOYMENTS}/serving"]
    assert stub.sent("PATCH", DEPLOYMENTS) == []
    async with service_on(
        stub, deployment_id="serving", deployment_shape=f"{shapes}/big/versions/4"
    ) as service:
        await service.create_training_client()  # another version is fine


# -- cancelled -----------------------------------------------------------------------------------


class Counted(Coroutine[Any, Any, Any]):
    """A coroutine that tells when it suspends."""

    def __init__(self, inner: Any, suspended: Any) -> None:
        self._inner, self._suspended = inner, suspended

    def _step(self, step: Any, *arguments: Any) -> Any:
        waits_for = step(*arguments)
        self._suspended()
        return waits_for

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *arguments: Any) -> Any:
        return self._step(self._inner.throw, *arguments)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield from self._inner.__await__())


async def provision_cancelled_at(stub: ControlPlaneServer, number: int) -> bool:
    """Provision, and cancel the caller at the `number`th suspension of any task of the client.

    Whether it came to that before the end.
    """
    loop = asyncio.get_running_loop()
    seen, caller = 0, list[asyncio.Task[Any]]()

    def suspended() -> None:
        nonlocal seen
        seen += 1
        if seen == number and caller:
            loop.call_soon(caller[0].cancel)

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> Any:
        return asyncio.Task(Counted(coroutine, suspended), loop=loop, **options)

    service = service_on(stub)
    loop.set_task_factory(factory)
    try:
        caller.append(asyncio.ensure_future(service.create_training_client()))
        await asyncio.wait(caller)
    finally:
        loop.set_task_factory(None)
    allowed = {"fireworks_training: heartbeat"}
    if service.trainer_job_id is not None:
        allowed.add("fireworks_training: usage")
    if not caller[0].cancelled():
        caller[0].result()
    elif service.trainer_job_id is not None:
        # Provisioned; the cancellation came while the model was made. It is held, and given back.
        assert service._provisioner.holdings.open
    else:
        assert stub.left() == []
        assert open_claims() == []
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert {task.get_name() for task in others} <= allowed
    await service.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert stub.left() == []
    assert open_claims() == []
    return caller[0].cancelled()


async def test_every_await_cancelled_in_turn_leaves_nothing(stub: ControlPlaneServer) -> None:
    stub.states = {JOBS: ["JOB_STATE_PENDING", "JOB_STATE_CREATING", "JOB_STATE_RUNNING"]}
    points = 0
    while await provision_cancelled_at(stub, points + 1):
        points += 1
        stub.states = {JOBS: ["JOB_STATE_PENDING", "JOB_STATE_CREATING", "JOB_STATE_RUNNING"]}
    assert points > 30


async def test_cancelled_while_a_create_request_is_on_its_way(stub: ControlPlaneServer) -> None:
    gate = stub.slow["POST"] = threading.Event()
    service = service_on(stub, create_deployment=False)
    call = asyncio.ensure_future(service.create_training_client())
    await stub.until(lambda: stub.sent("POST", JOBS) != [])
    call.cancel()
    await asyncio.sleep(0)
    gate.set()
    await asyncio.wait([call])
    assert call.cancelled()
    assert stub.left() == []
    assert open_claims() == []
    await service.close()


async def test_close_ends_an_attempt_under_way(stub: ControlPlaneServer) -> None:
    stub.states = {JOBS: [("JOB_STATE_PENDING", "full")]}
    service = service_on(stub)
    call = asyncio.ensure_future(service.create_training_client())
    await stub.until(lambda: len(stub.left()) == 2)
    await service.close()
    with pytest.raises(ClientClosed):
        await call
    assert stub.left() == []
    assert open_claims() == []


async def test_a_ledger_that_cannot_be_written_is_said_once(
    stub: ControlPlaneServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("in the way")
    async with service_on(stub) as service:
        await service.create_training_client()
    assert stub.left() == []
    said = [record for record in caplog.records if "can't be written" in record.message]
    assert len(said) == 1


def test_the_blocking_twin_gives_back_too(stub: ControlPlaneServer) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        api_key="key",
        base_url=stub.url,
        base_model="accounts/x/models/tiny",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        service.create_training_client()
        assert len(stub.left()) == 2
    assert stub.left() == []


async def test_the_check_of_every_await_sees_a_clean_up_that_is_missing(
    stub: ControlPlaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control."""

    async def nothing(*_: Any) -> None:
        pass

    monkeypatch.setattr(RunResources, "abandon", nothing)
    stub.states = {JOBS: ["JOB_STATE_PENDING"]}
    service = service_on(stub)
    call = asyncio.ensure_future(service.create_training_client())
    await stub.until(lambda: len(stub.left()) == 2)
    call.cancel()
    await asyncio.wait([call])
    assert len(stub.left()) == 2
    assert len(open_claims()) == 2
    await service.close()  # it still knows what it made
    assert stub.left() == []


# -- deployments that only serve -----------------------------------------------------------------


async def test_an_inference_deployment_is_made_and_given_back(stub: ControlPlaneServer) -> None:
    async with service_on(stub) as service:
        sampler = await service.create_inference_deployment_sampler(
            DeploymentConfig("judge", "accounts/x/models/judge", region="here"),
            cleanup_on_close="delete",
            tokenizer=cast(Any, object()),
        )
        assert sampler.model == "accounts/me/deployments/judge"
        (body,) = stub.sent("POST", DEPLOYMENTS)
        assert body["annotations"] == service._provisioner.holdings.annotations()
        assert body["placement"] == {"region": "here"}
        assert stub.left() == [f"{DEPLOYMENTS}/judge"]  # no trainer was needed
    assert stub.left() == []
    assert open_claims() == []


async def test_an_inference_deployment_that_was_found_stays_and_a_failed_one_is_named(
    stub: ControlPlaneServer,
) -> None:
    stub.put(DEPLOYMENTS, "judge")
    judge = DeploymentConfig("judge", "accounts/x/models/judge")
    async with service_on(stub) as service:
        await service.create_inference_deployment_sampler(
            judge, cleanup_on_close="delete", tokenizer=cast(Any, object())
        )
    assert stub.left() == [f"{DEPLOYMENTS}/judge"]
    stub.put(DEPLOYMENTS, "judge", state="FAILED")
    async with service_on(stub) as service:
        with pytest.raises(ProvisioningError, match="FAILED"):
            await service.create_inference_deployment_sampler(judge)
        with pytest.raises(InvalidArgument, match="max_replica_count"):
            await service.create_inference_deployment_sampler(replace(judge, max_replica_count=0))


async def test_an_inference_deployment_that_does_not_come_up_is_deleted(
    stub: ControlPlaneServer,
) -> None:
    async with service_on(stub) as service:
        await service.create_training_client()
        stub.states = {DEPLOYMENTS: ["CREATING"]}
        with pytest.raises(ProvisioningTimeout):
            await service.create_inference_deployment_sampler(
                DeploymentConfig("judge", "accounts/x/models/judge"), timeout_s=0.05
            )
        assert f"{DEPLOYMENTS}/judge" not in stub.left()
        assert len(stub.left()) == 2  # what the service has stays


# -- the end -------------------------------------------------------------------------------------


async def test_things_are_given_back_in_order(stub: ControlPlaneServer) -> None:
    async with service_on(stub, reference_required=True) as service:
        await service.create_training_client()
        await service.create_inference_deployment_sampler(
            DeploymentConfig("judge", "accounts/x/models/judge"),
            cleanup_on_close="delete",
            tokenizer=cast(Any, object()),
        )
        names = [
            f"{JOBS}/{service.reference_job_id}",
            f"{DEPLOYMENTS}/judge",
            f"{DEPLOYMENTS}/{service.deployment_id}",
            f"{JOBS}/{service.trainer_job_id}",
        ]
    assert [path for method, path, _ in stub.requests if method == "DELETE"] == names


async def test_a_failure_on_the_way_does_not_stop_the_rest_and_is_raised_at_the_end(
    stub: ControlPlaneServer,
) -> None:
    service = service_on(stub)
    await service.create_training_client()
    stub.deny[("DELETE", DEPLOYMENTS)] = [403]
    with pytest.raises(ApiStatusError, match="403"):
        await service.close()
    assert stub.left() == [f"{DEPLOYMENTS}/{service.deployment_id}"]
    assert [claim.last.event for claim in open_claims()] == ["created"]  # `reap` will find it
    await service.close()  # said once


async def test_close_is_bounded_and_names_what_is_left(
    stub: ControlPlaneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "CLEAN_UP_TIMEOUT", 0.05)
    service = service_on(stub)
    await service.create_training_client()
    stub.slow["DELETE"] = threading.Event()
    with pytest.raises(ApiError, match=r"not cleaned up within .*deployment tiny-.*trainer "):
        await service.close()
    assert len(open_claims()) == 2


async def test_close_goes_on_when_its_waiter_is_cancelled(stub: ControlPlaneServer) -> None:
    service = service_on(stub)
    await service.create_training_client()
    gate = stub.slow["DELETE"] = threading.Event()
    call = asyncio.ensure_future(service.close())
    await stub.until(lambda: stub.sent("DELETE", DEPLOYMENTS) != [])
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    gate.set()
    await service.close()
    assert stub.left() == []
    assert open_claims() == []
