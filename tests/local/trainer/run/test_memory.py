"""A trainer asks for its memory before it loads a model, and before each further one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fireworks_training.local.model import memory
from fireworks_training.local.model.memory import NotEnoughMemory, parameter_count
from fireworks_training.local.trainer.run import models
from tests.local.trainer.trainer_driver import Starter, new_model


class Machine:
    """A machine with `free` bytes."""

    free = 1 << 40


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(memory, "free_bytes", lambda: made.free)
    return made


def room_for(path: Path, bytes_per_parameter: float) -> int:
    """Free bytes that are just enough."""
    needed = parameter_count(path) * bytes_per_parameter + (256 << 20)
    return int(needed / memory._SPARE) + 2


@pytest.mark.parametrize(
    ("lora", "forward_only", "bytes_per_parameter"),
    [(None, False, 24), ({"rank": 2}, False, 8), (None, True, 12)],
)
async def test_a_trainer_takes_what_its_kind_needs(
    start: Starter,
    machine: Machine,
    model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lora: Any,
    forward_only: bool,
    bytes_per_parameter: float,
) -> None:
    loads = list[Path]()
    load = models.load_model
    monkeypatch.setattr(models, "load_model", lambda path: loads.append(path) or load(path))
    machine.free = room_for(model_path, bytes_per_parameter)
    await start(lora=lora, forward_only=forward_only)
    assert loads == [model_path]
    machine.free -= 8
    with pytest.raises(
        NotEnoughMemory, match=rf"{bytes_per_parameter} bytes a parameter.*are free"
    ):
        await start(lora=lora, forward_only=forward_only)
    assert loads == [model_path]  # refused before it was loaded


async def test_another_model_is_refused_when_it_would_not_fit(
    start: Starter, machine: Machine
) -> None:
    trainer = await start(lora={"rank": 2})
    await new_model(trainer.http, 1, lora_config={"rank": 2})
    machine.free = 200 << 20
    session = (await trainer.post("create_session", {"tags": [], "user_metadata": {}}))[1]
    body = {
        "session_id": session["session_id"],
        "model_seq_id": 0,
        "base_model": "accounts/local/models/tiny-qwen3",
        "lora_config": {"rank": 2},
    }
    status, answer = await trainer.post("create_model", body)
    assert (status, answer["error_class"]) == (400, "TooMany")
    assert "memory has no room for another" in answer["error"]
    machine.free = 1 << 40
    await new_model(trainer.http, 3, lora_config={"rank": 2})  # and the trainer goes on
