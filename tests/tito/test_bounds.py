"""What an agent, an observer or a caller may do at the wrong moment, or too often: nothing is lost,
mixed up, or left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import aiohttp
import pytest

from fireworks_training import ClientClosed, DeploymentSampler, TITOError, TITOSidecar
from fireworks_training.testing import CompletionsServer
from fireworks_training.tito import (
    TITOChatRequest,
    TITOParseError,
    TITOTrajectoryArtifact,
    TITOTrajectoryEndpoint,
    normalize_openai_tool_arguments,
)
from fireworks_training.tito.rendering import chat_template
from fireworks_training.tito.turns import history
from fireworks_training.tito.turns import trajectory as trajectory_module
from fireworks_training.tito.values import artifacts
from tests.async_.sampling.support import until
from tests.tito.conftest import Sidecars
from tests.tito.support import ask, says, user

HELLO = [user("hello")]


class Observer:
    """Fails at the events that it is told to fail at; `slow` ones wait for `go_on`."""

    def __init__(self, *fails: str, slow: Sequence[str] = ()) -> None:
        self.fails = fails
        self.slow = slow
        self.go_on = threading.Event()
        self.told: list[str] = []
        self.threads: list[str] = []

    def _tell(self, event: str) -> None:
        if event in self.slow:
            self.go_on.wait(10)
        self.told.append(event)
        self.threads.append(threading.current_thread().name)
        if event in self.fails:
            raise OSError("full")

    def record(
        self,
        event: str,
        trajectory_id: str,
        payload: Mapping[str, Any],
        arrays: Mapping[str, Sequence[Any]] | None = None,
    ) -> None:
        self._tell(event)

    def close_trajectory(self, *arguments: Any) -> None:
        self._tell("end")

    def record_tombstone_event(self, event: str, *arguments: Any) -> None:
        self._tell(event)

    def close(self) -> None:
        self._tell("close")


@contextlib.asynccontextmanager
async def half_a_request(
    sidecar: TITOSidecar, endpoint: TITOTrajectoryEndpoint, key: bytes | None = None
) -> AsyncIterator[asyncio.StreamReader]:
    """A request whose body does not come to its end."""
    path = endpoint.openai_base_url.partition(f":{sidecar.port}")[2]
    reader, writer = await asyncio.open_connection("127.0.0.1", sidecar.port)
    writer.write(f"POST {path}/chat/completions HTTP/1.1\r\nHost: x\r\n".encode())
    writer.write(b"Authorization: Bearer " + (key or endpoint.api_key.encode()) + b"\r\n")
    writer.write(b'Content-Length: 1000\r\n\r\n{"messages"')
    await writer.drain()
    try:
        yield reader
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


# -- requests ------------------------------------------------------------------------------------


async def test_a_key_that_is_no_text_is_a_wrong_key(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    async with half_a_request(sidecar, endpoint, b"\xff\xfe") as reader:
        assert await reader.readline() == b"HTTP/1.1 401 Unauthorized\r\n"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def called(calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": calls}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [called("x")]},
        {"messages": [called(["x"])]},
        {"messages": [called([{"function": "x"}])]},
        {"messages": [user("half \ud83d")]},
        {"messages": [{"role": "user", "content": "x", "\ud83d": 1}]},
        {"messages": HELLO, "_tito": "x"},
        {"messages": HELLO, "max_tokens": 1.5},
        {"messages": HELLO, "max_tokens": float("nan")},
        {"messages": HELLO, "max_tokens": float("inf")},
        {"messages": HELLO, "temperature": 10**400},
        {"messages": HELLO, "logit_bias": nested(200)},
        "[" * 100_000,
    ],
    ids=lambda body: str(body)[:50].encode("ascii", "replace").decode(),
)
async def test_what_is_malformed_is_refused_and_costs_no_trajectory(
    server: CompletionsServer, sidecars: Sidecars, body: Any
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    data = body if isinstance(body, str) else json.dumps(body)
    url = f"{endpoint.openai_base_url}/chat/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, data=data, headers=headers) as answer,
    ):
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "tito_invalid_request"
    assert (await ask(endpoint, HELLO)).status == 200


async def test_what_breaks_unforeseen_is_told_as_json_and_without_the_prompt(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> TITOChatRequest:
        raise KeyError("sesame")

    monkeypatch.setattr(TITOChatRequest, "from_openai", broken)
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO)
    assert (answer.status, answer.code) == (500, "tito_sdk_internal_error")
    assert "sesame" not in str(answer.body)


async def test_requests_that_are_still_read_have_their_place_among_the_calls(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_module, "MAX_CALLS", 2)
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    trajectory = sidecar._trajectories.get(endpoint.trajectory_id)
    async with half_a_request(sidecar, endpoint), half_a_request(sidecar, endpoint):
        await until(lambda: trajectory._reading == 2)
        third = await ask(endpoint, HELLO)
        assert (third.status, third.code) == (429, "tito_too_many_calls")
    await until(lambda: trajectory._reading == 0)
    assert (await ask(endpoint, HELLO)).status == 200


async def test_an_agent_that_asks_without_end_fills_no_memory(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "MOST_CALLS", 3)
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    for _ in range(3):
        assert (await ask(endpoint, [])).status == 400
    for _ in range(2):
        refused = await ask(endpoint, HELLO)
        assert (refused.status, refused.code) == (429, "tito_too_many_calls")
        assert not refused.body["error"]["should_retry"]
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert len(artifact.calls) == 3
    assert artifact.metrics.counters["calls/rejected"] == 5


class Sloppy:
    """Reads no answer."""

    renderer_id = "sloppy"

    def render_conversation_tokens(self, request: Any) -> list[int]:
        return [5, 6]

    def parse_assistant(self, *arguments: Any) -> Any:
        raise TITOParseError("no")

    def render_contract_id(self, request: Any) -> str:
        return "sloppy"

    def stop_sequences(self, request: Any) -> None:
        return None


async def test_a_call_beside_the_trajectory_does_not_end_it(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(
        renderer=Sloppy(), call_classifier=lambda _: "auxiliary", malformed_answers="discard"
    )
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO)
    assert (answer.status, answer.code) == (422, "tito_sdk_parse_error")
    assert answer.body["error"]["discard_trajectory"] is False
    assert answer.body["error"]["message"].endswith("the trajectory goes on without this call")
    assert (await sidecar.finish_trajectory(endpoint.trajectory_id)).status == "completed"


async def test_a_discarded_trajectory_refuses_with_an_error_of_its_own_each_time(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(renderer=Sloppy(), malformed_answers="discard")
    endpoint = await sidecar.create_trajectory_async()
    trajectory = sidecar._trajectories.get(endpoint.trajectory_id)
    request = TITOChatRequest(messages=tuple(HELLO))
    with pytest.raises(TITOError) as first:
        await trajectory.start(request)
    assert first.value.discard_trajectory
    assert first.value.__cause__ is not first.value
    errors: list[TITOError] = []
    for _ in range(2):
        with pytest.raises(TITOError) as again:
            trajectory.require_active()
        errors.append(again.value)
    assert {error.code for error in errors} == {first.value.code}
    assert errors[0] is not errors[1]
    assert trajectory._discarded is not None
    assert trajectory._discarded.__traceback__ is None


# -- observers -----------------------------------------------------------------------------------


async def test_a_refusal_that_cannot_be_told_is_an_answer_too(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    sidecar = await sidecars(observer=Observer("request_rejected"))
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, [])
    assert (answer.status, answer.code) == (507, "tito_debug_storage_error")


async def test_an_answer_that_is_out_is_not_answered_again(
    server: CompletionsServer, sidecars: Sidecars, caplog: pytest.LogCaptureFixture
) -> None:
    """A second one would be read as that of the connection's next request."""
    server.otherwise = says("one")
    sidecar = await sidecars(observer=Observer("response_emission"))
    endpoint = await sidecar.create_trajectory_async()
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    async with aiohttp.ClientSession(
        headers=headers, connector=aiohttp.TCPConnector(limit=1)
    ) as session:
        for stream in (False, True):
            url = f"{endpoint.openai_base_url}/chat/completions"
            body = {"messages": HELLO, "stream": stream}
            async with session.post(url, json=body) as answer:
                assert answer.status == 200
                await answer.read()
            async with session.get(f"{endpoint.openai_base_url}/models") as answer:
                assert answer.status == 200
                assert (await answer.json())["object"] == "list"
    assert "could not be told" in caplog.text


async def test_an_observer_is_closed_in_its_thread_after_the_last_event(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    observer = Observer("close", slow=["trajectory_open"])
    sidecar = await sidecars(observer=observer)
    asking = asyncio.create_task(sidecar.create_trajectory_async())
    await asyncio.sleep(0)
    asking.cancel()
    closing = asyncio.create_task(sidecar.close())
    await asyncio.sleep(0)
    observer.go_on.set()
    with pytest.raises(OSError, match="full"):
        await closing
    assert observer.told[0] == "trajectory_open"
    assert observer.told[-1] == "close"
    assert set(observer.threads) == {"tito-observer_0"}
    worker = sidecar._journal._worker
    assert worker is not None
    with pytest.raises(RuntimeError, match="shutdown"):
        worker.submit(int)


async def test_a_trajectory_that_its_maker_was_not_given_is_not_open(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    observer = Observer(slow=["trajectory_open"])
    sidecar = await sidecars(observer=observer)
    making = asyncio.create_task(sidecar.create_trajectory_async(trajectory_id="a"))
    await asyncio.sleep(0)
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    assert sidecar._trajectories.open_ids == []
    observer.go_on.set()
    observer.fails = ("trajectory_open",)
    with pytest.raises(TITOError, match="observer"):
        await sidecar.create_trajectory_async(trajectory_id="a")
    observer.fails = ()
    assert (await sidecar.create_trajectory_async(trajectory_id="a")).trajectory_id == "a"


async def test_no_trajectory_is_made_while_the_sidecar_closes(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    observer = Observer(slow=["trajectory_open"])
    sidecar = await sidecars(observer=observer)
    making = asyncio.create_task(sidecar.create_trajectory_async())
    await asyncio.sleep(0)
    closing = asyncio.create_task(sidecar.close())
    await asyncio.sleep(0)
    observer.go_on.set()
    with pytest.raises(ClientClosed, match="while"):
        await making
    with pytest.raises(ClientClosed):
        sidecar.create_trajectory()
    await closing
    assert sidecar._trajectories.open_ids == []


# -- closing -------------------------------------------------------------------------------------


async def test_a_close_that_is_cancelled_closes_all_the_same(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    observer = Observer(slow=["close"])
    sidecar = await sidecars(observer=observer)
    await sidecar.create_trajectory_async()
    port = sidecar.port
    closing = asyncio.create_task(sidecar.close())
    await until(lambda: not sidecar.port)
    closing.cancel()
    await asyncio.sleep(0)
    again = asyncio.create_task(sidecar.close())
    await asyncio.sleep(0)
    assert not again.done()  # it is not closed yet
    observer.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await again
    assert observer.told[-1] == "close"
    with pytest.raises(OSError, match=str(port)):
        await asyncio.open_connection("127.0.0.1", port)


async def test_trajectories_end_beside_each_other(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_module, "ANSWER_GRACE", 1e6)
    sidecar = await sidecars()
    endpoints = [await sidecar.create_trajectory_async() for _ in range(2)]
    trajectories = [sidecar._trajectories.get(e.trajectory_id) for e in endpoints]

    async def answering(mine: int) -> None:
        trajectories[mine].answer_under_way()
        await until(lambda: trajectories[1 - mine]._ending is not None)

    agents = [asyncio.create_task(answering(mine)) for mine in (0, 1)]
    await asyncio.sleep(0)
    await sidecar.close()
    await asyncio.gather(*agents)


async def test_a_request_that_is_never_sent_does_not_hold_the_close(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    trajectory = sidecar._trajectories.get(endpoint.trajectory_id)
    async with half_a_request(sidecar, endpoint):
        await until(lambda: trajectory._reading == 1)
        async with asyncio.timeout(30):  # without a bound of ours the server gives it a minute
            await sidecar.close()


async def test_what_goes_wrong_while_closing_does_not_replace_what_went_wrong_before(
    server: CompletionsServer, sampler: DeploymentSampler, caplog: pytest.LogCaptureFixture
) -> None:
    from fireworks_training import ChatTemplateRenderer
    from tests.tito.support import Characters

    def made() -> TITOSidecar:
        return TITOSidecar(
            sampler,
            renderer=ChatTemplateRenderer(Characters()),
            max_context_tokens=100,
            max_output_tokens=10,
            observer=Observer("end"),
        )

    with pytest.raises(KeyError):
        async with made() as sidecar:
            await sidecar.create_trajectory_async()
            raise KeyError("mine")
    assert "did not close in order" in caplog.text
    with pytest.raises(TITOError, match="observer"):
        async with made() as sidecar:
            await sidecar.create_trajectory_async()


# -- texts ---------------------------------------------------------------------------------------


def test_half_a_character_in_arguments_is_kept_as_it_was_written() -> None:
    for text in ('{"a": "\\ud83d"}', "[" * 5000):
        assert normalize_openai_tool_arguments(text) == text
    with pytest.raises(TITOParseError):
        chat_template._tool_call('{"name": "f", "arguments": {"a": "\\ud83d"}}', 0, 0)


def test_a_file_that_is_nested_without_end_is_no_artifact() -> None:
    import zlib

    with pytest.raises(TITOError, match="no trajectory artifact"):
        TITOTrajectoryArtifact.unpack(artifacts.MAGIC + zlib.compress(b"[" * 100_000))
