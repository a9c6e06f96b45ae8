"""The engine's queue, slots and hot loads: the order of admission, and the weights in use."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM

from fireworks_training.local.engine.core import Engine
from fireworks_training.local.engine_frames import (
    Begun,
    Control,
    Finish,
    FrameDecoder,
    PromptLogprobs,
    Step,
)
from fireworks_training.local.model.model import load_model, round_parameters_
from fireworks_training.local.store.snapshots import SnapshotStore
from tests.local.engine.tiny_model import EOS, make_engine, tiny_qwen3, write_base, write_lora


class Gateway:
    """Sends controls and keeps what the engine answers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.versions: dict[int, set[int]] = defaultdict(set)
        self.finish: dict[int, Finish] = {}
        self.begun: list[int] = []
        self.queued: dict[int, float] = {}
        self.controls: list[dict[str, object]] = []
        self.prompts: dict[int, PromptLogprobs] = {}
        self.last: Step | None = None

    def add(self, stream: int, **fields: object) -> None:
        message = {"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "seed": stream}
        self.engine.control({**message, **fields, "op": "add", "stream": stream})

    def load(self, number: int, identity: str) -> None:
        self.engine.control({"op": "load", "number": number, "identity": identity})

    def tick(self) -> None:
        for frame in FrameDecoder().feed(b"".join(self.engine.tick())):
            match frame:
                case Step():
                    self._take(frame)
                case Begun():
                    self.begun += frame.streams.tolist()
                    self.queued |= dict(
                        zip(frame.streams.tolist(), frame.queued.tolist(), strict=True)
                    )
                case PromptLogprobs():
                    self.prompts[frame.stream] = frame
                case Control():
                    self.controls.append(frame.message)

    def run(self) -> None:
        while self.engine.busy:
            self.tick()

    def _take(self, step: Step) -> None:
        self.last = step
        for i, stream in enumerate(step.streams.tolist()):
            self.tokens[stream].append(int(step.tokens[i]))
            self.logprobs[stream].append(float(step.logprobs[i]))
            self.versions[stream].add(step.version)
            if step.finished[i]:
                self.finish[stream] = Finish(step.finished[i])

    @property
    def stages(self) -> list[object]:
        return [message["stage"] for message in self.controls if message["op"] == "status"]

    @property
    def ended(self) -> dict[object, object]:
        ended = [message for message in self.controls if message["op"] == "load_ended"]
        return {message["number"]: message["outcome"] for message in ended}


@pytest.fixture
def gateway(model_path: Path, store: SnapshotStore) -> Gateway:
    return Gateway(make_engine(model_path, store))


@torch.no_grad()
def forward_logprobs(model: Qwen3ForCausalLM, tokens: list[int]) -> np.ndarray:
    """What a plain forward says of `tokens` after the prompt of `Gateway.add`."""
    ids = [5, 6, 7, *tokens]
    rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
    return rows[np.arange(2, len(ids) - 1), tokens]


def error_to(gateway: Gateway, stream: int, model: Qwen3ForCausalLM) -> float:
    expected = forward_logprobs(model, gateway.tokens[stream])
    return float(np.abs(np.array(gateway.logprobs[stream]) - expected).max())


def test_requests_beyond_the_slots_wait_and_join_as_slots_free(gateway: Gateway) -> None:
    for stream in range(12):
        gateway.add(stream, max_tokens=3 + stream)
    gateway.tick()
    assert gateway.begun == list(range(8))
    assert gateway.last is not None
    assert (gateway.last.active, gateway.last.waiting) == (8, 4)
    gateway.run()
    assert gateway.begun == list(range(12))
    assert [len(gateway.tokens[stream]) for stream in range(12)] == [3 + s for s in range(12)]
    assert (gateway.last.active, gateway.last.waiting) == (0, 0)


def test_the_cache_bounds_what_runs_together(model_path: Path, store: SnapshotStore) -> None:
    gateway = Gateway(make_engine(model_path, store, cache_tokens=100))
    gateway.add(1, max_tokens=200)
    gateway.add(2, max_tokens=2)
    gateway.tick()
    assert gateway.begun == [1], "one stream is always allowed, a second one has no room"
    gateway.engine.cancel({1})
    gateway.add(3, max_tokens=47)
    gateway.add(4, max_tokens=1)
    gateway.tick()
    assert gateway.begun == [1, 2, 3]
    gateway.run()
    assert set(gateway.finish) == {2, 3, 4}


def test_a_full_queue_refuses(gateway: Gateway) -> None:
    for stream in range(8 + 16):
        gateway.add(stream)
    gateway.add(99)
    gateway.tick()
    refusal = next(message for message in gateway.controls if message["op"] == "refused")
    assert (refusal["stream"], refusal["full"]) == (99, True)
    gateway.run()
    assert sorted(gateway.finish) == list(range(24))


def test_a_bad_request_is_refused_alone(gateway: Gateway) -> None:
    gateway.add(1, prompt=[300])
    gateway.add(2)
    gateway.add(2)
    gateway.run()
    refusals = {message["stream"]: message for message in gateway.controls}
    assert "0 to 299" in str(refusals[1]["message"])
    assert "taken" in str(refusals[2]["message"])
    assert not refusals[1]["full"]
    assert list(gateway.finish) == [2]
    with pytest.raises(ValueError, match="not understood"):
        gateway.engine.control({"op": "dance"})


def test_eos_ends_a_stream_unless_ignored(gateway: Gateway) -> None:
    wild = {"temperature": 6.0, "max_tokens": 200}
    for seed in range(8):
        gateway.add(seed, **wild)
    gateway.run()
    seed = next(seed for seed in range(8) if EOS in gateway.tokens[seed])
    gateway.add(20, **wild, seed=seed, ignore_eos=False)
    gateway.run()
    first = gateway.tokens[seed].index(EOS)
    assert gateway.tokens[20] == gateway.tokens[seed][: first + 1]
    assert (gateway.finish[seed], gateway.finish[20]) == (Finish.LENGTH, Finish.STOP)


def test_cancel_frees_slots_at_the_next_tick_and_says_so(gateway: Gateway) -> None:
    for stream in range(10):
        gateway.add(stream, max_tokens=50)
    gateway.tick()
    gateway.engine.control({"op": "cancel", "streams": [0, 1, 9, 12345]})
    gateway.tick()
    assert gateway.last is not None
    assert (gateway.last.active, gateway.last.waiting) == (7, 0)
    assert gateway.begun == list(range(9))
    gateway.engine.cancel(set(range(10)))
    gateway.tick()
    assert (gateway.last.active, gateway.last.waiting) == (0, 0)
    assert not gateway.engine.busy


def test_cancelling_32_of_64_streams_frees_their_slots_at_the_next_step(
    model_path: Path, store: SnapshotStore
) -> None:
    gateway = Gateway(make_engine(model_path, store, max_slots=64, max_waiting=64))
    for stream in range(96):
        gateway.add(stream, max_tokens=60, prompt=[2 + stream, 3, 4])
    gateway.tick()
    assert gateway.last is not None
    assert (gateway.last.active, gateway.last.waiting) == (64, 32)
    gateway.engine.control({"op": "cancel", "streams": list(range(0, 64, 2))})
    before = {stream: len(tokens) for stream, tokens in gateway.tokens.items()}
    gateway.tick()
    assert (gateway.last.active, gateway.last.waiting) == (64, 0)
    assert gateway.begun == list(range(96)), "who waited has the slots of those who left"
    gained = [len(gateway.tokens[s]) - before.get(s, 0) for s in range(96)]
    assert gained == [s % 2 for s in range(64)] + [1] * 32
    gateway.run()
    assert sorted(gateway.finish) == [s for s in range(96) if s >= 64 or s % 2]


def test_queue_time_counts_from_when_the_gateway_sent_it(
    model_path: Path, store: SnapshotStore
) -> None:
    now = 100.0
    engine = make_engine(model_path, store)
    engine._clock = lambda: now
    gateway = Gateway(engine)
    gateway.add(1, sent=97.5)
    gateway.add(2)
    gateway.add(3, sent=10**9)
    now = 101.0
    gateway.tick()
    assert gateway.queued == {1: 3.5, 2: 1.0, 3: 1.0}


def test_a_load_waits_for_the_batch_and_requests_wait_for_the_load(
    gateway: Gateway, store: SnapshotStore, model_path: Path
) -> None:
    manifest = write_base(store, "step-1", seed=1)
    gateway.add(1, max_tokens=6)
    gateway.tick()
    gateway.load(1, "step-1")
    gateway.add(2, max_tokens=6)
    gateway.tick()
    assert gateway.begun == [1]
    assert gateway.stages == ["pending", "loading"]
    gateway.run()
    assert gateway.stages == ["pending", "loading", "ready"]
    assert gateway.ended == {1: "loaded"}
    status = [message for message in gateway.controls if message["op"] == "status"][-1]
    assert status["identity"] == "step-1"
    assert status["tensors_sha256"] == manifest.sha256
    assert gateway.versions == {1: {0}, 2: {1}}

    old = load_model(model_path)
    round_parameters_(old, "bfloat16")
    new = tiny_rounded(1)
    assert error_to(gateway, 1, old) < 1e-4
    assert error_to(gateway, 2, new) < 1e-4
    # Negative control: the snapshot before it, left in the engine, would be seen.
    assert error_to(gateway, 2, old) > 1e-2


def tiny_rounded(seed: int) -> Qwen3ForCausalLM:
    model = tiny_qwen3(seed)
    round_parameters_(model, "bfloat16")
    return model


def test_of_two_loads_the_newer_wins(gateway: Gateway, store: SnapshotStore) -> None:
    write_base(store, "a", seed=1)
    write_base(store, "b", seed=2)
    gateway.add(1)
    gateway.tick()
    gateway.load(1, "a")
    gateway.load(2, "b")
    gateway.run()
    assert gateway.ended == {1: "superseded", 2: "loaded"}
    assert gateway.controls[-2]["identity"] == "b"
    assert gateway.controls[-2]["version"] == 1


def test_loading_what_is_loaded_is_a_no_op(gateway: Gateway, store: SnapshotStore) -> None:
    write_base(store, "a", seed=1)
    gateway.load(1, "a")
    gateway.run()
    gateway.add(7, max_tokens=50)
    gateway.tick()
    gateway.load(2, "a")
    gateway.tick()
    assert gateway.ended == {1: "loaded", 2: "loaded"}
    status = [message for message in gateway.controls if message["op"] == "status"][-1]
    assert (status["version"], status["stage"]) == (1, "ready")
    # It also takes back a load that was still waiting.
    write_base(store, "b", seed=2)
    gateway.load(3, "b")
    gateway.load(4, "a")
    gateway.run()
    assert gateway.ended == {1: "loaded", 2: "loaded", 3: "superseded", 4: "loaded"}
    assert gateway.versions[7] == {1}


def corrupt(store: SnapshotStore) -> None:
    write_base(store, "bad", seed=1)
    file = store.path("bad") / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def foreign(store: SnapshotStore) -> None:
    write_base(store, "bad", seed=1, base="accounts/local/models/other")


def another_shape(store: SnapshotStore) -> None:
    store.write(
        "bad",
        {"lm_head.weight": torch.zeros(3, 3).bfloat16()},
        base_model="accounts/local/models/tiny",
        dtype="bfloat16",
    )


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (corrupt, "does not hold what its manifest says"),
        (foreign, "accounts/local/models/other"),
        (another_shape, "not of this model"),
        (lambda store: None, "there is no snapshot"),
    ],
)
def test_a_refused_snapshot_leaves_the_old_one_serving(
    gateway: Gateway, store: SnapshotStore, spoil: object, reason: str
) -> None:
    write_base(store, "good", seed=4)
    gateway.load(1, "good")
    gateway.run()
    assert callable(spoil)
    spoil(store)
    gateway.load(2, "bad")
    gateway.run()
    assert gateway.ended == {1: "loaded", 2: "failed"}
    status = [message for message in gateway.controls if message["op"] == "status"][-1]
    assert (status["stage"], status["target"], status["identity"]) == ("error", "bad", "good")
    assert reason in str(status["error"])
    gateway.add(1)
    gateway.run()
    assert error_to(gateway, 1, tiny_rounded(4)) < 1e-4
    gateway.load(3, "good")
    gateway.run()
    assert gateway.stages[-1] == "ready"


def test_an_adapter_is_merged_into_the_pristine_base(
    gateway: Gateway, store: SnapshotStore
) -> None:
    first = write_lora(store, "lora-1", seed=1)
    write_lora(store, "lora-2", seed=2)
    write_base(store, "base-1", seed=9)
    reference = tiny_rounded(0)
    tensors = store.load("lora-1")[1]
    with torch.no_grad():
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.0.self_attn.{name}"
            a, b = (tensors[f"{prefix}.lora_{half}.weight"].float() for half in "AB")
            weight = reference.get_submodule(f"model.layers.0.self_attn.{name}").weight
            weight += first.lora.alpha / first.lora.rank * (b @ a)
    for number, identity in enumerate(["lora-2", "base-1", "lora-1"]):
        gateway.load(number, identity)
        gateway.run()
    gateway.add(1, max_tokens=20)
    gateway.run()
    assert error_to(gateway, 1, reference) < 1e-4
    assert error_to(gateway, 1, tiny_rounded(0)) > 1e-2
    assert [m for m in gateway.controls if m["op"] == "status"][-1]["kind"] == "lora"


def test_a_gateway_that_goes_away_leaves_no_stream(gateway: Gateway) -> None:
    for stream in range(12):
        gateway.add(stream, max_tokens=50)
    gateway.tick()
    gateway.engine.reset()
    assert not gateway.engine.busy
    gateway.add(1)
    gateway.run()
    assert gateway.begun == [*range(8), 1]


def test_max_tokens_zero_reads_the_prompt(gateway: Gateway) -> None:
    gateway.add(1, max_tokens=0, echo=3)
    gateway.run()
    assert gateway.finish == {1: Finish.LENGTH}
    assert len(gateway.prompts[1].logprobs) == 2
