"""A client that is worse on purpose: one failed request ends it. The rule has to say so."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any


class Completion:
    """A completion as the programs read it."""

    def __init__(self, full_tokens: list[int]) -> None:
        self.full_tokens = full_tokens


def _first_line(request: urllib.request.Request) -> str:
    with urllib.request.urlopen(request) as answer:
        line: bytes = answer.readline()
        return line.decode()


class Impatient:
    """A sampler that gives up at the first refusal, and is dead from then on."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/inference/v1/completions"
        self._dead = False

    async def sample_with_prompt_tokens(
        self, prompt: list[int], n: int, max_tokens: int, **options: Any
    ) -> list[Completion]:
        """One completion; `n` is 1."""
        if self._dead:
            raise RuntimeError("given up")
        body = {"prompt": prompt, "n": n, "max_tokens": max_tokens, "stream": True, **options}
        request = urllib.request.Request(
            self._url, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            line = await asyncio.to_thread(_first_line, request)
        except OSError:
            self._dead = True
            raise
        raw = json.loads(line.removeprefix("data: "))["choices"][0]["raw_output"]
        return [Completion(raw["prompt_token_ids"] + raw["completion_token_ids"])]


def sampler(url: str) -> Impatient:
    """The name that the programs use."""
    return Impatient(url)
