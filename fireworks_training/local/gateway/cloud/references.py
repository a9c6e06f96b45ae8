"""Whether what a body names is there: a cloud refuses a name of nothing when it is given.

A deployment that is to load the snapshots of a job, and a job that is to serve from a deployment,
name each other; whichever is made first can't name the other yet.
"""

from __future__ import annotations

from collections.abc import Mapping

from fireworks_training.local.gateway.control_plane.routes import ControlPlane


def missing(plane: ControlPlane, operation: str, body: Mapping[str, object]) -> str | None:
    """Return why a body's reference is refused; None if it names nothing, or what is there."""
    if operation in ("create_deployment", "patch_deployment"):
        return _absent(plane, "hotLoadTrainerJob", body, "trainer job")
    if operation == "create_job":
        return _absent(plane, "hotLoadDeploymentId", body, "deployment")
    return None


def _absent(plane: ControlPlane, field: str, body: Mapping[str, object], what: str) -> str | None:
    name = body.get(field)
    if not isinstance(name, str) or not name:
        return None
    id_ = name.rsplit("/", 1)[-1]
    table = plane.jobs.table if what == "trainer job" else plane.deployments.table
    if any(row.id == id_ for row in table.present()):
        return None
    return f"{field}: there is no {what} {name[:200]!r}; create it first"
