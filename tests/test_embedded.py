"""`base_url="local"`: a platform in this process's care, one for all of its services."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from fireworks_training import AsyncFiretitanServiceClient, InvalidArgument, LocalPlatformError
from fireworks_training._async.platform import local_platform
from fireworks_training.config import Endpoint
from tests.end_to_end.support import ADAM, datums

MODEL = "accounts/local/models/tiny-qwen3"


def service(base_url: str, **options: object) -> AsyncFiretitanServiceClient:
    return AsyncFiretitanServiceClient.from_firetitan_config(
        base_url=base_url, base_model=MODEL, create_deployment=False, **options
    )


async def test_two_services_share_one_which_ends_with_the_last_and_keeps_its_state(
    tmp_path: Path,
) -> None:
    others = set(psutil.Process().children(recursive=True))
    url = f"local:{tmp_path / 'state'}"
    async with service(url, trainer_job_id="kept") as first:
        client = await first.create_training_client()
        async with service(url) as second:
            tokenizer = await second.get_tokenizer()
            assert second.base_url == first.base_url
            with pytest.raises(InvalidArgument, match="another state folder"):
                await service("local").get_tokenizer()
        text = "three plus four"
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
        await client.forward_backward(datums(2), "cross_entropy")
        await client.optim_step(ADAM)
        assert (await client.save_state("one")).path == "one"
        children = set(psutil.Process().children(recursive=True)) - others
        assert children
    assert not psutil.wait_procs(children, timeout=10)[1]

    async with service(url, trainer_job_id="kept") as later:
        client = await later.create_training_client()
        assert await client.list_checkpoints() == ["one"]
        await client.load_state_with_optimizer("one")


async def test_a_start_that_is_cancelled_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    starting = asyncio.create_task(local_platform.acquire(Endpoint("local", None)))
    await asyncio.sleep(0.05)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    # The thread goes on to the end of the start, and then gives back what it started.
    await asyncio.to_thread(_wait_until_unused)
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    assert not psutil.wait_procs(left, timeout=15)[1]


def _wait_until_unused() -> None:
    with local_platform._embedded.lock:  # held while the platform starts
        pass


async def test_a_start_that_fails_says_why(tmp_path: Path) -> None:
    file = tmp_path / "a-file"
    file.write_text("in the way")
    with pytest.raises(LocalPlatformError, match="a-file"):
        await service(f"local:{file}").get_tokenizer()
