"""Routes of the Tinker API that this platform refuses, each with its reason and the way around.

A client shows the words of a 400; a missing route would tell its user nothing, and a 5xx would be
tried again for minutes.
"""

from __future__ import annotations

from aiohttp import web
from aiohttp.typedefs import Handler

from fireworks_training.local.gateway.web.bodies import SAMPLING_BYTES, read_bytes
from fireworks_training.local.gateway.web.problems import HttpProblem

_ONE_PROJECT = "this platform has one project and one user"
_OWN_FILES = (
    "the checkpoint's own files are at /api/v1/training_runs/<run>/checkpoints/<id>/archive"
)
_CHECKPOINT = "training_runs/{run}/checkpoints/{kind}/{name}"

REFUSED: dict[tuple[str, str], str] = {
    ("POST", "create_custom_loss"): "losses are not run on this server: forward_backward_custom"
    " runs yours in the client and sends its gradients",
    ("POST", "copy_weights"): f"{_ONE_PROJECT}: use the checkpoint by its path, or keep it for"
    " longer with its ttl",
    ("POST", "save_weights_external"): f"other formats are not written here; {_OWN_FILES}",
    ("GET", f"{_CHECKPOINT}/external_weights_urls"): f"there are none; {_OWN_FILES}",
    ("POST", f"{_CHECKPOINT}/publish"): f"{_ONE_PROJECT}: there is nobody to publish it to",
    ("DELETE", f"{_CHECKPOINT}/publish"): f"{_ONE_PROJECT}: nothing is published",
    ("POST", "join_sampling_session"): "clones choose their numbers themselves here, as the client"
    " config says",
    ("PUT", "sessions/{session}/project"): _ONE_PROJECT,
    ("GET", "sessions/{session}/trace_export"): "traces are not recorded here",
    ("GET", "audit"): f"{_ONE_PROJECT}, and no audit log",
    ("GET", "billing/usage/events"): "nothing is billed here; `fireworks-training usage` counts"
    " tokens and seconds",
    ("GET", "billing/usage/checkpoints/current"): "nothing is billed here",
}


def add_routes(app: web.Application) -> None:
    """Register the routes."""
    for (method, path), reason in REFUSED.items():
        app.router.add_route(method, f"/api/v1/{path}", _refuser(path.rpartition("/")[2], reason))


def _refuser(name: str, reason: str) -> Handler:
    async def refuse(request: web.Request) -> web.Response:
        await read_bytes(request, SAMPLING_BYTES)
        raise HttpProblem(400, f"{name} is not supported here: {reason}", code="UNIMPLEMENTED")

    return refuse
