"""The JSON requests of the data plane, field by field as they go out."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from fireworks_training._wire.training import bodies

OPERATIONS: dict[str, tuple[bytes, dict[str, Any]]] = {
    "optim_step": (bodies.optim_step("m", {"beta1": 0.9}, None), {"adam_params": {"beta1": 0.9}}),
    "optim_step, normalised": (
        bodies.optim_step("m", {}, "num_sequences"),
        {"adam_params": {}, "grad_accumulation_normalization": "num_sequences"},
    ),
    "save_weights": (
        bodies.save_weights("m", "a", overwrite=False, ttl_seconds=None),
        {"path": "a", "overwrite": False},
    ),
    "load_weights": (
        bodies.load_weights("m", "a", optimizer=False, access_token=None),
        {"path": "a", "optimizer": False},
    ),
    "load_weights, of others": (
        bodies.load_weights("m", "a", optimizer=True, access_token="t"),
        {"path": "a", "optimizer": True, "weights_access_token": "t"},
    ),
    "load_adapter": (bodies.load_adapter("m", "gs://a"), {"adapter_path": "gs://a"}),
    "save_weights_for_sampler": (
        bodies.save_weights_for_sampler("m", "a", checkpoint_type="delta", export_precision=None),
        {"path": "a", "checkpoint_type": "delta"},
    ),
    "save_weights_for_sampler, to a Tinker server": (
        bodies.save_weights_for_sampler("m", "a", checkpoint_type=None, export_precision=None),
        {"path": "a"},
    ),
    "unload_model": (bodies.unload_model("m"), {}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_names_its_kind_its_model_and_its_place(name: str) -> None:
    body, fields = OPERATIONS[name]
    kind = name.partition(",")[0]
    request = bodies.with_seq_id(kind, body, 7)
    assert request.path == kind
    assert isinstance(request.body, bytes)
    typed = {} if kind == "load_adapter" else {"type": kind}
    assert orjson.loads(request.body) == {**fields, **typed, "model_id": "m", "seq_id": 7}


def test_what_fills_the_place_of_an_operation() -> None:
    discard, failing = bodies.discard_gradients("m", 3), bodies.failing_pass("m", 3)
    place = {"model_id": "m", "seq_id": 3}
    assert isinstance(discard.body, bytes)
    assert isinstance(failing.body, bytes)
    assert (discard.path, orjson.loads(discard.body)) == ("discard_gradients", place)
    nothing = {"data": [], "loss_fn": "cross_entropy"}
    assert failing.path == "forward_backward"
    assert orjson.loads(failing.body) == {**place, "forward_backward_input": nothing}


def test_sessions_and_models() -> None:
    assert bodies.create_session(["a"], {"b": "c"}) == {
        "tags": ["a"],
        "user_metadata": {"b": "c"},
        "sdk_version": bodies.PROTOCOL_VERSION,
        "type": "create_session",
    }
    plain = bodies.create_model("s", "b", {"rank": 8})
    wanted = {"session_id": "s", "base_model": "b", "lora_config": {"rank": 8}}
    wanted["type"] = "create_model"
    assert orjson.loads(bodies.with_model_seq_id(plain, 2)) == {**wanted, "model_seq_id": 2}
    full = bodies.create_model("s", "b", {"rank": 8}, base_only=True, user_metadata={"x": "y"})
    assert orjson.loads(full) == {**wanted, "base_only": True, "user_metadata": {"x": "y"}}
    heartbeat = {"session_id": "s", "type": "session_heartbeat"}
    assert orjson.loads(bodies.heartbeat("s")) == heartbeat
    poll = {"request_id": "r", "allow_metadata_only": False}
    assert orjson.loads(bodies.retrieve_future("r")) == poll
