"""The rows of one kind of resource; answers requests for those that are not there.

Knows the database, tombstones and the words of a 404 and a 409. What a state means, and who may
change it, its owner knows: `TrainerJobs`, `Deployments`, `Promotions`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.store.database import (
    AlreadyExists,
    Body,
    Database,
    ResourceKind,
    ResourceRow,
)


def is_tombstone(row: ResourceRow) -> bool:
    """Return whether a row only keeps the id of a resource that was deleted."""
    return row.state.endswith("DELETED")


class ResourceTable:
    """Stores the resources of one kind.

    Args:
        database: holds the rows.
        kind: the kind.
        noun: what messages call such a resource, "trainer job".
    """

    def __init__(self, database: Database, kind: ResourceKind, noun: str) -> None:
        self._database = database
        self._kind: ResourceKind = kind
        self._noun = noun

    def find(self, id_: str) -> ResourceRow | None:
        """Return a resource or its tombstone; None if there is neither."""
        return self._database.get(self._kind, id_)

    def get(self, id_: str) -> ResourceRow:
        """Return a resource or its tombstone.

        Raises:
            HttpProblem: 404.
        """
        row = self.find(id_)
        if row is None:
            raise HttpProblem(404, f"no {self._noun} {id_!r}")
        return row

    def rows(self) -> list[ResourceRow]:
        """Return all resources, oldest first, tombstones too."""
        return self._database.rows(self._kind)

    def present(self) -> list[ResourceRow]:
        """Return all resources but the deleted, oldest first."""
        return [row for row in self.rows() if not is_tombstone(row)]

    def create(self, id_: str, state: str, message: str, body: Body) -> ResourceRow:
        """Insert a resource.

        Raises:
            HttpProblem: 409 when the id is taken, by a tombstone too.
        """
        row = ResourceRow(self._kind, id_, state, message, body)
        try:
            self._database.create(row)
        except AlreadyExists:
            text = f"{self._noun} {id_!r} exists already ({self.get(id_).state})"
            raise HttpProblem(409, text) from None
        return row

    def change(self, id_: str, **fields: Any) -> ResourceRow:
        """Write some fields of a resource, and return it as it is then.

        Raises:
            HttpProblem: 404.
        """
        return self._database.update(replace(self.get(id_), **fields))

    def forget(self, id_: str) -> None:
        """Remove a resource without a tombstone."""
        self._database.forget(self._kind, id_)
