"""tinker-cookbook's RL loop with loss_fn="ppo" on an environment of its own; what it logged."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import chz
import tinker
from tinker_cookbook.rl import train
from tinker_cookbook.rl.types import (
    Env,
    EnvGroupBuilder,
    RLDataset,
    RLDatasetBuilder,
    StepResult,
)


class LowTokens(Env):
    """One turn; the reward is the share of sampled ids below 128."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def initial_observation(self):
        tokens = [20 + (self._seed * 7 + step) % 60 for step in range(6)]
        return tinker.ModelInput.from_ints(tokens), []

    async def step(self, action, *, extra=None) -> StepResult:
        reward = sum(token < 128 for token in action) / max(len(action), 1)
        return StepResult(
            reward=reward,
            episode_done=True,
            next_observation=tinker.ModelInput.empty(),
            next_stop_condition=[],
            metrics={"low": reward},
        )


class Group(EnvGroupBuilder):
    """Four rollouts of one prompt."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    async def make_envs(self) -> Sequence[Env]:
        return [LowTokens(self._seed) for _ in range(4)]

    def logging_tags(self) -> list[str]:
        return ["low"]


class Prompts(RLDataset):
    def __init__(self, batches: int) -> None:
        self._batches = batches

    def get_batch(self, index: int) -> Sequence[EnvGroupBuilder]:
        return [Group(index * 4 + offset) for offset in range(4)]

    def __len__(self) -> int:
        return self._batches


@chz.chz
class Builder(RLDatasetBuilder):
    batches: int

    async def __call__(self):
        return Prompts(self.batches), None


if __name__ == "__main__":
    log = Path("rl")
    config = train.Config(
        log_path=str(log),
        model_name=sys.argv[1],
        recipe_name="interop",
        dataset_builder=Builder(batches=3),
        learning_rate=1e-3,
        lora_rank=8,
        max_tokens=8,
        loss_fn="ppo",
        eval_every=0,
        save_every=0,
    )
    asyncio.run(train.main(config))
    rows = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "env/all/reward/total" in row]
    seen = {
        "rewards": [row["env/all/reward/total"] for row in steps],
        "divergence": [row.get("optim/kl_sample_train_v1") for row in steps],
    }
    print(json.dumps(seen), flush=True)
