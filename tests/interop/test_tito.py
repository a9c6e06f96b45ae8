"""The official sidecar and ours before one deployment: the same turns, and each reads the other's
artifacts."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import (
    ChatTemplateRenderer,
    DeploymentSampler,
    TITOSidecar,
    TITOTrajectoryArtifact,
)
from fireworks_training.testing import CompletionsServer
from tests.async_.sampling.support import KEY, MODEL
from tests.tito.support import ask, assistant, says, user
from tests.tito.turns.test_turns import Forgetful

pytestmark = pytest.mark.slow

PEER = Path(__file__).parent / "peers" / "tito_agent.py"
HELLO, MORE = user("hello"), user("more")
ANSWERS = [("one", None), ("two", None), ("ab", [7001, 7002]), ("two", None)]
ANSWERS += [("<think>hm</think>4", None), ("two", None), ("one", None), ("two", None)]
CONVERSATIONS = [
    [[HELLO], [HELLO, assistant("one"), MORE]],
    [[HELLO], [HELLO, assistant("ab"), MORE]],
    [[HELLO], [HELLO, assistant("<think>hm</think>4"), MORE]],
    [[HELLO], [user("hullo"), assistant("one"), MORE]],
]
"""Appended to; tokenized otherwise; reasoning dropped by the template; edited."""


def decisions(artifact: TITOTrajectoryArtifact) -> list[Any]:
    return [
        (
            segment.start_reason,
            segment.closed_reason,
            segment.tokens,
            segment.loss_mask,
            segment.logprobs,
            [
                (
                    turn.prompt_disposition,
                    turn.prefix_match_tokens,
                    turn.realign_from_token,
                    turn.realigned_masked_tokens,
                    turn.effective_output_tokens,
                    turn.context_remaining_tokens,
                    turn.finish_reason,
                    turn.assistant.message["content"],
                )
                for turn in segment.turns
            ],
        )
        for segment in artifact.segments
    ]


async def ours(url: str) -> list[TITOTrajectoryArtifact]:
    made: list[TITOTrajectoryArtifact] = []
    sampler = DeploymentSampler(url, MODEL, KEY)
    async with (
        sampler,
        TITOSidecar.from_deployment_sampler(
            sampler,
            renderer=ChatTemplateRenderer(Forgetful()),
            max_context_tokens=400,
            max_output_tokens=60,
        ) as sidecar,
    ):
        for calls in CONVERSATIONS:
            endpoint = await sidecar.create_trajectory_async()
            for messages in calls:
                assert (await ask(endpoint, messages)).status == 200
            made.append(await sidecar.finish_trajectory(endpoint.trajectory_id))
    return made


def test_the_official_sidecar_decides_the_same(official_python: str, tmp_path: Path) -> None:
    with CompletionsServer() as server:
        server.script = [says(text, ids) for text, ids in ANSWERS]
        mine = asyncio.run(ours(server.url))
        (tmp_path / "ours").write_bytes(mine[1].pack())
        prompts = [body["prompt"] for body in server.bodies]
        server.bodies.clear()
        server.script = [says(text, ids) for text, ids in ANSWERS]
        command = [official_python, str(PEER), server.url, json.dumps(CONVERSATIONS)]
        done = subprocess.run(
            [*command, str(tmp_path / "ours")],
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        assert [body["prompt"] for body in server.bodies] == prompts
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    theirs = [TITOTrajectoryArtifact.unpack(base64.b64decode(one)) for one in seen["packed"]]
    assert [decisions(one) for one in theirs] == [decisions(one) for one in mine]
    assert {d for one in mine for s in one.segments for d in [s.turns[-1].prompt_disposition]} == {
        "append",
        "realign",
        "new_segment",
    }
    assert seen["ours"] == [
        [list(turn.exact_checkpoint_ids) for turn in segment.turns] for segment in mine[1].segments
    ]
    again = TITOTrajectoryArtifact.unpack(base64.b64decode(seen["again"]))
    assert decisions(again) == decisions(mine[1])
