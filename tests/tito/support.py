"""What the tests of the endpoint share: a server of scripted answers, a tokenizer, an agent."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web

from fireworks_training.testing import Behaviour, CompletionsServer
from fireworks_training.testing import completions_server as stub
from fireworks_training.tito import TITOTrajectoryEndpoint

START, END = 1, 2
SPECIAL = {"<|im_start|>": START, "<|im_end|>": END}


class Characters:
    """A tokenizer of one token a character, with ChatML around messages."""

    chat_template = "chatml"
    all_special_ids = (START, END)

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        **options: Any,
    ) -> Any:
        said = "".join(f"<|im_start|>{m['role']}\n{self.shown(m)}<|im_end|>\n" for m in messages)
        text = said + ("<|im_start|>assistant\n" if add_generation_prompt else "")
        return self.encode(text) if tokenize else text

    def shown(self, message: dict[str, Any]) -> str:
        """A message's text as the template writes it."""
        return str(message["content"])

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        for name, token in SPECIAL.items():
            text = text.replace(name, chr(token))
        return [ord(character) for character in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def says(text: str, ids: list[int] | None = None, *, finish: str = "stop") -> Behaviour:
    """A completion of this text, in one token a character unless given, with an end of turn."""

    async def answer(
        server: CompletionsServer, request: web.Request, body: dict[str, Any]
    ) -> web.StreamResponse:
        tokens = [ord(character) for character in text] if ids is None else ids
        tokens = [*tokens, END] if finish == "stop" else tokens
        entries = [
            {"token_id": t, "logprob": -0.5 - n, "sampling_logprob": -0.25 - n}
            for n, t in enumerate(tokens)
        ]
        choice = {"index": 0, "text": text, "logprobs": {"content": entries}}
        last = stub.last_chunk(body, tokens)
        last["choices"][0]["finish_reason"] = finish
        response = await stub.open_stream(request)
        await response.write(stub.event({"id": "cmpl-1", "choices": [choice]}))
        await response.write(stub.event(last) + stub.event(b"[DONE]"))
        await response.write_eof()
        return response

    return answer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@dataclass
class Answer:
    status: int
    body: dict[str, Any]

    @property
    def message(self) -> dict[str, Any]:
        assert self.status == 200, self.body
        return dict(self.body["choices"][0]["message"])

    @property
    def code(self) -> str:
        return str(self.body["error"]["code"])


async def ask(
    endpoint: TITOTrajectoryEndpoint,
    messages: list[dict[str, Any]],
    *,
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> Answer:
    """One chat call, not streamed."""
    body = {"messages": messages, **fields}
    given = {"Authorization": f"Bearer {endpoint.api_key}", **(headers or {})}
    url = f"{endpoint.openai_base_url}/chat/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=given) as answer,
    ):
        return Answer(answer.status, await answer.json())


async def events(
    endpoint: TITOTrajectoryEndpoint, messages: list[dict[str, Any]], **fields: Any
) -> list[str]:
    """The lines of a streamed chat call."""
    body = {"messages": messages, "stream": True, **fields}
    given = {"Authorization": f"Bearer {endpoint.api_key}"}
    url = f"{endpoint.openai_base_url}/chat/completions"
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, headers=given) as answer,
    ):
        assert answer.status == 200, await answer.text()
        return [line.decode().strip() async for line in answer.content if line.strip()]


def data_of(lines: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
