"""Wrong keys, wrong requests, agents that leave, ends at any moment: nothing is lost or left."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import pytest

from fireworks_training import (
    ClientClosed,
    DeploymentSampler,
    FixedConcurrencyController,
    InvalidArgument,
    TITOError,
    TITOSidecar,
    UnknownOption,
)
from fireworks_training.testing import CompletionsServer
from fireworks_training.testing import completions_server as stub
from fireworks_training.tito import TITOTrajectoryEndpoint
from fireworks_training.tito.turns import registry as registry_module
from fireworks_training.tito.turns import trajectory as trajectory_module
from tests.async_.sampling.support import until
from tests.tito.conftest import Sidecars
from tests.tito.support import Characters, ask, data_of, events, says, user

HELLO = [user("hello")]


async def refused(sidecar: TITOSidecar, trajectory_id: str, how: str = "finish_trajectory") -> str:
    with pytest.raises(TITOError) as caught:
        await getattr(sidecar, how)(trajectory_id)
    return caught.value.code


async def test_every_route_wants_the_key_of_its_own_trajectory(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    sidecar = await sidecars()
    mine, other = [await sidecar.create_trajectory_async() for _ in range(2)]
    assert mine.openai_base_url.startswith(f"http://127.0.0.1:{sidecar.port}/")
    assert mine.api_key not in repr(mine)
    root = f"http://127.0.0.1:{sidecar.port}"
    base = mine.openai_base_url
    paths = [f"{base}/models", f"{base}/chat/completions", f"{base}/nothing", f"{root}/", root]
    paths.append(base.replace(mine.trajectory_id, "unknown") + "/models")
    keys = [None, "", "Bearer ", "Bearer wrong", f"Bearer {other.api_key}", "Bearer \u00e4"]
    async with aiohttp.ClientSession() as session:
        for path in paths:
            for key in keys:
                headers = {} if key is None else {"Authorization": key}
                for method in ("GET", "POST", "OPTIONS"):
                    async with session.request(method, path, headers=headers) as answer:
                        assert answer.status == 401, (method, path, key)
                        assert (await answer.json())["error"]["code"] == "invalid_api_key"
                        assert "Access-Control-Allow-Origin" not in answer.headers
        right = {"Authorization": f"Bearer {mine.api_key}"}
        async with session.get(f"{base}/models", headers=right) as answer:
            assert (await answer.json())["data"][0]["id"] == "policy"
        async with session.get(f"{base}/nothing", headers=right) as answer:
            assert answer.status == 404
        async with session.get(f"{base}/chat/completions", headers=right) as answer:
            assert answer.status == 405
    assert server.bodies == []


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"messages": []}, "tito_invalid_request"),
        ({"messages": "hi"}, "tito_invalid_request"),
        ({"messages": [3]}, "tito_invalid_request"),
        ({"messages": [{"content": "x"}]}, "tito_invalid_request"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "tito_invalid_request",
        ),
        ({"max_tokens": 0}, "tito_invalid_request"),
        ({"max_tokens": "many"}, "tito_invalid_request"),
        ({"temperature": True}, "tito_invalid_request"),
        ({"tool_choice": "required"}, "tito_invalid_request"),
        ({"parallel_tool_calls": False}, "tito_invalid_request"),
        ({"store": True}, "tito_invalid_request"),
        ({"n": 2}, "tito_invalid_request"),
        ({"prompt_cache_key": "me"}, "tito_affinity_override"),
        ({"stop": ["x", ""]}, "tito_invalid_request"),
        ({"stop": 5}, "tito_invalid_request"),
        ({"logprobs": 3}, "tito_invalid_request"),
        ({"top_logprobs": 3}, "tito_invalid_request"),
        ({"response_format": {"type": "json_object"}}, "tito_invalid_request"),
        ({"service_tier": "flex"}, "tito_invalid_sampling_field"),
        ({"echo": True}, "tito_invalid_sampling_field"),
        ({"no_such_option": 1}, "tito_invalid_sampling_field"),
        ({"sampling_mask": True}, "tito_invalid_sampling_field"),
        ({"top_p": 7}, "tito_invalid_sampling_field"),
        ({"messages": [user("x" * 400)]}, "tito_context_overflow"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_a_request_that_cannot_be_met_changes_nothing(
    server: CompletionsServer, sidecars: Sidecars, fields: dict[str, Any], code: str
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    for stream in (False, True):
        answer = await ask(endpoint, **{"messages": HELLO, "stream": stream, **fields})
        assert (answer.status, answer.code) == (400, code)
        assert answer.body["error"]["should_retry"] is False
    assert server.bodies == []
    await ask(endpoint, HELLO)
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert [call.outcome for call in artifact.calls] == ["rejected", "rejected", "succeeded"]
    assert len(artifact.segments[0].turns) == 1


async def test_bodies_that_are_no_requests(server: CompletionsServer, sidecars: Sidecars) -> None:
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    url = f"{endpoint.openai_base_url}/chat/completions"
    async with aiohttp.ClientSession() as session:
        for body in (b"", b"{", b"[]", b"\xff\xfe"):
            async with session.post(url, data=body, headers=headers) as answer:
                assert answer.status == 400
                assert (await answer.json())["error"]["code"] == "tito_invalid_request"
    assert server.bodies == []


async def test_limits_cap_what_is_asked_for(server: CompletionsServer, sidecars: Sidecars) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(max_context_tokens=60, sampling_defaults={"temperature": 0.5})
    endpoint = await sidecar.create_trajectory_async(serving_affinity_key="together")
    await ask(endpoint, HELLO, max_tokens=9999, temperature=0.0)
    (body,) = server.bodies
    assert body["max_tokens"] == 60 - len(body["prompt"])
    assert body["temperature"] == 0.5
    assert body["prompt_cache_key"] == "together"
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    (turn,) = artifact.segments[0].turns
    assert (turn.requested_output_tokens, turn.effective_output_tokens) == (
        9999,
        body["max_tokens"],
    )


async def test_streams_are_kept_alive_and_end_with_usage(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.script = [stub.pause_mid_stream]
    sidecar = await sidecars(keepalive_seconds=0.01)
    endpoint = await sidecar.create_trajectory_async()
    asking = asyncio.create_task(
        events(endpoint, HELLO, max_tokens=2, stream_options={"include_usage": True})
    )
    await server.reached.wait()
    await until(
        lambda: bool(
            sidecar._trajectories.get(endpoint.trajectory_id)
            .measured.summary()
            .counters.get("transport/keepalives_sent")
        )
    )
    server.go_on.set()
    lines = await asking
    assert lines[0] == ": keepalive"
    assert lines[-1] == "data: [DONE]"
    message, last, usage = data_of(lines)
    assert message["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_an_agent_that_leaves_frees_the_engine_and_changes_nothing(
    server: CompletionsServer, sidecars: Sidecars, sampler: DeploymentSampler, stream: bool
) -> None:
    server.script = [stub.hang_mid_stream]
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    asking = asyncio.create_task(ask(endpoint, HELLO, stream=stream))
    await server.reached.wait()
    waiting = asyncio.create_task(ask(endpoint, HELLO))  # behind the one that hangs
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert (await waiting).status == 200
    await server.idle.wait()
    gate = sampler.concurrency_controller
    assert isinstance(gate, FixedConcurrencyController)
    assert (server.left, gate.in_flight) == (1, 0)
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert [call.outcome for call in artifact.calls] == ["cancelled", "succeeded"]
    assert len(artifact.segments[0].turns) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["abandon_trajectory", "fail_trajectory", "close"])
async def test_an_end_under_a_call_frees_the_engine_and_tells_the_agent(
    server: CompletionsServer,
    sidecars: Sidecars,
    sampler: DeploymentSampler,
    how: str,
    stream: bool,
) -> None:
    server.script = [says("one"), stub.hang_mid_stream]
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    first = await ask(endpoint, HELLO)
    more = [*HELLO, first.message, user("more")]
    asking: asyncio.Task[Any] = asyncio.create_task(
        events(endpoint, more) if stream else ask(endpoint, more)
    )
    await server.reached.wait()
    assert await refused(sidecar, endpoint.trajectory_id) == "tito_call_in_flight"
    if how == "close":
        await sidecar.close()
        await sidecar.close()
    else:
        reason = ["it_broke"] if how == "fail_trajectory" else []
        artifact = await getattr(sidecar, how)(endpoint.trajectory_id, *reason)
        assert artifact.status == ("failed" if reason else "abandoned")
        assert artifact.terminal_reason == (reason[0] if reason else "caller_abandoned")
        assert [call.outcome for call in artifact.calls] == ["succeeded", "cancelled"]
        assert len(artifact.segments[0].turns) == 1
    answer = await asking
    if stream:
        assert "event: error" in answer
        assert data_of(answer)[-1]["error"]["code"] == "tito_trajectory_closed"
    else:
        assert (answer.status, answer.code) == (410, "tito_trajectory_closed")
    await server.idle.wait()
    gate = sampler.concurrency_controller
    assert isinstance(gate, FixedConcurrencyController)
    assert (server.left, gate.in_flight) == (1, 0)


async def test_an_end_comes_once_and_an_unknown_trajectory_has_none(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_module, "REMEMBERED", 1)
    server.otherwise = says("one")
    sidecar = await sidecars()
    first, second = [await sidecar.create_trajectory_async(trajectory_id=n) for n in ("a", "b")]
    await ask(first, HELLO)
    assert (await sidecar.finish_trajectory("a")).status == "completed"
    for how in ("finish_trajectory", "abandon_trajectory"):
        assert await refused(sidecar, "a", how) == "tito_trajectory_closed"
        assert await refused(sidecar, "nothing", how) == "tito_trajectory_not_found"
    late = await ask(first, HELLO)
    assert (late.status, late.code) == (410, "tito_trajectory_closed")
    with pytest.raises(InvalidArgument, match="already"):
        sidecar.create_trajectory(trajectory_id="b")
    await sidecar.finish_trajectory("b")
    assert (await ask(first, HELLO)).status == 401  # forgotten, to make room
    assert await refused(sidecar, "a") == "tito_trajectory_not_found"
    assert (await ask(second, HELLO)).status == 410


async def test_cancelling_a_finish_loses_nothing(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    """At each await of it in turn: it either has not happened, or can be asked for again."""
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    await ask(endpoint, HELLO)
    trajectory = sidecar._trajectories.get(endpoint.trajectory_id)
    slow = asyncio.Event()

    async def answering() -> None:
        trajectory.answer_under_way()
        await slow.wait()

    agent = asyncio.create_task(answering())
    await asyncio.sleep(0)
    finishing = asyncio.create_task(sidecar.finish_trajectory(endpoint.trajectory_id))
    await until(lambda: trajectory._ending is not None)
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    slow.set()
    await agent
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert len(artifact.segments[0].turns) == 1


async def test_a_slow_reader_does_not_hold_the_end(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_module, "ANSWER_GRACE", 0.01)
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    trajectory = sidecar._trajectories.get(endpoint.trajectory_id)
    cancelled = asyncio.Event()

    async def answering() -> None:
        trajectory.answer_under_way()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    agent = asyncio.create_task(answering())
    await asyncio.sleep(0)
    await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert cancelled.is_set()
    await asyncio.gather(agent, return_exceptions=True)


async def test_a_call_asked_twice_is_sampled_once(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.script = [says("one"), says("two")]
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    key = {"Idempotency-Key": "k1"}
    first, again = [await ask(endpoint, HELLO, headers=key) for _ in range(2)]
    assert again.body == first.body
    assert data_of(await events(endpoint, HELLO))[0]["choices"][0]["delta"]["content"] == "two"
    assert len(server.bodies) == 2
    other = await ask(endpoint, [user("else")], headers={"Idempotency-Key": "k2"})
    assert other.status == 200
    reused = await ask(endpoint, HELLO, headers={"Idempotency-Key": "k2"})
    assert (reused.status, reused.code) == (409, "idempotency_key_reused")
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert "replayed" in [call.outcome for call in artifact.calls]


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (stub.status(503), 503, "tito_server_http_error"),
        (stub.status(401), 401, "tito_server_http_error"),
        (stub.stream(), 200, "tito_transport_error"),
        (
            stub.stream({"error": {"status_code": 429, "code": "x"}}),
            429,
            "tito_server_stream_error",
        ),
    ],
    ids=["503", "401", "truncated", "in the stream"],
)
async def test_a_sampling_that_fails_changes_nothing_and_says_whose_fault(
    server: CompletionsServer, sidecars: Sidecars, fault: stub.Behaviour, status: int, code: str
) -> None:
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    server.otherwise = fault
    answer = await ask(endpoint, HELLO)
    if answer.code == "tito_transport_error":
        status = answer.status
        assert status == 502
    assert (answer.status, answer.code) == (status, code)
    assert answer.body["error"]["origin"] in ("server", "transport")
    lines = await events(endpoint, HELLO)
    assert data_of(lines)[-1]["error"]["code"] == code
    server.otherwise = says("one")
    assert (await ask(endpoint, HELLO)).status == 200
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert [call.outcome for call in artifact.calls] == ["failed", "failed", "succeeded"]
    assert artifact.calls[0].attempts >= 1
    assert artifact.status == "completed"


async def test_tokens_that_do_not_fit_their_prompt_discard_the_trajectory(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    async def another_prompt(server: CompletionsServer, request: Any, body: dict[str, Any]) -> Any:
        return await says("one")(server, request, {**body, "prompt": [1, 2, 3]})

    server.otherwise = another_prompt
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO)
    assert answer.status in (422, 502)
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert artifact.segments == ()


async def test_calls_are_bounded_and_go_one_after_the_other(
    server: CompletionsServer, sidecars: Sidecars, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectory_module, "MAX_CALLS", 2)
    server.script = [stub.pause_mid_stream]
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    trajectory = sidecar._trajectories.get(endpoint.trajectory_id)
    calls = [asyncio.create_task(ask(endpoint, HELLO)) for _ in range(2)]
    await server.reached.wait()
    await until(lambda: len(trajectory._generating) == 2)
    third = await ask(endpoint, HELLO)
    assert (third.status, third.code) == (429, "tito_too_many_calls")
    server.go_on.set()
    assert [answer.status for answer in await asyncio.gather(*calls)] == [200, 200]
    assert server.peak == 1


async def test_trajectories_do_not_wait_for_each_other(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = stub.pause_mid_stream
    sidecar = await sidecars()
    endpoints: list[TITOTrajectoryEndpoint] = [sidecar.create_trajectory() for _ in range(20)]
    assert len({endpoint.api_key for endpoint in endpoints}) == 20
    asking = [asyncio.create_task(ask(endpoint, HELLO, max_tokens=2)) for endpoint in endpoints]
    await until(lambda: server.generating == 4)  # as many as the sampler's gate lets through
    server.go_on.set()
    assert {answer.status for answer in await asyncio.gather(*asking)} == {200}
    for endpoint in endpoints:
        artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
        assert len(artifact.segments[0].turns) == 1


async def test_what_cannot_be_made(sampler: DeploymentSampler, sidecars: Sidecars) -> None:
    from fireworks_training import ChatTemplateRenderer

    limits = {"max_context_tokens": 10, "max_output_tokens": 5}
    good: dict[str, Any] = {"renderer": ChatTemplateRenderer(Characters()), **limits}
    bad: list[dict[str, Any]] = [
        {"bind_address": "0.0.0.0"},
        {"bind_address": "localhost"},
        {"bind_address": "224.0.0.1"},
        {"renderer": object()},
        {"prompt_mode": "partial"},
        {"max_context_tokens": 1},
        {"max_output_tokens": 0},
        {"keepalive_seconds": 0},
        {"sampling_defaults": {"prompt_cache_key": "x"}},
        {"malformed_answers": "repair"},
    ]
    for options in bad:
        with pytest.raises(InvalidArgument):
            TITOSidecar.from_deployment_sampler(sampler, **{**good, **options})
    with pytest.raises(UnknownOption):
        TITOSidecar(sampler, **good, sampling_defaults={"nothing": 1})
    with pytest.raises(InvalidArgument, match="chat template"):
        ChatTemplateRenderer(object())  # type: ignore[arg-type]
    unstarted = TITOSidecar(sampler, **good)
    with pytest.raises(ClientClosed, match="start"):
        unstarted.create_trajectory()
    await unstarted.close()
    with pytest.raises(ClientClosed):
        await unstarted.start()
    sidecar = await sidecars()
    for wrong in ("", "../x", "a/b", "x" * 129):
        with pytest.raises(InvalidArgument, match="trajectory_id"):
            sidecar.create_trajectory(trajectory_id=wrong)
    with pytest.raises(OSError, match="bind"):
        await TITOSidecar(sampler, **good).start(sidecar.port)


async def test_headers_of_all_trajectories_may_not_say_who_belongs_together() -> None:
    from fireworks_training import ChatTemplateRenderer

    headers = {"X-Session-Affinity": "one"}
    async with DeploymentSampler(
        "http://127.0.0.1:9", "m", "key", additional_headers=headers
    ) as sampler:
        with pytest.raises(InvalidArgument, match="x-session-affinity"):
            TITOSidecar.from_deployment_sampler(
                sampler,
                renderer=ChatTemplateRenderer(Characters()),
                max_context_tokens=10,
                max_output_tokens=5,
            )


async def test_a_sampler_that_was_closed_is_no_reason_to_wait(
    server: CompletionsServer, sidecars: Sidecars, sampler: DeploymentSampler
) -> None:
    server.script = [stub.hang_mid_stream]
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    asking = asyncio.create_task(ask(endpoint, HELLO))
    await server.reached.wait()
    await sampler.aclose()
    answer = await asking
    assert (answer.status, answer.code) == (503, "tito_sampler_closed")


async def test_a_renderer_that_fails_is_told_without_the_prompt(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    from fireworks_training import ChatTemplateRenderer

    class Broken(Characters):
        def shown(self, message: dict[str, Any]) -> str:
            raise KeyError(f"no idea about {message['content']}")

    sidecar = await sidecars(renderer=ChatTemplateRenderer(Broken()))
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, [user("sesame")])
    assert (answer.status, answer.code) == (400, "tito_render_error")
    assert "sesame" not in str(answer.body)
    assert "KeyError at test_faults.py" in answer.body["error"]["message"]
    with contextlib.suppress(TITOError):
        await sidecar.finish_trajectory(endpoint.trajectory_id)
