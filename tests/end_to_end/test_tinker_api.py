"""Sampling through the Tinker API, over HTTP: what a request gives, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import numpy as np
import pytest

from fireworks_training._wire.training import protobuf, schema
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


def tensor_of(message: Any) -> Any:
    return protobuf.decode_tensor(message, "it")


async def test_chosen_and_drawn_tokens_of_a_prompt(client: Client) -> None:
    rows = len(PROMPT) - 1
    chosen = [-1, -1, *(value for token in PROMPT[2:] for value in (token, -1))]
    target = {"data": chosen, "dtype": "int64", "shape": [rows, 2]}
    params = {"max_tokens": 1, "seed": 3}
    both = await client.sample(
        0,
        params=params,
        prompt_logprobs=True,
        prompt_logprobs_last_n=2,
        target_prompt_logprobs=target,
        prompt_alt_tokens_k=4,
    )
    whole = await client.sample(1, params=params, prompt_logprobs=True)
    scores = np.frombuffer(whole.prompt_logprobs, "<f4")
    last = np.frombuffer(both.prompt_logprobs, "<f4")
    assert np.isnan(last[:-2]).all()
    np.testing.assert_allclose(last[-2:], scores[-2:], atol=1e-5)
    expected = np.stack([scores[1:], np.zeros(rows)], axis=1)
    expected[0] = 0.0
    np.testing.assert_allclose(tensor_of(both.target_prompt_logprobs), expected, atol=1e-5)
    drawn, logprobs = both.prompt_alt_tokens.tokens, both.prompt_alt_tokens.logprobs
    assert tensor_of(drawn).shape == tensor_of(logprobs).shape == (rows, 4)
    assert (tensor_of(logprobs) < 0).all()
    # What was drawn can be asked for by name, dense or sparse.
    named = {"data": tensor_of(drawn).ravel().tolist(), "dtype": "int64", "shape": [rows, 4]}
    again = await client.sample(2, params=params, target_prompt_logprobs=named)
    assert not again.HasField("prompt_alt_tokens")
    assert not again.HasField("prompt_logprobs")
    np.testing.assert_allclose(
        tensor_of(again.target_prompt_logprobs), tensor_of(logprobs), atol=1e-5
    )
    sparse = {
        "data": PROMPT[3:5],
        "dtype": "int64",
        "shape": [rows, 1000],
        "sparse_crow_indices": [0, 0, 0, 1, 2, 2],
        "sparse_col_indices": [7, 999],
    }
    listed = (
        await client.sample(3, params=params, target_prompt_logprobs=sparse)
    ).target_prompt_logprobs
    assert list(listed.shape) == [rows, 1000]
    values = np.frombuffer(listed.sparse_csr.values, "<f4")
    np.testing.assert_allclose(values, scores[3:5], atol=1e-5)
    assert np.frombuffer(listed.sparse_csr.col_indices, "<i8").tolist() == [7, 999]


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
        ({"prompt_alt_tokens_k": 21}, "prompt_alt_tokens_k"),
        ({"record_stability_info": True}, "stable_reinforce"),
        ({"target_prompt_logprobs": {"data": [1], "dtype": "int64", "shape": [1, 1]}}, "shape"),
        (
            {"target_prompt_logprobs": {"data": [-1] * 5, "dtype": "int64", "shape": [5, 1]}},
            "names no token",
        ),
        (
            {"target_prompt_logprobs": {"data": [1 << 30] * 5, "dtype": "int64", "shape": [5, 1]}},
            "token ids",
        ),
        (
            {"target_prompt_logprobs": {"data": [1] * 105, "dtype": "int64", "shape": [5, 21]}},
            "at most 20",
        ),
        (
            {"target_prompt_logprobs": {"data": [1.5] * 5, "dtype": "float32", "shape": [5, 1]}},
            "target_prompt_logprobs",
        ),
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
