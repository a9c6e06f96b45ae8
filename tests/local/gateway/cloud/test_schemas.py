"""Closed schemas: all that the official client was recorded to send passes; a strange field not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from yarl import URL

from fireworks_training.local.gateway.cloud.requests import CloudOperation, operation_of
from fireworks_training.local.gateway.cloud.schemas import BODIES, NESTED, QUERIES, refusal

RECORDED = Path(__file__).parents[3] / "wire" / "recorded"


def exchanges() -> list[dict[str, Any]]:
    names = ("fireworks-direct", "fireworks-managed")
    return [row for name in names for row in json.loads((RECORDED / f"{name}.json").read_text())]


def recorded() -> list[tuple[CloudOperation, list[str], Any]]:
    found: list[tuple[CloudOperation, list[str], Any]] = []
    for row in exchanges():
        url = URL(row["path"], encoded=True)
        operation = operation_of(row["method"], url.path)
        assert operation is not None, row["path"]
        text = row["request"].get("text", "")
        found.append((operation, list(url.query), json.loads(text) if text else None))
    return found


def test_the_official_clients_traffic_is_taken() -> None:
    seen = recorded()
    assert [refusal(o.name, query, body) for o, query, body in seen] == [None] * len(seen)
    # The control: the recordings have the bodies that the schemas are of.
    names = {operation.name for operation, _, body in seen if body is not None}
    assert len(names & BODIES.keys()) >= 12


@pytest.mark.parametrize("operation", sorted(BODIES))
def test_an_unknown_field_is_named(operation: str) -> None:
    said = refusal(operation, (), {"strange": 1})
    assert said == "Extra inputs are not permitted, field: 'strange'"


@pytest.mark.parametrize(("operation", "outer"), sorted(NESTED))
def test_an_unknown_field_of_an_inner_object_is_named(operation: str, outer: str) -> None:
    assert outer in BODIES[operation]
    said = refusal(operation, (), {outer: {"strange": 1}})
    assert said == f"Extra inputs are not permitted, field: '{outer}.strange'"


@pytest.mark.parametrize("operation", sorted(QUERIES))
def test_an_unknown_parameter_is_named(operation: str) -> None:
    assert refusal(operation, ("strange",), None) is not None
    assert refusal(operation, sorted(QUERIES[operation]), None) is None


@pytest.mark.parametrize(
    ("stop", "taken"), [(["a"], True), ("a", True), (None, True), ([5], False), (["a", 5], False)]
)
def test_stops_are_texts(stop: object, taken: bool) -> None:
    assert (refusal("completions", (), {"stop": stop}) is None) is taken


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "discard_gradients"),
        ("POST", "backward"),
        ("POST", "retrieve_futures"),
        ("POST", "sessions/s/finish"),
        ("DELETE", "forward"),
    ],
)
def test_what_only_this_platform_has_is_no_operation(method: str, path: str) -> None:
    trainer = "/training/v1/rlorTrainerJobs/local/j/api/v1/"
    assert operation_of(method, trainer + path) is None
    assert operation_of("GET", "/v1/accounts/local/models/m/tokenizer") is None
    # The controls.
    assert operation_of("POST", f"{trainer}forward") == CloudOperation("submit", "forward")
    assert operation_of("GET", "/v1/accounts/local/models/m") == CloudOperation("control", "read")
