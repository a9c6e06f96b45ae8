"""The worker as a process: serves on its socket, ends on SIGTERM, and its work survives SIGKILL."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from fireworks_training.local.trainer import worker
from tests.local.trainer.trainer_driver import ADAM, cross_entropy, new_model, some_data

START = (
    "import json, sys; from fireworks_training.local.trainer.worker import main;"
    " main(json.loads(sys.argv[1]))"
)


class Process:
    def __init__(self, process: asyncio.subprocess.Process, http: Any) -> None:
        self.process = process
        self.http = http


@asynccontextmanager
async def running(model_path: Path, folder: Path) -> AsyncIterator[Process]:
    with tempfile.TemporaryDirectory(prefix="fwt-") as sockets:
        socket = Path(sockets) / "t.sock"
        settings = {
            "socket": str(socket),
            "job": "job-1",
            "base_model": "m",
            "model_path": str(model_path),
            "states_dir": str(folder / "jobs" / "job-1" / "states"),
            "snapshots_dir": str(folder / "snapshots"),
            "lora_rank": 0,
            "max_context_length": 32,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", START, json.dumps(settings)
        )
        connector = aiohttp.UnixConnector(str(socket))
        async with aiohttp.ClientSession("http://worker", connector=connector) as http:
            try:
                while not socket.exists():
                    assert process.returncode is None, "the worker did not start"
                    await asyncio.sleep(0.02)
                yield Process(process, http)
                if process.returncode is None:
                    process.send_signal(signal.SIGTERM)
                    assert await process.wait() == 0
                    assert not socket.exists()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def test_killed_and_started_again_it_goes_on(model_path: Path, tmp_path: Path) -> None:
    later = cross_entropy(*some_data(seed=1))
    async with running(model_path, tmp_path) as first:
        alive = await first.http.get("/internal/alive")
        assert await alive.content.readline() == b"alive\n"
        trainer = await new_model(first.http)
        await trainer.ok("forward_backward", **cross_entropy(*some_data()))
        await trainer.ok("optim_step", adam_params=ADAM)
        await trainer.ok("save_weights", path="s")
        wanted = await trainer.ok("forward_backward", **later)
        first.process.kill()
        with pytest.raises(aiohttp.ClientError):
            await alive.content.read()
        alive.close()
        await first.process.wait()
    (tmp_path / "snapshots" / (".tmp-job-1." + "0" * 32)).mkdir()
    async with running(model_path, tmp_path) as second:
        assert list((tmp_path / "snapshots").iterdir()) == []
        reborn = await new_model(second.http)
        await reborn.ok("load_weights", path="s", optimizer=True)
        assert await reborn.ok("forward_backward", **later) == wanted


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="colour"):
        worker.main({"colour": "red"})
