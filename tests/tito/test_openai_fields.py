"""Fields as OpenAI's clients send them: met, taken as neutral, or refused in words."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from fireworks_training.testing import CompletionsServer
from tests.tito.conftest import Sidecars
from tests.tito.support import ask, events, says, user

HELLO = [user("hi")]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "me", "metadata": {"run": "7"}, "safety_identifier": "x"},
        {"response_format": {"type": "text"}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1},
        {"tool_choice": "none", "parallel_tool_calls": True, "store": False},
        {"service_tier": "auto", "modalities": ["text"], "stop": None, "logprobs": False},
    ],
)
async def test_fields_that_ask_for_nothing_are_taken(
    server: CompletionsServer, sidecars: Sidecars, fields: dict[str, Any]
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO, **fields)
    assert answer.message["content"] == "one"
    sent = server.bodies[0].keys()
    assert not sent & {*fields} - {"stop", "logprobs", "n"}
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    (turn,) = artifact.segments[0].turns
    assert turn.request.wire_request is not None
    assert fields.keys() <= turn.request.wire_request.keys()  # what the agent sent is on record


@pytest.mark.parametrize(("given", "sent"), [("END", ["END"]), (["a", "b"], ["a", "b"])])
async def test_stop_strings_reach_the_sampler(
    server: CompletionsServer, sidecars: Sidecars, given: Any, sent: list[str]
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    await ask(endpoint, HELLO, stop=given)
    assert server.bodies[0]["stop"] == sent


async def test_logprobs_come_as_openai_writes_them(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO, logprobs=True)
    entries = answer.body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == ["o", "n", "e", "\x02"]
    assert [entry["logprob"] for entry in entries] == [-0.5, -1.5, -2.5, -3.5]
    assert entries[0]["bytes"] == [ord("o")]
    assert entries[0]["top_logprobs"] == []
    lines = await events(endpoint, [*HELLO, answer.message, user("more")], logprobs=True)
    assert any('"logprobs":{"content":[{' in line for line in lines)
    plain = await ask(await sidecar.create_trajectory_async(), HELLO)
    assert plain.body["choices"][0]["logprobs"] is None


async def test_the_reason_of_the_deployment_reaches_the_agent(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    reason = {"error": {"message": "Extra inputs are not permitted, field: 'min_p'"}}

    async def refuses(*_: Any) -> Any:
        from aiohttp import web

        return web.json_response(reason, status=400)

    server.otherwise = refuses
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, HELLO, min_p=0.1)
    assert answer.status == 400
    assert "field: 'min_p'" in answer.body["error"]["message"]


@pytest.mark.parametrize(("path", "words"), [("responses", "Responses"), ("embeddings", "POST")])
async def test_routes_that_are_missing_name_those_there_are(
    sidecars: Sidecars, path: str, words: str
) -> None:
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    url = f"{endpoint.openai_base_url}/{path}"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json={}, headers=headers) as answer,
    ):
        assert answer.status == 404
        message = (await answer.json())["error"]["message"]
    assert words in message
    assert "chat/completions" in message
