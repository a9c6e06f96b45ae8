"""A model that is too large for the machine fails its resources, with the words that say why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import AsyncFiretitanServiceClient, ProvisioningError
from fireworks_training.options import DeploymentConfig
from tests.end_to_end.support import model_folder


def claim(folder: Path, rows: int) -> None:
    """The header of weights with so many rows of a thousand numbers, and nothing behind it."""
    entry = {"dtype": "BF16", "shape": [rows, 1000], "data_offsets": [0, 2000 * rows]}
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


@pytest.mark.slow
async def test_trainer_and_deployment_of_a_huge_model_fail_in_words(
    own_platform: Callable[..., Any], tmp_path: Path
) -> None:
    huge = tmp_path / "huge"
    shutil.copytree(model_folder(), huge)
    claim(huge, 10**9)
    name = "accounts/local/models/huge"
    with own_platform("--model", f"huge={huge}") as platform:

        def service(**options: Any) -> AsyncFiretitanServiceClient:
            return AsyncFiretitanServiceClient.from_firetitan_config(
                base_url=platform.base_url,
                api_key=platform.api_key,
                base_model=name,
                create_deployment=False,
                **options,
            )

        async with service() as full, service(lora_rank=4) as adapter:
            with pytest.raises(ProvisioningError, match=r"24 bytes a parameter.*GiB are free"):
                await full.create_training_client()
            with pytest.raises(ProvisioningError, match=r" 8 bytes a parameter|\(8 bytes"):
                await adapter.create_training_client()
            wanted = DeploymentConfig(deployment_id="huge", base_model=name)
            with pytest.raises(ProvisioningError, match=r"12 bytes a parameter.*GiB are free"):
                await full.create_inference_deployment_sampler(wanted, tokenizer=object())  # type: ignore[arg-type]
