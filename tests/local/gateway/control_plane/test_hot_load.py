"""Hot load over HTTP: every replica or none, and completions that say what sampled them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from fireworks_training.local.engine_frames import encode_control
from fireworks_training.local.gateway.control_plane.hot_load import PATH
from fireworks_training.local.gateway.inference.engine_client import EngineClient, LoadFailed
from fireworks_training.local.gateway.inference.engine_stream import Generation
from tests.local.engine.tiny_model import (
    engine_thread,
    make_engine,
    write_base,
    write_delta,
    write_lora,
)
from tests.local.gateway.serving_app import (
    DEPLOYMENT,
    HEADERS,
    HELLO,
    Served,
    make_model_folder,
    scripted,
    serving,
)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model_folder(tmp_path_factory.mktemp("model"))


async def post(
    served: Served, body: object, headers: dict[str, str] = HEADERS
) -> tuple[int, dict[str, Any]]:
    response = await served.session.post(PATH, json=body, headers=headers)
    return response.status, await response.json()


async def rows(
    served: Served, headers: dict[str, str] = HEADERS, query: str = ""
) -> list[dict[str, Any]]:
    response = await served.session.get(PATH + query, headers=headers)
    assert response.status == 200
    found: list[dict[str, Any]] = (await response.json())["replicas"]
    return found


async def settled(served: Served, target: str) -> dict[str, Any]:
    """The first replica's row once the load of `target` has ended."""
    async with asyncio.timeout(10):
        while True:
            row = (await rows(served))[0]
            state = row["loading_state"]
            if state["target_snapshot_identity"] == target and state["stage"] in ("ready", "error"):
                return row
            await asyncio.sleep(0.005)


async def test_a_base_snapshot_is_loaded_reported_and_named_by_completions(
    model_path: Path, tmp_path: Path
) -> None:
    async with serving(model_path, tmp_path) as served:
        manifest = write_base(served.store, "step-1", seed=3)
        before = await served.complete(prompt=[5, 6], max_tokens=8, temperature=0)
        assert "snapshot-identity" not in before["perf_metrics"]
        assert (await rows(served))[0]["current_snapshot_identity"] is None

        status, answer = await post(served, {"identity": "step-1", "reset_prompt_cache": True})
        assert status == 200
        assert answer == {"identity": "step-1", "replicas": 1, "long_poll": True}
        row = await settled(served, "step-1")
        assert row["loading_state"].pop("timings").keys() == {"prepare", "swap"}
        assert (load := row.pop("load"))["slots"] > 0
        assert (load["active"], load["waiting"]) == (0, 0)
        assert row == {
            "current_snapshot_identity": "step-1",
            "readiness": True,
            "loading_state": {"stage": "ready", "target_snapshot_identity": "step-1"},
            "tensors_sha256": manifest.sha256,
            "loaded_adapters": [],
        }
        after = await served.complete(prompt=[5, 6], max_tokens=8, temperature=0)
        metrics = after["perf_metrics"]
        assert metrics["snapshot-identity"] == metrics["snapshot-identity-first"] == "step-1"
        assert after["choices"][0]["raw_output"] != before["choices"][0]["raw_output"]
        assert served.live.loaded_identity == "step-1"

        # The same again changes nothing.
        await post(served, {"identity": "step-1"})
        assert (await settled(served, "step-1"))["current_snapshot_identity"] == "step-1"
        assert served.client.state.version == 1


async def test_an_adapter_is_listed_as_loaded(model_path: Path, tmp_path: Path) -> None:
    async with serving(model_path, tmp_path) as served:
        write_lora(served.store, "lora-1", seed=1)
        await post(served, {"identity": "lora-1"})
        row = await settled(served, "lora-1")
        assert row["current_snapshot_identity"] == "lora-1"
        assert row["loaded_adapters"] == [{"identity": "lora-1", "status": "loaded"}]


async def test_sync_lets_a_stream_finish_on_its_snapshot_and_the_next_has_the_new_one(
    model_path: Path, tmp_path: Path
) -> None:
    async with serving(model_path, tmp_path) as served:
        served.live.transition = "SYNC"
        write_base(served.store, "step-1", seed=3)
        request: dict[str, Any] = {"prompt": [5], "ignore_eos": True}
        first = asyncio.create_task(served.complete(**request, max_tokens=200))
        async with asyncio.timeout(10):
            while not served.client.active:  # noqa: ASYNC110 - the engine's own count
                await asyncio.sleep(0.001)
        await post(served, {"identity": "step-1"})
        second = await served.complete(**request, max_tokens=2)
        assert "snapshot-identity" not in (await first)["perf_metrics"]
        assert second["perf_metrics"]["snapshot-identity"] == "step-1"


async def test_async_goes_on_with_the_new_weights_and_says_where_they_changed(
    model_path: Path, tmp_path: Path
) -> None:
    async with serving(model_path, tmp_path) as served:
        write_base(served.store, "step-1", seed=3)
        write_delta(served.store, "step-2", "step-1", seed=4)
        await served.client.load("step-1")
        answer = asyncio.create_task(
            served.complete(prompt=[5], ignore_eos=True, max_tokens=240, logprobs=True)
        )
        async with asyncio.timeout(10):
            while not served.client.active:  # noqa: ASYNC110 - the engine's own count
                await asyncio.sleep(0.001)
        await post(served, {"identity": "step-2"})
        metrics = (await answer)["perf_metrics"]
        assert metrics["snapshot-identity-first"] == "step-1"
        assert metrics["snapshot-identity"] == "step-2"
        assert 0 < int(metrics["snapshot-switch-index"]) < 240


async def test_a_look_can_wait_for_a_load(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        # Nothing is under way: it does not wait.
        assert len(await rows(served, query="?wait_for=a&timeout_s=20")) == 1
        await post(served, {"identity": "a"})
        load = await engine.control("load")
        assert load["transition"] == "ASYNC"
        assert load["restore"] is False
        assert (await rows(served, query="?wait_for=a&timeout_s=0"))[0] is not None
        look = asyncio.create_task(rows(served, query="?wait_for=a"))
        await asyncio.sleep(0)
        engine.send(encode_control({**HELLO, "op": "status", "identity": "a", "target": "a"}))
        ended = {"op": "load_ended", "number": load["number"], "outcome": "loaded", "reason": None}
        engine.send(encode_control(ended))
        assert (await look)[0]["current_snapshot_identity"] == "a"
        await post(served, {"identity": "b"})
        response = await served.session.get(f"{PATH}?wait_for=b&timeout_s=soon", headers=HEADERS)
        assert response.status == 400


async def test_a_refused_snapshot_is_an_error_row_and_is_not_remembered(
    model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(model_path, tmp_path) as served:
        write_base(served.store, "good", seed=3)
        await served.client.load("good")
        assert (await post(served, {"identity": "gone"}))[0] == 200
        row = await settled(served, "gone")
        assert row["loading_state"]["stage"] == "error"
        assert "no snapshot 'gone'" in row["loading_state"]["error"]
        assert row["current_snapshot_identity"] == "good"
        assert row["readiness"] is True
        assert served.live.loaded_identity is None
        with pytest.raises(LoadFailed, match="no snapshot"):
            await served.client.load("gone")
        await served.complete(prompt=[5], max_tokens=1)
    assert "did not load gone" in caplog.text


async def test_a_delta_wants_its_predecessor(model_path: Path, tmp_path: Path) -> None:
    async with serving(model_path, tmp_path) as served:
        write_base(served.store, "a", seed=1)
        write_delta(served.store, "b", "a", seed=2)
        body = {
            "identity": "b",
            "incremental_snapshot_metadata": {
                "previous_snapshot_identity": "a",
                "compression_format": "arc_v2",
                "checksum_format": "alder32",
            },
        }
        status, answer = await post(served, body)
        assert status == 409
        assert "holds 'the base model'" in answer["error"]["message"]
        assert served.client.state.target is None
        # The engine trusts the snapshot itself, whatever the request says or leaves out.
        assert (await post(served, {"identity": "b"}))[0] == 200
        refused = (await settled(served, "b"))["loading_state"]
        assert "delta to 'a'" in refused["error"]
        assert "'the base model'" in refused["error"]
        await served.client.load("a")
        assert (await post(served, body))[0] == 200
        await settled(served, "b")
        # To be asked again for what is loaded is no mismatch.
        assert (await post(served, body))[0] == 200
        status, answer = await post(served, {**body, "identity": "c"})
        assert status == 409
        assert "holds 'b'" in answer["error"]["message"]


async def test_every_replica_is_asked_and_all_must_have_it(
    model_path: Path, tmp_path: Path
) -> None:
    async with serving(model_path, tmp_path) as served:
        socket = tmp_path / "f.sock"
        with engine_thread(make_engine(model_path, served.store), socket):
            second = EngineClient(socket, f"{DEPLOYMENT}/replicas/1")
            await second.connect()
            served.live.engines.append(second)
            served.live.desired_replicas = 3
            write_base(served.store, "a", seed=1)
            answer = (await post(served, {"identity": "a"}))[1]
            assert answer["replicas"] == 2
            await settled(served, "a")
            async with asyncio.timeout(10):
                while served.live.loaded_identity != "a":  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            found = await rows(served)
            assert [row["current_snapshot_identity"] for row in found] == ["a", "a", None]
            assert [row["readiness"] for row in found] == [True, True, False]
            assert found[2]["loading_state"] == {
                "stage": "pending",
                "target_snapshot_identity": "a",
            }
            await second.close(stop=True)


async def test_a_newer_load_replaces_one_that_waits(model_path: Path, tmp_path: Path) -> None:
    async with serving(model_path, tmp_path) as served:
        write_base(served.store, "a", seed=1)
        write_base(served.store, "b", seed=2)
        busy = served.client.generate(Generation([5], max_tokens=200, ignore_eos=True))
        await busy.next()
        first, second = served.client.request_load("a"), served.client.request_load("b")
        assert (await first).outcome == "superseded"
        assert (await second).outcome == "loaded"
        assert (await served.client.load("b")).outcome == "loaded"
        assert served.client.state.identity == "b"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "'identity'"),
        ({"identity": "../etc"}, "'identity'"),
        ({"identity": ""}, "'identity'"),
        ({"identity": "a", "reset_prompt_cache": 1}, "'reset_prompt_cache'"),
        ({"identity": "a", "rdma": True}, "Extra inputs are not permitted, field: 'rdma'"),
        ({"identity": "a", "incremental_snapshot_metadata": {}}, "previous_snapshot_identity"),
    ],
)
async def test_bad_bodies(model_path: Path, tmp_path: Path, body: object, message: str) -> None:
    async with scripted(model_path, tmp_path) as (served, _):
        status, answer = await post(served, body)
        assert status == 400
        assert message in answer["error"]["message"]


async def test_the_header_names_the_deployment(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, _):
        for call in (served.session.post, served.session.get):
            assert (await call(PATH)).status == 400
            unknown = {"fireworks-deployment": "accounts/local/deployments/none"}
            assert (await call(PATH, headers=unknown)).status == 404
        served.live.engines.clear()
        served.live.desired_replicas = 0
        assert await rows(served) == []
        response = await served.session.post(PATH, json={"identity": "a"}, headers=HEADERS)
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert served.woken == [DEPLOYMENT]


async def test_an_engine_that_dies_while_loading_is_reported(
    model_path: Path, tmp_path: Path
) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        assert (await post(served, {"identity": "a", "reset_prompt_cache": False}))[0] == 200
        load = await engine.control("load")
        status = {**HELLO, "op": "status", "stage": "loading", "target": "a"}
        engine.send(encode_control(status))
        async with asyncio.timeout(10):
            while (await rows(served))[0]["loading_state"]["stage"] != "loading":
                pass
        ending = served.client.request_load("b")
        engine.die()
        ended = await ending
        assert (ended.outcome, "gone" in (ended.reason or "")) == ("failed", True)
        assert (await rows(served))[0]["readiness"] is False
        assert served.live.loaded_identity is None
        assert load["identity"] == "a"
