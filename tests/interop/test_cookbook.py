"""Recipes of the vendor's cookbook, with the official SDK and with this package in its place."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningPlatform
from tests.interop.environments import interpreter

COOKBOOK = os.environ.get("FIREWORKS_COOKBOOK")
SCRIPT = Path(__file__).parent / "cookbook_recipe.py"
ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "fireworks_training/local/assets/tiny-qwen3"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not COOKBOOK, reason="FIREWORKS_COOKBOOK names no folder of the cookbook"),
]


def question(a: int) -> dict[str, str]:
    return {"role": "user", "content": f"Ann has {a} pens and gets 2 more. How many has she?"}


def answer(a: int) -> dict[str, str]:
    return {"role": "assistant", "content": f"#### {a}"}


def chats(path: Path) -> None:
    rows = [{"messages": [question(a), answer(a + 2)]} for a in range(16)]
    path.write_text("\n".join(map(json.dumps, rows)))


def preferences(path: Path) -> None:
    rows = [
        {
            "chosen": {"messages": [question(a), answer(a + 2)]},
            "rejected": {"messages": [question(a), answer(a + 5)]},
        }
        for a in range(16)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))


def metrics(
    platform: RunningPlatform, recipe: str, data: Path, out: Path, *how: str
) -> tuple[str, list[dict[str, Any]]]:
    """Run the recipe; gives the module of the SDK that it used, and its metrics."""
    ended = subprocess.run(
        [interpreter("cookbook"), *how, str(SCRIPT), recipe, str(data), str(out), str(TOKENIZER)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FIREWORKS_BASE_URL": platform.base_url,
            "FIREWORKS_API_KEY": platform.api_key.replace("tml-", "fw_", 1),
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
        },
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    (sdk,) = (line for line in ended.stdout.splitlines() if line.startswith("SDK "))
    said = (ended.stdout + ended.stderr).splitlines()
    rows = [json.loads(line) for line in said if line.startswith('{"type": "metrics"')]
    return sdk.split()[1], rows


@pytest.mark.parametrize(
    ("recipe", "write", "loss"),
    [("sft_loop", chats, "ce_loss"), ("orpo_loop", preferences, "orpo_loss")],
)
def test_a_recipe_has_the_same_losses_with_either_sdk(
    platform: RunningPlatform, tmp_path: Path, recipe: str, write: Any, loss: str
) -> None:
    data = tmp_path / "data.jsonl"
    write(data)
    official = metrics(platform, recipe, data, tmp_path / "official")
    ours = metrics(platform, recipe, data, tmp_path / "ours", "-m", "fireworks_training.dropin")
    assert official[0].startswith("fireworks.")
    assert ours[0].startswith("fireworks_training.")
    assert [row[loss] for row in ours[1]] == pytest.approx(
        [row[loss] for row in official[1]], rel=1e-6
    )
    assert len(ours[1]) == 4
