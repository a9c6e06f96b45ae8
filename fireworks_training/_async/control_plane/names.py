"""Names of resources: what an id may be, and the ids in a name."""

from __future__ import annotations

from fireworks_training.config import RESOURCE_ID
from fireworks_training.errors import InvalidArgument


def validate_output_model_id(output_model_id: str) -> None:
    """Refuse an id that a promoted model can't have, before a checkpoint is staged for it.

    Raises:
        InvalidArgument: the id breaks the rule; the message states it.
    """
    if not RESOURCE_ID.fullmatch(output_model_id):
        raise InvalidArgument(
            f"output_model_id={output_model_id!r} is invalid: an id has 1 to 63 characters of a-z, "
            "0-9 and '-', and neither starts nor ends with '-'"
        )


def id_after(name: str, kind: str) -> str | None:
    """Find the id after `kind` in a resource name; None if there is none."""
    parts = name.split("/")
    return parts[parts.index(kind) + 1] if kind in parts[:-1] else None
