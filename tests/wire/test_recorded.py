"""What the official clients said to the platform, said again: the answers must be what they were.

Recorded once from the real clients (see `tests/interop/record.py`; to record anew, run
`FIREWORKS_RECORD_WIRE=1 pytest -n0 -m slow tests/interop/test_clients.py`). So a mistake that our
client and our server share shows here. Ids that the server makes differ from run to run: what an
answer brought in the place of a recorded id takes that id's place from then on. Numbers are of the
shipped model and have to agree; a new shipped model needs a new recording.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import secrets
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from fireworks_training._wire.training import protobuf, schema
from tests.conftest import RunningPlatform
from tests.end_to_end.support import model_folder

RECORDED = Path(__file__).parent / "recorded"
_SESSION = re.compile(r"ts-[0-9a-f]{32}")
_CHOSEN = re.compile(r"(?:direct|training-api-service|tiny-qwen3)-[a-z0-9-]*[0-9a-f]{6,}")
PATIENCE_S = 60.0


def content(part: dict[str, str]) -> bytes:
    return part["text"].encode() if "text" in part else base64.b64decode(part["base64"])


class Replay:
    """One recording against a platform."""

    def __init__(self, platform: RunningPlatform, http: aiohttp.ClientSession) -> None:
        self.platform = platform
        self.http = http
        self.ids: dict[str, str] = {"{MODEL}": str(model_folder())}

    def renamed(self, text: bytes) -> bytes:
        for old, new in self.ids.items():
            text = text.replace(old.encode(), new.encode())
        return text

    def choose_ids(self, exchanges: list[dict[str, Any]]) -> None:
        """Names that the client chose: others, since this platform may know the old ones."""
        for found in sorted(set(_CHOSEN.findall(json.dumps(exchanges)))):
            self.ids[found] = f"{found[:-6]}{secrets.token_hex(3)}"

    async def send(self, exchange: dict[str, Any]) -> tuple[int, str, bytes]:
        url = self.platform.base_url + self.renamed(exchange["path"].encode()).decode()
        headers = {
            name: self.renamed(value.encode()).decode()
            for name, value in exchange["headers"].items()
        }
        headers["X-API-Key"] = self.platform.api_key
        body = self.renamed(content(exchange["request"]))
        async with asyncio.timeout(PATIENCE_S):
            while True:
                async with self.http.request(
                    exchange["method"], url, headers=headers, data=body
                ) as response:
                    answer = await response.read()
                    if b'"try_again"' not in answer[:200]:
                        return response.status, response.content_type, answer

    async def play(self, exchange: dict[str, Any]) -> None:
        status, kind, answer = await self.send(exchange)
        recorded = content(exchange["answer"])
        what = f"{exchange['method']} {exchange['path']}: {answer[:500]!r}"
        assert status == exchange["status"], what
        if not recorded:
            return
        assert kind == exchange["content_type"], what
        if kind == protobuf.CONTENT_TYPE:
            self.compare_message(recorded, answer, what)
            return
        for old, new in zip(
            _SESSION.findall(recorded.decode()), _SESSION.findall(answer.decode()), strict=True
        ):
            self.ids.setdefault(old, new)
        if "event-stream" not in kind:
            compare(json.loads(self.renamed(recorded)), json.loads(answer), what)
        await self.settle(exchange["path"])

    def compare_message(self, recorded: bytes, answer: bytes, what: str) -> None:
        if b"ArrayRecord" in recorded:
            wanted, got = protobuf.decode_result(recorded), protobuf.decode_result(answer)
            compare(wanted.metrics, got.metrics, what)
            for one, other in zip(wanted.outputs, got.outputs, strict=True):
                assert one.keys() == other.keys()
                for name in one:
                    np.testing.assert_allclose(other[name], one[name], rtol=1e-3, atol=1e-3)
            return
        samples = [schema.SampleResponse.FromString(raw) for raw in (recorded, answer)]
        scores = [np.frombuffer(s.prompt_logprobs, "<f4") for s in samples]
        np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-3)
        chosen = [s.target_prompt_logprobs for s in samples]
        values = [np.frombuffer(c.dense or c.sparse_csr.values, "<f4") for c in chosen]
        np.testing.assert_allclose(values[1], values[0], rtol=1e-3, atol=1e-3)
        assert [list(s.prompt_alt_tokens.tokens.shape) for s in samples[1:]] == [
            list(samples[0].prompt_alt_tokens.tokens.shape)
        ]
        lengths = [[len(sequence.logprobs) for sequence in s.sequences] for s in samples]
        assert lengths[0] == lengths[1]

    async def settle(self, path: str) -> None:
        """What the client waited for with requests that are not in the recording."""
        path = self.renamed(path.encode()).decode().partition("?")[0]
        for part, ready in (
            ("/rlorTrainerJobs", {"JOB_STATE_RUNNING"}),
            ("/deployments", {"READY"}),
        ):
            if path.startswith("/v1/") and path.endswith(part):
                async with asyncio.timeout(PATIENCE_S):
                    while not await self._all_are(path, ready):  # noqa: ASYNC110 - over HTTP
                        await asyncio.sleep(0.02)

    async def _all_are(self, path: str, states: set[str]) -> bool:
        headers = {"X-API-Key": self.platform.api_key}
        async with self.http.get(self.platform.base_url + path, headers=headers) as response:
            rows = next(iter((await response.json()).values()))
        chosen = set(self.ids.values())
        return all(row["state"] in states for row in rows if row["name"].split("/")[-1] in chosen)


_FREE = ("createTime", "updateTime", "sha256", "message", "statusMessage", "timings")


def compare(wanted: Any, got: Any, what: str) -> None:
    """The same keys, kinds and numbers; texts for people and hashes are free."""
    if isinstance(wanted, dict):
        assert isinstance(got, dict), what
        assert wanted.keys() <= got.keys(), what
        for key in wanted:
            if key not in _FREE:
                compare(wanted[key], got[key], f"{key} in {what}")
    elif isinstance(wanted, list):
        assert len(wanted) == len(got), what
        for one, other in zip(wanted, got, strict=True):
            compare(one, other, what)
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, rel=1e-3, abs=1e-3), what
    else:
        assert type(got) is type(wanted), what


@pytest.mark.parametrize("file", sorted(RECORDED.glob("*.json")), ids=lambda path: path.stem)
async def test_the_platform_answers_as_recorded(platform: RunningPlatform, file: Path) -> None:
    exchanges = json.loads(await asyncio.to_thread(file.read_text))
    assert len(exchanges) > 20
    async with aiohttp.ClientSession() as http:
        replay = Replay(platform, http)
        replay.choose_ids(exchanges)
        for exchange in exchanges:
            await replay.play(exchange)


def test_a_changed_answer_is_noticed() -> None:
    wanted = {"metrics": {"loss:sum": 1.0}, "path": "a", "kept": [1]}
    compare(wanted, {"metrics": {"loss:sum": 1.0005}, "path": "b", "kept": [2], "more": 1}, "")
    for changed in (
        {"metrics": {"loss:sum": 1.01}, "path": "b", "kept": [1]},
        {"metrics": {}, "path": "b", "kept": [1]},
        {"metrics": {"loss:sum": 1.0}, "path": None, "kept": [1]},
        {"metrics": {"loss:sum": 1.0}, "path": "b", "kept": []},
    ):
        with pytest.raises(AssertionError):
            compare(wanted, changed, "")
