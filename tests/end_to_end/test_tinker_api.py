"""Sampling through the Tinker API, over HTTP: what a request gives, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest

from fireworks_training._wire import protobuf, schema
from tests.conftest import RunningPlatform

PROMPT = [5, 17, 9, 33, 21, 8]


class Client:
    """A sampling session of the base model."""

    def __init__(self, http: aiohttp.ClientSession, platform: RunningPlatform) -> None:
        self.http = http
        self.url = platform.base_url
        self.headers = {"X-API-Key": platform.api_key}
        self.sampler = ""

    async def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        url = f"{self.url}/api/v1/{path}"
        async with self.http.post(url, json=body, headers=self.headers) as response:
            if response.content_type == protobuf.CONTENT_TYPE:
                return response.status, schema.SampleResponse.FromString(await response.read())
            return response.status, await response.json()

    async def submit(self, seq_id: int, **fields: Any) -> tuple[int, Any]:
        params = {"max_tokens": 8, **fields.pop("params", {})}
        body = {
            "sampling_session_id": self.sampler,
            "seq_id": seq_id,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]},
            "sampling_params": params,
            **fields,
        }
        return await self.post("asample", body)

    async def sample(self, seq_id: int, **fields: Any) -> Any:
        status, answer = await self.submit(seq_id, **fields)
        assert status == 200, answer
        async with asyncio.timeout(60):
            status, result = await self.post(
                "retrieve_future", {"request_id": answer["request_id"]}
            )
        assert status == 200, result
        return result


@pytest.fixture
async def client(platform: RunningPlatform) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession() as http:
        client = Client(http, platform)
        _, session = await client.post("create_session", {})
        body = {"session_id": session["session_id"], "sampling_session_seq_id": 0}
        status, made = await client.post(
            "create_sampling_session", {**body, "base_model": platform.model}
        )
        assert status == 200, made
        client.sampler = made["sampling_session_id"]
        yield client


def tokens(response: Any) -> list[list[int]]:
    return [np.frombuffer(one.tokens, "<i4").tolist() for one in response.sequences]


async def test_seeds_stops_and_scores(client: Client) -> None:
    seeded = {"params": {"seed": 7, "temperature": 4.0}, "num_samples": 3}
    first, again = await client.sample(0, **seeded), await client.sample(1, **seeded)
    assert tokens(first) == tokens(again)
    assert len({tuple(row) for row in tokens(first)}) > 1, "each sample has draws of its own"
    stop = tokens(first)[0][1]
    stopped = await client.sample(2, params={"seed": 7, "temperature": 4.0, "stop": [stop]})
    row = tokens(stopped)[0]
    assert row == tokens(first)[0][: len(row)]
    assert row[-1] == stop
    assert stopped.sequences[0].stop_reason == 0
    scored = await client.sample(
        3, params={"max_tokens": 1}, prompt_logprobs=True, topk_prompt_logprobs=2
    )
    scores = np.frombuffer(scored.prompt_logprobs, "<f4")
    assert len(scores) == len(PROMPT)
    assert np.isnan(scores[0])
    assert (scores[1:] < 0).all()
    assert (scored.topk_prompt_logprobs.k, scored.topk_prompt_logprobs.length) == (2, len(PROMPT))


async def test_a_request_is_known_by_its_place(client: Client) -> None:
    first = await client.submit(0)
    assert await client.submit(0) == first
    assert len(first[1]["sample_sequence_ids"]) == 1
    assert (await client.submit(0, num_samples=2))[0] == 409
    request_id = first[1]["request_id"]
    assert (await client.post("cancel_future", {"request_id": request_id}))[0] == 200
    assert (await client.post("retrieve_future", {"request_id": f"{request_id}9"}))[0] == 410


async def test_one_poll_tells_of_a_whole_session(client: Client) -> None:
    async def poll(cursor: int, **fields: Any) -> tuple[int, Any]:
        target = {"type": "sampling_session", "sampling_session_id": client.sampler}
        target |= {key: fields.pop(key) for key in ("cloned_sampler_id",) if key in fields}
        async with asyncio.timeout(60):
            body = {"target": target, "prev_cursor": cursor, **fields}
            return await client.post("retrieve_futures", body)

    wanted = {(await client.submit(index))[1]["request_id"] for index in range(3)}
    long = (await client.submit(3, params={"max_tokens": 1500, "stop": []}))[1]["request_id"]
    clone = (await client.submit(5 * 10**9))[1]["request_id"]
    await client.post("cancel_future", {"request_id": long})
    states: dict[str, str] = {}
    cursor = 0
    while len(states) < 4:
        status, answer = await poll(cursor)
        assert status == 200, answer
        assert answer["completions"]
        cursor = answer["cursor"]
        states |= {row["request_id"]: row["state"] for row in answer["completions"]}
    assert states == {**dict.fromkeys(wanted, "finished"), long: "failed"}
    # A clone's requests are told of apart.
    status, answer = await poll(0, cloned_sampler_id=5)
    assert [row["request_id"] for row in answer["completions"]] == [clone]
    status, result = await client.post("retrieve_future", {"request_id": clone})
    size = answer["completions"][0]["response_payload_uncompressed_size"]
    assert size == len(result.SerializeToString())
    # Acknowledged; then there is nothing to wait for, and a client that does so is told.
    status, answer = await poll(cursor, timeout=0, retrieved_request_ids=sorted(wanted))
    assert (status, answer) == (200, {"completions": [], "cursor": cursor})
    assert (await poll(cursor))[0] == 410
    assert (await poll(cursor + 1, timeout=0))[0] == 410
    assert (await poll(0, cloned_sampler_id=-1))[0] == 400


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"params": {"max_tokens": 0}}, "max_tokens"),
        ({"params": {"max_tokens": 100_000}}, "over the context"),
        ({"params": {"stop": [1 << 30]}}, "stop"),
        ({"params": {"stop": [""]}}, "empty"),
        ({"prompt": {"chunks": [{"type": "encoded_text", "tokens": []}]}}, "prompt"),
        ({"prompt": {"chunks": [{"type": "image", "tokens": []}]}}, "text only"),
        ({"num_samples": 0}, "num_samples"),
        ({"prompt_alt_tokens_k": 2}, "not supported here"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs"),
        ({"more": 1}, "more"),
    ],
)
async def test_what_is_refused(client: Client, fields: dict[str, Any], words: str) -> None:
    status, answer = await client.submit(0, **fields)
    assert status == 400
    assert words in answer["error"]["message"]


async def test_what_does_not_exist(client: Client, platform: RunningPlatform) -> None:
    session, run = client.sampler.partition(":")[0], f"ts-{'0' * 32}:train:0"
    body = {"session_id": session, "sampling_session_seq_id": 1}
    missing = {**body, "model_path": f"tinker://{run}/sampler_weights/x"}
    assert (await client.post("create_sampling_session", missing))[0] == 404
    assert (await client.post("create_sampling_session", {**body, "base_model": "no"}))[0] == 404
    assert (await client.post("optim_step", {"model_id": run, "seq_id": 1}))[0] == 410
    assert (await client.post("weights_info", {"tinker_path": f"tinker://{run}/weights/x"}))[
        0
    ] == 404
    assert (await client.post(f"sessions/{session}/finish", {"reason": {}}))[0] == 200
    assert (await client.post("session_heartbeat", {"session_id": session}))[0] == 410
