"""Completions over HTTP: what comes out, what is refused, and what happens when someone dies."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
import pytest
import torch

from fireworks_training.local.engine_frames import (
    NO_TOKEN,
    Begun,
    Finish,
    Step,
    encode_begun,
    encode_control,
    encode_step,
)
from fireworks_training.local.gateway.inference.detokenize import TextCodec
from fireworks_training.local.gateway.inference.engine_client import EngineClient
from fireworks_training.local.gateway.inference.serving import choose_engine
from fireworks_training.local.model.model import load_model, round_parameters_
from tests.local.gateway.serving_app import (
    DEPLOYMENT,
    ScriptedEngine,
    Served,
    chunks_of,
    joined,
    make_model_folder,
    scripted,
    serving,
)

PROMPT = [10, 20, 30, 40]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def codec(model_path: Path) -> TextCodec:
    return TextCodec(model_path)


def forward_logprobs(model_path: Path, ids: list[int]) -> np.ndarray:
    """Raw logprob of each id after the first, from a plain forward."""
    model = load_model(model_path)
    round_parameters_(model, "bfloat16")
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return rows[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


# -- what comes out ------------------------------------------------------------------------------


async def test_a_stream_and_a_whole_answer_say_the_same(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    async with serving(model_path, tmp_path) as served:
        request: dict[str, Any] = {
            "prompt": PROMPT,
            "max_tokens": 30,
            "seed": 4,
            "ignore_eos": True,
            "temperature": 0.8,
            "top_logprobs": 2,
        }
        whole = await served.complete(**request)
        chunks = chunks_of(await served.events(**request))
    text, rows = joined(chunks)
    choice, last = whole["choices"][0], chunks[-1]["choices"][0]
    ids = choice["raw_output"]["completion_token_ids"]
    assert len(chunks) > 2
    assert text == choice["text"] == codec.decode(ids)
    assert rows == choice["logprobs"]["content"]
    assert [row["token_id"] for row in rows] == ids
    assert (
        last["raw_output"]
        == choice["raw_output"]
        == {
            "completion_token_ids": ids,
            "prompt_token_ids": PROMPT,
        }
    )
    assert last["finish_reason"] == choice["finish_reason"] == "length"
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 30,
        "total_tokens": 34,
        "prompt_tokens_details": {"cached_tokens": len(PROMPT)},
    }
    expected = forward_logprobs(model_path, PROMPT + ids)[3:]
    np.testing.assert_allclose([row["logprob"] for row in rows], expected, atol=1e-4)
    assert any(abs(row["sampling_logprob"] - row["logprob"]) > 1e-3 for row in rows)
    assert all(len(row["top_logprobs"]) == 2 for row in rows)


async def test_perf_metrics_have_the_names_that_clients_read(
    model_path: Path, tmp_path: Path
) -> None:
    async with serving(model_path, tmp_path) as served:
        metrics = (await served.complete(prompt=PROMPT, max_tokens=3))["perf_metrics"]
        plain = await (await served.post(prompt=PROMPT, max_tokens=3)).json()
    assert {
        "num-concurrent-requests",
        "prefill-queue-duration",
        "generation-queue-duration",
        "server-time-to-first-token",
        "cached-prompt-tokens",
        "prompt-tokens",
        "server-processing-time",
        "tokenizer-queue-duration",
        "tokenizer-duration",
        "prefill-duration",
        "generation-duration",
        "backend-host",
        "deployment",
    } == set(metrics)
    assert metrics["num-concurrent-requests"] == 1
    assert 0 <= metrics["prefill-queue-duration"] <= metrics["server-time-to-first-token"]
    assert metrics["server-time-to-first-token"] <= metrics["server-processing-time"]
    # What was not asked for is not there.
    assert "perf_metrics" not in plain
    assert "raw_output" not in plain["choices"][0]
    assert plain["choices"][0]["logprobs"] is None


async def test_text_prompts_are_encoded(model_path: Path, tmp_path: Path, codec: TextCodec) -> None:
    async with serving(model_path, tmp_path) as served:
        for text in ("héllo", "long " * 30):
            answer = await served.complete(prompt=text, max_tokens=1)
            ids = answer["choices"][0]["raw_output"]["prompt_token_ids"]
            assert codec.decode(ids) == text


@pytest.mark.parametrize(
    ("echo", "rows"), [({"echo": True}, 4), ({"echo_last": 2}, 2), ({"echo_last": 9}, 4)]
)
@pytest.mark.parametrize("max_tokens", [3, 0])
async def test_echo_puts_the_prompt_first_everywhere(
    model_path: Path,
    tmp_path: Path,
    codec: TextCodec,
    echo: dict[str, object],
    rows: int,
    max_tokens: int,
) -> None:
    request = {"prompt": PROMPT, "max_tokens": max_tokens, "seed": 1, "top_logprobs": 1, **echo}
    async with serving(model_path, tmp_path) as served:
        answer = await served.complete(**request)
        chunks = chunks_of(await served.events(**request))
    choice = answer["choices"][0]
    content = choice["logprobs"]["content"]
    ids = choice["raw_output"]["completion_token_ids"]
    assert ids[:rows] == PROMPT[-rows:]
    assert len(ids) == len(content) == rows + max_tokens
    assert choice["text"] == codec.decode(ids)
    assert joined(chunks) == (choice["text"], content)
    assert answer["usage"]["completion_tokens"] == max_tokens
    everything = forward_logprobs(model_path, PROMPT + ids[rows:])
    logprobs = [row["logprob"] for row in content]
    if rows == len(PROMPT):
        # The first token depends on nothing.
        assert logprobs[0] == 0.0
        logprobs = logprobs[1:]
    np.testing.assert_allclose(logprobs, everything[-len(logprobs) :], atol=1e-4)
    assert all(row["sampling_logprob"] is None for row in content[:rows])
    assert all(row["top_logprobs"] for row in content)


async def test_a_stop_string_over_token_borders_ends_the_text_before_it(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    request: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 200, "seed": 7, "ignore_eos": True}
    async with serving(model_path, tmp_path) as served:
        free = (await served.complete(**request))["choices"][0]
        ids = free["raw_output"]["completion_token_ids"]
        stop = free["text"][20:23]
        cut = free["text"].index(stop)
        kept = next(n for n in range(len(ids)) if stop in codec.decode(ids[:n]))
        assert kept < 100
        for stream in (False, True):
            if stream:
                chunks = chunks_of(await served.events(**request, stop=[stop, "never there"]))
                text, rows = joined(chunks)
                choice = chunks[-1]["choices"][0]
            else:
                answer = await served.complete(**request, stop=stop)
                choice = answer["choices"][0]
                text, rows = choice["text"], choice["logprobs"]["content"]
            assert text == free["text"][:cut]
            assert choice["finish_reason"] == "stop"
            assert choice["raw_output"]["completion_token_ids"] == ids[:kept]
            assert [row["token_id"] for row in rows] == ids[:kept]
        await served.idle()


async def test_min_tokens_lets_stop_strings_pass(model_path: Path, tmp_path: Path) -> None:
    request: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40, "seed": 7, "ignore_eos": True}
    async with serving(model_path, tmp_path) as served:
        free = (await served.complete(**request))["choices"][0]["text"]
        answer = await served.complete(**request, stop=free[3], min_tokens=40)
    assert answer["choices"][0]["text"] == free


async def test_stop_ids_end_the_tokens_but_are_no_text(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    request: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 20, "seed": 9, "ignore_eos": True}
    async with serving(model_path, tmp_path) as served:
        free = (await served.complete(**request))["choices"][0]
        ids = free["raw_output"]["completion_token_ids"]
        kept = ids.index(ids[6]) + 1
        for stops in ({"stop": [ids[6]]}, {"stop_token_ids": [ids[6]]}, {"stop": [ids[6], "@@@"]}):
            choice = (await served.complete(**request, **stops))["choices"][0]
            assert choice["raw_output"]["completion_token_ids"] == ids[:kept]
            assert choice["finish_reason"] == "stop"
            assert choice["text"] == codec.decode(ids[: kept - 1])


async def test_more_requests_than_slots_all_get_their_own_tokens(
    model_path: Path, tmp_path: Path
) -> None:
    async def one(seed: int) -> list[int]:
        prompt = [(7 * seed + i) % 290 for i in range(1 + seed % 5)]
        answer = await served.complete(prompt=prompt, max_tokens=4 + seed, seed=seed)
        ids: list[int] = answer["choices"][0]["raw_output"]["completion_token_ids"]
        return ids

    async with serving(model_path, tmp_path, max_slots=4) as served:
        together = await asyncio.gather(*[one(seed) for seed in range(16)])
        alone = [await one(seed) for seed in range(16)]
    assert together == alone


NEUTRAL = {
    "frequency_penalty": 0.0,
    "presence_penalty": 0,
    "repetition_penalty": 1.0,
    "min_p": 0.0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "metadata": {"run": "7"},
    "max_completion_tokens": 4,
}


async def test_values_that_ask_for_nothing_change_nothing(model_path: Path, tmp_path: Path) -> None:
    async with serving(model_path, tmp_path) as served:
        plain = await served.complete(prompt=PROMPT, max_tokens=4, seed=1)
        neutral = await served.complete(prompt=PROMPT, seed=1, **NEUTRAL)
    assert neutral["choices"] == plain["choices"]


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing_matrix_format": "x"}, "Extra inputs are not permitted, field: 'routing_matrix_"),
        ({"n": 2}, "n must be 1"),
        ({"prompt": []}, "a list of token ids, or one text, field: 'prompt'"),
        ({"prompt": ""}, "'prompt'"),
        ({"prompt": [1, -1]}, "'prompt'"),
        ({"prompt": [[1]]}, "'prompt'"),
        ({"prompt": [1.5]}, "'prompt'"),
        ({"prompt": [300]}, "service.get_tokenizer()"),
        ({"stop": [300]}, "service.get_tokenizer()"),
        ({"prompt": [1] * 200, "max_tokens": 57}, "257 tokens, over the context of 256"),
        ({"prompt": [1] * 256}, "over the context of 256"),
        ({"max_tokens": -1}, "'max_tokens'"),
        ({"max_tokens": 0}, "needs echo"),
        ({"min_tokens": 9}, "min_tokens 9 is over max_tokens 8"),
        ({"temperature": -0.1}, "'temperature'"),
        ({"temperature": "1"}, "'temperature'"),
        ({"top_p": 0}, "'top_p'"),
        ({"top_k": 1.5}, "'top_k'"),
        ({"seed": "x"}, "'seed'"),
        ({"stop": [""]}, "'stop'"),
        ({"stop": "a" * 257}, "'stop'"),
        ({"logprobs": 21}, "'logprobs'"),
        ({"top_logprobs": 21}, "'top_logprobs'"),
        ({"images": ["data:"]}, "images are not supported"),
        ({"min_p": 0.1}, "does not serve min_p"),
        ({"frequency_penalty": 0.5}, "does not serve frequency_penalty"),
        ({"repetition_penalty": 1.2}, "does not serve repetition_penalty"),
        ({"logit_bias": {"5": 1.0}}, "does not serve logit_bias"),
        ({"response_format": {"type": "json_object"}}, "does not serve response_format"),
        ({"max_completion_tokens": 9}, "differ"),
        ({"model": 3}, "'model'"),
    ],
)
async def test_bad_bodies_name_the_field(
    model_path: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    async with scripted(model_path, tmp_path) as (served, _):
        status, said, _ = await served.refused(**{"prompt": PROMPT, "max_tokens": 8, **change})
        assert (status, message in said) == (400, True), said
        response = await served.session.post("/inference/v1/completions", data=b"{")
        assert response.status == 400
        response = await served.session.post("/inference/v1/completions", json=[])
        assert response.status == 400


async def test_models_that_cannot_serve(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, _):
        status, said, _ = await served.refused(model="accounts/local/deployments/x", prompt=PROMPT)
        assert status == 404
        assert DEPLOYMENT in said
        served.live.engines.clear()
        served.live.state = "CREATING"
        assert (await served.refused(prompt=PROMPT))[::2] == (503, "1")
        served.live.state, served.live.desired_replicas = "READY", 0
        for _ in range(2):
            assert (await served.refused(prompt=PROMPT))[::2] == (503, "1")
        assert DEPLOYMENT in served.woken
        served.live.state, served.live.desired_replicas = "FAILED", 1
        assert (await served.refused(prompt=PROMPT))[0] == 400
        served.live.state = "DELETING"
        assert (await served.refused(prompt=PROMPT))[0] == 404


@pytest.mark.parametrize("name", ["local/d", f"accounts/local/models/tiny#{DEPLOYMENT}"])
async def test_other_ways_to_name_a_deployment(model_path: Path, tmp_path: Path, name: str) -> None:
    async with serving(model_path, tmp_path) as served:
        assert (await served.complete(model=name, prompt=PROMPT, max_tokens=1))["model"] == name


async def test_a_full_engine_says_when_to_come_again(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        waiting = [asyncio.create_task(served.post(prompt=PROMPT)) for _ in range(3)]
        for _ in waiting:
            await engine.control("add")
        assert (await served.refused(prompt=PROMPT))[::2] == (429, "1")
        for task in waiting:
            task.cancel()
        for _ in waiting:
            await engine.control("cancel")
        # The engine may know better than the gateway.
        late = asyncio.create_task(served.refused(prompt=PROMPT))
        number = (await engine.control("add"))["stream"]
        refusal = {"op": "refused", "stream": number, "full": True, "message": "many wait"}
        engine.send(encode_control(refusal))
        assert (await late)[::2] == (429, "1")


def test_a_key_keeps_its_engine_and_others_go_where_it_is_quiet(tmp_path: Path) -> None:
    engines = [EngineClient(tmp_path, f"d/{number}") for number in range(3)]
    for key in map(str, range(20)):
        chosen = choose_engine(engines, key)
        left = [engine for engine in engines if engine is chosen or engine is not engines[0]]
        assert choose_engine(left, key) is chosen
    assert len({choose_engine(engines, str(key)).name for key in range(20)}) == 3
    assert choose_engine(engines, None) is engines[0]


class Busy(EngineClient):
    """An engine with some streams open."""

    def __init__(self, name: str, streams: int, *, full: bool = False) -> None:
        super().__init__(Path("nowhere"), name)
        self._busy, self._full = streams, full

    @property
    def open_streams(self) -> int:
        return self._busy

    @property
    def has_room(self) -> bool:
        return not self._full


def test_a_key_leaves_an_engine_that_has_more_than_its_share() -> None:
    even = [Busy(f"d/{number}", 20) for number in range(3)]
    favourite = choose_engine(list(even), "key")
    crowded = [Busy(e.name, 60 if e.name == favourite.name else 20) for e in even]
    assert choose_engine(list(crowded), "key").name != favourite.name
    slightly = [Busy(e.name, 28 if e.name == favourite.name else 20) for e in even]
    assert choose_engine(list(slightly), "key").name == favourite.name


@pytest.mark.parametrize("key", [None, "key"])
def test_an_engine_that_is_full_is_passed_over(key: str | None) -> None:
    engines = [Busy("d/0", 0, full=True), Busy("d/1", 9), Busy("d/2", 9, full=True)]
    assert choose_engine(list(engines), key).name == "d/1"
    assert choose_engine([engines[0]], key).name == "d/0"


async def test_a_deadline_frees_the_slot_and_is_an_answer(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        late = asyncio.create_task(
            served.session.post(
                "/inference/v1/completions",
                json={"model": DEPLOYMENT, "prompt": PROMPT, "stream": True},
                headers={"x-request-timeout": "0.05"},
            )
        )
        stream = (await engine.control("add"))["stream"]
        assert (await engine.control("cancel"))["streams"] == [stream]
        answer = await late
        assert answer.status == 504
        assert (await answer.json())["error"]["code"] == "DEADLINE_EXCEEDED"
        bad = await served.session.post(
            "/inference/v1/completions",
            json={"model": DEPLOYMENT, "prompt": PROMPT},
            headers={"x-request-timeout": "soon"},
        )
        assert bad.status == 400


# -- an engine that plays a script ----------------------------------------------------------------


def step(
    stream: int, tokens: list[int], finish: Finish = Finish.RUNNING, version: int = 0
) -> bytes:
    """A frame for each token of one stream."""
    frames = b""
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        frames += encode_step(
            Step(
                version,
                1,
                0,
                np.array([stream], np.uint32),
                np.array([token], np.int32),
                np.array([-1.0], np.float32),
                np.array([-1.0], np.float32),
                np.array([finish if last else 0], np.uint8),
                np.empty((1, 0), np.int32),
                np.empty((1, 0), np.float32),
            )
        )
    return frames


def begun(stream: int) -> bytes:
    one = np.ones(1)
    return encode_begun(
        Begun(
            0,
            np.array([stream], np.uint32),
            one.astype(np.float32),
            one.astype(np.float32),
            np.zeros(1, np.uint32),
            one.astype(np.uint32),
        )
    )


async def start(
    served: Served, engine: ScriptedEngine, **body: object
) -> tuple[aiohttp.ClientResponse, int]:
    """A stream that has its first token, 'a'."""
    request = {"prompt": PROMPT, "max_tokens": 50, "stream": True, "raw_output": True, **body}
    task = asyncio.create_task(served.post(**request))
    stream = (await engine.control("add"))["stream"]
    codec = TextCodec(served.live.model.path)
    engine.send(begun(stream), step(stream, codec.encode("a")))
    response = await task
    assert response.status == 200
    return response, stream


async def read_event(response: aiohttp.ClientResponse) -> bytes:
    async with asyncio.timeout(10):
        return (await response.content.readuntil(b"\n\n")).rstrip()


async def text_of(response: aiohttp.ClientResponse) -> str:
    data = orjson.loads((await read_event(response)).removeprefix(b"data: "))
    text: str = data["choices"][0]["text"]
    return text


async def test_the_first_token_comes_at_once_and_later_ones_together(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        response, stream = await start(served, engine)
        assert await text_of(response) == "a"
        engine.send(step(stream, codec.encode("bcdefghi")))
        assert await text_of(response) == "bcdefghi"
        # Fewer than a chunk's worth do not wait for more.
        engine.send(step(stream, codec.encode("jk")))
        assert await text_of(response) == "jk"
        engine.send(step(stream, codec.encode("l"), Finish.LENGTH))
        assert await text_of(response) == "l"
        assert await read_event(response) == b"data: [DONE]"


async def test_tokens_without_text_are_timed_and_do_not_silence_the_stream(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    half = codec.encode("€")[:1]
    async with scripted(model_path, tmp_path, keepalive=0.02) as (served, engine):
        task = asyncio.create_task(served.post(prompt=PROMPT, max_tokens=50, stream=True))
        stream = (await engine.control("add"))["stream"]
        engine.send(begun(stream), step(stream, half))
        response = await task
        assert await text_of(response) == ""
        for _ in range(3):
            engine.send(step(stream, [0] * 8))
        assert await read_event(response) == b": keepalive"
        response.close()


async def test_half_a_character_is_held_back(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    euro = codec.encode("€")
    assert len(euro) == 3
    async with scripted(model_path, tmp_path) as (served, engine):
        response, stream = await start(served, engine, stop=["never"])
        assert await text_of(response) == "a"
        engine.send(step(stream, [*codec.encode("b"), *euro[:2]]))
        assert await text_of(response) == "b"
        engine.send(step(stream, euro[2:]))
        assert await text_of(response) == "€"
        engine.send(step(stream, euro[:2], Finish.LENGTH))
        data = await response.read()
    last = orjson.loads(data.split(b"\n\n")[0].removeprefix(b"data: "))
    assert last["choices"][0]["text"] == "\ufffd"


async def test_an_engine_that_dies_truncates_its_streams(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        response, _ = await start(served, engine)
        waiting = asyncio.create_task(served.refused(prompt=PROMPT))
        await engine.control("add")
        engine.die()
        data = await response.read()
        assert b"[DONE]" not in data
        assert b'"finish_reason":"' not in data
        assert (await waiting)[::2] == (503, "1")
        assert (await served.refused(prompt=PROMPT))[::2] == (503, "1")
        await served.client.closed
        with pytest.raises(ConnectionError):
            served.client.request_load("x")


async def test_a_client_that_goes_away_frees_its_slot(model_path: Path, tmp_path: Path) -> None:
    async with serving(model_path, tmp_path, max_context=100_000, cache_tokens=1 << 20) as served:
        request = {"prompt": PROMPT, "max_tokens": 90_000, "ignore_eos": True, "stream": True}
        responses = [await served.post(**request) for _ in range(3)]
        assert served.client.open_streams == 3
        for response in responses:
            response.close()
        await served.idle()


async def test_silence_is_filled_with_comments(
    model_path: Path, tmp_path: Path, codec: TextCodec
) -> None:
    async with scripted(model_path, tmp_path, keepalive=0.01) as (served, engine):
        response = await served.post(prompt=PROMPT, max_tokens=1, stream=True)
        stream = (await engine.control("add"))["stream"]
        assert await read_event(response) == b": keepalive"
        engine.send(begun(stream), step(stream, codec.encode("z"), Finish.LENGTH))
        rest = await response.read()
    assert b'"text":"z"' in rest
    assert rest.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("started", [False, True])
async def test_diverged_weights_are_named(model_path: Path, tmp_path: Path, started: bool) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        if started:
            response, stream = await start(served, engine)
            await read_event(response)
            engine.send(step(stream, [NO_TOKEN], Finish.NOT_FINITE))
            event = await read_event(response)
            assert event.startswith(b"event: error\ndata: ")
            error = orjson.loads(event.removeprefix(b"event: error\ndata: "))["error"]
            assert error["status_code"] == 422
            assert await response.read() == b""
        else:
            task = asyncio.create_task(served.refused(prompt=PROMPT, stream=True))
            stream = (await engine.control("add"))["stream"]
            engine.send(begun(stream), step(stream, [NO_TOKEN], Finish.NOT_FINITE))
            status, said, _ = await task
            assert status == 422
            assert "diverged" in said


async def test_an_engines_own_refusal_is_a_400(model_path: Path, tmp_path: Path) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        task = asyncio.create_task(served.refused(prompt=PROMPT))
        number = (await engine.control("add"))["stream"]
        engine.send(
            encode_control({"op": "refused", "stream": number, "full": False, "message": "no"})
        )
        assert await task == (400, "no", None)


@pytest.mark.parametrize("nonsense", [b"\xff" * 9, encode_control({"op": "dance"})])
async def test_an_engine_that_talks_nonsense_is_let_go(
    model_path: Path, tmp_path: Path, nonsense: bytes
) -> None:
    async with scripted(model_path, tmp_path) as (served, engine):
        engine.send(nonsense)
        async with asyncio.timeout(10):
            await served.client.closed


async def test_connecting_waits_for_the_socket_and_for_hello(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    client = EngineClient(tmp_path / "late.sock", "late")
    connecting = asyncio.create_task(client.connect())
    await asyncio.sleep(0)
    server = await asyncio.start_unix_server(engine.handle, tmp_path / "late.sock")
    await connecting
    assert client.limits.vocab_size == 300
    await client.close()
    server.close()
    await server.wait_closed()
    with pytest.raises(TimeoutError):
        await EngineClient(tmp_path / "never.sock", "never").connect(timeout_s=0.05)


async def test_a_request_waits_while_its_engine_is_replaced(
    model_path: Path, tmp_path: Path
) -> None:
    async with scripted(model_path, tmp_path, replaced_within=60.0) as (served, engine):
        engines = list(served.live.engines)
        for state in ("UPDATING", "READY"):
            served.live.engines.clear()
            served.live.state = state
            waiting = asyncio.create_task(served.post(prompt=PROMPT, max_tokens=1))
            for _ in range(10):
                await asyncio.sleep(0.001)
            assert not waiting.done()
            served.live.engines[:] = engines
            stream = (await engine.control("add"))["stream"]
            engine.send(step(stream, [1], Finish.LENGTH))
            assert (await waiting).status == 200
        # Who waits for less is answered then; and one that never served is not waited for.
        served.live.engines.clear()
        response = await served.session.post(
            "/inference/v1/completions",
            json={"model": DEPLOYMENT, "prompt": PROMPT},
            headers={"x-request-timeout": "0.001"},
        )
        assert response.status == 503
        served.live.state = "CREATING"
        assert (await served.post(prompt=PROMPT)).status == 503
