"""What an answer loses: every field that only this platform has, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from fireworks_training.local.gateway.cloud.answers import RESULT_EXTENSIONS, as_cloud
from fireworks_training.local.gateway.cloud.requests import CloudOperation

POLL = CloudOperation("poll", "retrieve_future")
LOOK = CloudOperation("look", "hot_load")


@pytest.mark.parametrize("name", sorted(RESULT_EXTENSIONS))
def test_a_result_loses_an_extension(name: str) -> None:
    kept = {"model_id": "m", "supports_reinforce": True, "category": "user"}
    assert as_cloud(POLL, 200, {**kept, name: 1}) == (200, kept)


def test_a_poll_without_a_result_ends_with_408() -> None:
    body: dict[str, Any] = {"type": "try_again", "request_id": "r", "queue_state": "active"}
    assert as_cloud(POLL, 200, body) == (408, {"queue_state": "active"})


def test_a_dead_trainer_is_not_found_and_a_lost_result_is_gone() -> None:
    status, body = as_cloud(POLL, 410, {"error": "x", "error_class": "ModelLost"})
    assert status == 404
    assert "ModelLost" not in str(body)
    assert as_cloud(POLL, 410, {"error": "x", "error_class": "Gone"}) == (410, {"error": "x"})


def test_a_status_of_a_hot_load_keeps_the_official_fields() -> None:
    row = {
        "current_snapshot_identity": "a",
        "readiness": True,
        "load": {"slots": 1},
        "loading_state": {"stage": "idle", "target_snapshot_identity": "a", "timings": {}},
        "tensors_sha256": "0",
        "loaded_adapters": [],
    }
    _, shown = as_cloud(LOOK, 200, {"replicas": [row], "long_poll": True})
    assert shown == {
        "replicas": [
            {
                "current_snapshot_identity": "a",
                "readiness": True,
                "loading_state": {"stage": "idle", "target_snapshot_identity": "a"},
                "loaded_adapters": [],
            }
        ]
    }
    assert as_cloud(
        CloudOperation("hot_load", "hot_load"), 200, {"replicas": 1, "long_poll": True}
    ) == (
        200,
        {},
    )


def test_the_control_plane_says_what_it_says() -> None:
    body: dict[str, Any] = {"name": "x", "snapshot": {"kept": True}}
    assert as_cloud(CloudOperation("control", "read"), 200, body) == (200, body)
