"""The operations of a cloud: which one a request is of, by its method and path.

Pure. What no cloud has (discarding gradients, the tokenizer's files, ...) is none of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["control", "session", "submit", "poll", "heartbeat", "hot_load", "look", "complete"]
"""The groups that meet the same faults.

`control`: jobs, deployments, models and checkpoints. `session`: immediate calls of a trainer.
`submit`: what a trainer puts in its line. `hot_load`: asking for a snapshot; `look`: its status.
"""

SUBMITS = (
    "create_model",
    "forward",
    "forward_backward",
    "optim_step",
    "save_weights",
    "load_weights",
    "save_weights_for_sampler",
    "load_adapter",
    "unload_model",
)
_SESSION_POSTS = ("create_session", "get_info", "telemetry", "client/config")
_SESSION_GETS = ("healthz", "get_server_capabilities", "list_checkpoints")

_ACCOUNT = r"/v1/accounts/[^/]+"
_TRAINER = re.compile(r"/training/v1/rlorTrainerJobs/[^/]+/[^/]+/api/v1/(.+)")
_CONTROL: tuple[tuple[str, str, str], ...] = (
    ("POST", rf"{_ACCOUNT}/rlorTrainerJobs", "create_job"),
    ("POST", rf"{_ACCOUNT}/deployments", "create_deployment"),
    ("PATCH", rf"{_ACCOUNT}/deployments/[^/]+", "patch_deployment"),
    ("POST", rf"{_ACCOUNT}/rlorTrainerJobs/[^/]+:resume", "resume_job"),
    ("POST", rf"{_ACCOUNT}/(rlorTrainerJobs/[^/]+/)?checkpoints/[^/]+:promote", "promote"),
    ("GET", rf"{_ACCOUNT}/models/[^/]+/tokenizer", ""),
    ("GET", r"/v1/accounts(/.*)?", "read"),
    ("DELETE", rf"{_ACCOUNT}/.+", "delete"),
)


@dataclass(frozen=True, slots=True)
class CloudOperation:
    """Names what a request asks for.

    Attributes:
        kind: the group that it belongs to.
        name: the operation; the key of its schema.
    """

    kind: Kind
    name: str


def operation_of(method: str, path: str) -> CloudOperation | None:
    """Return the operation of a request; None where a cloud has none there."""
    if path == "/inference/v1/completions":
        return CloudOperation("complete", "completions") if method == "POST" else None
    if path == "/hot_load/v1/models/hot_load":
        kinds: dict[str, Kind] = {"POST": "hot_load", "GET": "look"}
        return CloudOperation(kinds[method], "hot_load") if method in kinds else None
    if found := _TRAINER.fullmatch(path):
        return _of_trainer(method, found[1])
    for known, pattern, name in _CONTROL:
        if method == known and re.fullmatch(pattern, path):
            return CloudOperation("control", name) if name else None
    return None


def _of_trainer(method: str, name: str) -> CloudOperation | None:
    if method == "GET":
        return CloudOperation("session", name) if name in _SESSION_GETS else None
    if method != "POST":
        return None
    if name in SUBMITS:
        return CloudOperation("submit", name)
    if name in _SESSION_POSTS:
        return CloudOperation("session", name)
    kinds: dict[str, Kind] = {"retrieve_future": "poll", "session_heartbeat": "heartbeat"}
    return CloudOperation(kinds[name], name) if name in kinds else None
