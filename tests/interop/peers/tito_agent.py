"""The official sidecar before the same deployment; run by an interpreter that has the official SDK.

    python tito_agent.py INFERENCE_URL CONVERSATIONS PACKED

CONVERSATIONS is JSON: for each trajectory the message lists of its calls. PACKED is an artifact of
ours, to be read. Prints one JSON line.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from typing import Any

import aiohttp
from fireworks.training import sdk  # type: ignore[import-not-found]

URL, CONVERSATIONS, PACKED = sys.argv[1:4]
OURS = Path(PACKED).read_bytes()
START, END = chr(1), chr(2)


class Renderer:
    """One token a character, with ChatML around messages; reasoning is dropped from the history."""

    renderer_id = "characters"

    def render_conversation_tokens(self, request: Any) -> list[int]:
        texts = [(m["role"], m["content"].rpartition("</think>")[2]) for m in request.messages]
        said = "".join(f"{START}{role}\n{text}{END}\n" for role, text in texts)
        return [ord(character) for character in f"{said}{START}assistant\n"]

    def parse_assistant(self, request: Any, ids: Any, text: str, finish_reason: str) -> Any:
        return sdk.TITOParsedAssistant({"role": "assistant", "content": text})

    def render_contract_id(self, request: Any) -> str:
        return "characters"

    def stop_sequences(self, request: Any) -> None:
        return None


async def trajectory(sidecar: Any, calls: list[Any]) -> Any:
    endpoint = await sidecar.create_trajectory_async()
    headers = {"Authorization": f"Bearer {endpoint.api_key}"}
    url = f"{endpoint.openai_base_url}/chat/completions"
    async with aiohttp.ClientSession(headers=headers) as session:
        for messages in calls:
            async with session.post(url, json={"messages": messages}) as answer:
                assert answer.status == 200, await answer.text()
    return await sidecar.finish_trajectory(endpoint.trajectory_id)


async def main() -> None:
    sampler = sdk.DeploymentSampler(URL, "accounts/a/deployments/d", "fw_key")
    async with sdk.TITOSidecar.from_deployment_sampler(
        sampler, renderer=Renderer(), max_context_tokens=400, max_output_tokens=60
    ) as sidecar:
        made = [await trajectory(sidecar, calls) for calls in json.loads(CONVERSATIONS)]
    ours = sdk.TITOTrajectoryArtifact.unpack(OURS)
    print(
        json.dumps(
            {
                "packed": [base64.b64encode(artifact.pack()).decode() for artifact in made],
                "ours": [
                    [list(turn.exact_checkpoint_ids) for turn in segment.turns]
                    for segment in ours.segments
                ],
                "again": base64.b64encode(ours.pack()).decode(),
            }
        )
    )


asyncio.run(main())
