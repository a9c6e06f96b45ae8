"""Servers and a clock for tests of a training loop, without the platform.

`ControlPlaneServer`, `TrainerServer` and `CompletionsServer` answer over real HTTP on a free port
of 127.0.0.1, as the platform does; `async with` starts them, and they note what they were asked.
Give the control plane the other two, and a service needs nothing but its URL:

    async with ControlPlaneServer(TrainerServer(), CompletionsServer()) as platform:
        service = AsyncFiretitanServiceClient.from_firetitan_config(
            base_url=platform.url, api_key="any", base_model="accounts/me/models/any"
        )

Nothing is trained, and completions are made up: tests of a loop are about what it asks for, in
which order, and what it does about a failure. Faults are scripted: an answer that is lost, a
request that is refused, a stream that is cut (`completions_server` lists the vocabulary).

`CharacterTokenizer` makes prompts without a model, `ManualClock` is a steady clock that a test
moves, and `simulate_engine` runs a concurrency window against an engine in virtual time. None of it
needs pytest.
"""

from __future__ import annotations

from fireworks_training._core.window.settings import AimdSettings
from fireworks_training.testing.clock import ManualClock
from fireworks_training.testing.completions_server import Behaviour, CompletionsServer
from fireworks_training.testing.control_plane_server import ControlPlaneServer
from fireworks_training.testing.engine_simulation import EngineRun, Window, simulate_engine
from fireworks_training.testing.tokenizer import CharacterTokenizer
from fireworks_training.testing.trainer_server import TrainerServer

__all__ = [
    "AimdSettings",
    "Behaviour",
    "CharacterTokenizer",
    "CompletionsServer",
    "ControlPlaneServer",
    "EngineRun",
    "ManualClock",
    "TrainerServer",
    "Window",
    "simulate_engine",
]
