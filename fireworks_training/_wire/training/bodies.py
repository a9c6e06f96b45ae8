"""Answers of the trainer data plane other than passes, which are JSON in every dialect.

Nothing here knows of connections, retries or the order of operations; nothing here needs numpy, so
that a service is built without loading it. Passes are in `_wire.dialects`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from fireworks_training.errors import ProtocolError
from fireworks_training.models import Snapshot, SnapshotKind

PassKind = Literal["forward", "forward_backward"]


def decode_snapshot(payload: Mapping[str, Any]) -> Snapshot:
    """What a sampler save wrote; servers that do not tell give the identity alone.

    Raises:
        ProtocolError: there is no path.
    """
    path = payload.get("path")
    if not isinstance(path, str) or not path:
        raise ProtocolError("the trainer saved sampler weights but named no path")
    told = payload.get("snapshot")
    if not isinstance(told, Mapping):
        return Snapshot(path)
    fields = cast(Mapping[str, Any], told)
    return Snapshot(
        identity=str(fields.get("identity", path)),
        kind=cast("SnapshotKind | None", fields.get("kind")),
        predecessor=fields.get("predecessor"),
        bytes=fields.get("bytes"),
        sha256=fields.get("sha256"),
        timings=fields.get("timings"),
    )
