"""Each server alone: what it answers, what it notes, and how its faults look from outside."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from fireworks_training import DeploymentSampler, SamplingRequestError
from fireworks_training.testing import (
    CharacterTokenizer,
    CompletionsServer,
    ControlPlaneServer,
    TrainerServer,
)
from fireworks_training.testing import completions_server as scripted
from fireworks_training.testing.control_plane_server import DEPLOYMENTS, JOBS
from fireworks_training.testing.loopback_server import LoopbackServer

MODEL = "accounts/me/deployments/any"


async def post(url: str, body: Any = None) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.post(url, json=body or {}) as answer:
        return answer.status, await answer.json()


async def get(url: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.json()


async def test_completions_by_script_then_otherwise() -> None:
    server = CompletionsServer(
        script=[scripted.completes([7, 8], "four"), scripted.status(503)], snapshot="s1"
    )
    async with server, DeploymentSampler(server.url, MODEL, "any") as sampler:
        (first,) = await sampler.sample_with_prompt_tokens([1], max_tokens=9, logprobs=True)
        assert (first.text, first.completion_tokens, first.finish_reason) == (
            "four",
            [7, 8],
            "stop",
        )
        assert list(first.inference_logprobs or ()) == [-1.0, -1.0]
        assert first.snapshot_identity == "s1"
        (second,) = await sampler.sample_with_prompt_tokens([1], max_tokens=2)  # after the 503
        assert (second.text, second.finish_reason) == ("<2><3>", "length")
        assert (len(server.bodies), server.script, server.generating) == (3, [], 0)
        assert server.peak == 1


async def test_a_refusal_that_no_retry_helps() -> None:
    async with (
        CompletionsServer(otherwise=scripted.status(400, {"error": "no"})) as server,
        DeploymentSampler(server.url, MODEL, "any") as sampler,
    ):
        with pytest.raises(SamplingRequestError, match="400"):
            await sampler.sample_with_prompt_tokens([1], max_tokens=1)
        assert len(server.bodies) == 1


async def test_a_client_that_leaves_is_noted() -> None:
    async with (
        CompletionsServer(otherwise=scripted.hang_mid_stream) as server,
        DeploymentSampler(server.url, MODEL, "any") as sampler,
    ):
        call = asyncio.ensure_future(sampler.sample_with_prompt_tokens([1], max_tokens=4))
        await server.reached.wait()
        call.cancel()
        await asyncio.wait_for(server.idle.wait(), 10)
        assert server.left == 1


async def test_another_path_is_not_found() -> None:
    async with CompletionsServer() as server, aiohttp.ClientSession() as session:
        async with session.post(f"{server.url}/elsewhere", json={}) as answer:
            assert answer.status == 404
        assert server.bodies == []


async def test_a_trainer_executes_in_order_and_once() -> None:
    async with TrainerServer() as server:
        url = f"{server.url}/api/v1"
        step = {"type": "optim_step"}
        assert await post(f"{url}/optim_step", {**step, "seq_id": 2}) == (200, {"request_id": "r2"})
        assert server.applied == []
        for _ in range(2):  # the second is the same request, sent again
            await post(f"{url}/optim_step", {**step, "seq_id": 1})
        assert server.applied == [("optim_step", 1), ("optim_step", 2)]
        assert server.steps == [0, 0]
        status, result = await post(f"{url}/retrieve_future", {"request_id": "r2"})
        assert (status, result["metrics"]) == (200, {"grad_norm": 1.0})
        assert server.counts == {"optim_step": 3, "retrieve_future": 1}
        assert (await post(f"{url}/nothing"))[0] == 404


async def test_a_hook_answers_in_the_trainers_place() -> None:
    async def full(operation: str, body: dict[str, Any]) -> web.StreamResponse | None:
        return web.json_response({}, status=429) if body["seq_id"] == 1 else None

    async with TrainerServer(before_submit=full) as server:
        url = f"{server.url}/api/v1/optim_step"
        assert (await post(url, {"seq_id": 1}))[0] == 429
        assert (await post(url, {"seq_id": 2}))[0] == 200
        assert server.submitted == [("optim_step", 1), ("optim_step", 2)]
        assert server.applied == []


async def test_a_restart_keeps_the_port_and_what_was_noted() -> None:
    async with TrainerServer() as server:
        url = f"{server.url}/api/v1/optim_step"
        await post(url, {"seq_id": 1})
        await server.restart()
        await post(url, {"seq_id": 2})
        assert server.applied == [("optim_step", 1), ("optim_step", 2)]


async def test_a_control_plane_shows_states_as_scripted() -> None:
    async with ControlPlaneServer() as server:
        server.put(JOBS, "mine")
        server.states = {JOBS: [("JOB_STATE_PENDING", "full"), "JOB_STATE_RUNNING"]}
        seen = [(await get(f"{server.url}{JOBS}/mine"))[1] for _ in range(3)]
        assert [row["state"] for row in seen] == ["JOB_STATE_PENDING"] + ["JOB_STATE_RUNNING"] * 2
        assert seen[0]["statusMessage"] == "full"
        assert (await get(f"{server.url}{DEPLOYMENTS}/mine"))[0] == 404
        assert len(server.requests) == 4


async def test_a_denied_request_and_a_lost_answer() -> None:
    async with ControlPlaneServer(lost_answers=["POST"]) as server:
        url = f"{server.url}{DEPLOYMENTS}?deploymentId=d"
        server.deny = {("POST", DEPLOYMENTS): [403]}
        assert (await post(url))[0] == 403
        assert server.left() == []
        with pytest.raises(aiohttp.ClientError):
            await post(url)
        assert server.left() == [f"{DEPLOYMENTS}/d"]
        assert (await post(url))[0] == 409


async def test_a_server_may_be_entered_again_and_leaves_nothing_open() -> None:
    server = CompletionsServer()
    for _ in range(2):
        async with server:
            url = server.url
        with pytest.raises(aiohttp.ClientConnectionError):
            await post(url)
    with server:
        assert server.url


async def test_a_server_without_answers_is_no_server() -> None:
    async with (
        LoopbackServer() as server,
        aiohttp.ClientSession() as session,
        session.get(server.url) as answer,
    ):
        assert answer.status == 500


def test_the_tokenizer_goes_back_and_forth() -> None:
    tokenizer = CharacterTokenizer()
    assert tokenizer.decode(tokenizer.encode("Tokens!"), skip_special_tokens=True) == "Tokens!"
    turns = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "user:hi;"
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt == tokenizer.encode("user:hi;assistant:")
