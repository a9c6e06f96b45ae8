"""Promotions: operations that make a model of the account from a sampler snapshot.

Knows which checkpoints can become models, and the rows of the models and operations that come of
it. Does not know weights: a process of its own writes them (`local.model.promotion`). A promotion
that a gateway did not see to its end is taken up by the next one: its result appears whole, or not
at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import cast

from fireworks_training.local.gateway.control_plane.checkpoints import find_snapshot
from fireworks_training.local.gateway.control_plane.resource_table import (
    ResourceTable,
    is_tombstone,
)
from fireworks_training.local.gateway.inference.registry import (
    ModelEntry,
    ServingRegistry,
    UnknownModel,
)
from fireworks_training.local.gateway.web.bodies import required_text
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.gateway.web.tasks import RunningTasks
from fireworks_training.local.model.promotion import Order
from fireworks_training.local.settings import MODEL_PREFIX, is_resource_id
from fireworks_training.local.store.database import Body, Database, ResourceRow

log = logging.getLogger(__name__)

RUNNING, DONE, FAILED = "RUNNING", "DONE", "FAILED"
BUDGET_S = 600.0

MakeModel = Callable[[Order], Awaitable[str]]
"""Carries out an order, and returns why it failed, or an empty string."""


class Promotions:
    """Runs promotions, and serves and deletes the models that came of them.

    Attributes:
        operations: the rows of the operations.
        models: the rows of the promoted models; a model that came with the platform has none.

    Args:
        make_model: carries out an order.
    """

    def __init__(
        self, database: Database, registry: ServingRegistry, state_dir: Path, make_model: MakeModel
    ) -> None:
        self.operations = ResourceTable(database, "operation", "operation")
        self.models = ResourceTable(database, "model", "promoted model")
        self._database = database
        self._registry = registry
        self._snapshots_dir = state_dir / "snapshots"
        self._models_dir = state_dir / "models"
        self._make_model = make_model
        self._running = RunningTasks[str]()

    # -- promoting -------------------------------------------------------------------------------

    def start(self, job: str, checkpoint: str, body: Mapping[str, object]) -> ResourceRow:
        """Begin a promotion, and return its operation.

        Args:
            job: id of the trainer job whose checkpoint it is.
            checkpoint: its identity.
            body: `output_model` and `base_model`, in either spelling.

        Raises:
            HttpProblem: 404, 409 or 400; nothing was begun.
        """
        manifest = find_snapshot(job, checkpoint, self._snapshots_dir)
        base = self._base_model(required_text(body, "base_model", "baseModel"), manifest)
        model_id = _output_id(required_text(body, "output_model", "outputModel"))
        self._reserve(model_id, base, manifest)
        number = self._database.next_number("operations")
        row = self.operations.create(
            f"promote-{number}",
            RUNNING,
            f"making {MODEL_PREFIX}{model_id} of {checkpoint}",
            {"model": model_id, "identity": checkpoint, "base": base.name},
        )
        self._begin(row)
        return row

    async def finished(self, id_: str) -> ResourceRow:
        """Wait for the end of an operation, and return it."""
        task = self._running.get(id_)
        if task is not None:
            await asyncio.shield(task)
        return self.operations.get(id_)

    def delete_model(self, id_: str) -> None:
        """Remove a promoted model and its files.

        Raises:
            HttpProblem: 404; 409 while a job or a deployment uses it, or it is being made.
        """
        row, name = self.models.get(id_), f"{MODEL_PREFIX}{id_}"
        rows = [*self._database.rows("job"), *self._database.rows("deployment")]
        users = [user.id for user in rows if _uses(user, name)]
        if users or row.state == "UPLOADING":
            by = f" by {', '.join(users)}" if users else ""
            raise HttpProblem(409, f"model {id_!r} is in use{by}", code="FAILED_PRECONDITION")
        self._registry.models.pop(name, None)
        self.models.forget(id_)
        shutil.rmtree(self._models_dir / id_, ignore_errors=True)

    # -- life cycle ------------------------------------------------------------------------------

    def recover(self) -> None:
        """Serve the models of earlier promotions, and go on with those that were cut off."""
        for row in self.models.rows():
            if row.state == "READY":
                self._serve(row)
        for row in self.operations.rows():
            if row.state == RUNNING:
                self._begin(row)

    async def close(self) -> None:
        """Give up what runs; the next gateway begins it again."""
        await self._running.close()

    def _begin(self, row: ResourceRow) -> None:
        self._running.start(row.id, self._run(row), f"operation {row.id}")

    async def _run(self, row: ResourceRow) -> None:
        id_, base = str(row.body["model"]), self._registry.models.get(str(row.body["base"]))
        try:
            failure = "its base model is not served any more" if base is None else ""
            if base is not None:
                failure = await self._make(id_, str(row.body["identity"]), base)
        except Exception as error:
            log.exception("operation %s", row.id)
            failure = f"{type(error).__name__}: {error}"
        if failure or self.models.find(id_) is None:
            self.models.forget(id_)
            self.operations.change(row.id, state=FAILED, message=failure or "it was deleted")
            log.warning("operation %s failed: %s", row.id, failure)
            return
        self._serve(self.models.change(id_, state="READY"))
        self.operations.change(row.id, state=DONE)

    async def _make(self, id_: str, identity: str, base: ModelEntry) -> str:
        target = self._models_dir / id_
        if (target / "config.json").is_file():
            return ""  # an earlier gateway got so far
        self._models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        order = Order(str(self._snapshots_dir), identity, base.name, str(base.path), str(target))
        try:
            async with asyncio.timeout(BUDGET_S):
                return await self._make_model(order)
        except TimeoutError:
            return f"it was not done within {BUDGET_S:.0f} s"

    def _serve(self, row: ResourceRow) -> None:
        name, path = f"{MODEL_PREFIX}{row.id}", self._models_dir / row.id
        length = cast(int, row.body["contextLength"])
        self._registry.models[name] = ModelEntry(name, path, length)

    def _reserve(self, id_: str, base: ModelEntry, manifest: Body) -> None:
        if f"{MODEL_PREFIX}{id_}" in self._registry.models:
            raise HttpProblem(409, f"model {id_!r} exists already")
        lora = cast("Body | None", manifest.get("lora"))
        body: Body = {
            "contextLength": base.max_context_length,
            "kind": "HF_PEFT_ADDON" if lora else "HF_BASE_MODEL",
        }
        if lora:
            targets = lora.get("target_modules")
            body["peftDetails"] = {
                "baseModel": base.name,
                "r": lora.get("rank"),
                "targetModules": targets,
            }
        self.models.create(id_, "UPLOADING", "", body)

    def _base_model(self, asked: str, manifest: Body) -> ModelEntry:
        try:
            entry, _ = self._registry.find_model(asked)
        except UnknownModel as error:
            raise HttpProblem(400, f"base_model: {error}") from None
        if entry.name != manifest["base_model"]:
            raise HttpProblem(
                400, f"base_model {asked!r}: it was trained from {manifest['base_model']}"
            )
        return entry


def _uses(row: ResourceRow, model: str) -> bool:
    worker = cast(Body, row.body.get("worker") or {})
    used = model in (row.body.get("model"), worker.get("base_model"))
    return used and not is_tombstone(row)


_MODEL_NAME = re.compile(rf"(?:{re.escape(MODEL_PREFIX)})?([^/]*)")


def _output_id(name: str) -> str:
    match = _MODEL_NAME.fullmatch(name)
    if match is None or not is_resource_id(match.group(1)):
        raise HttpProblem(
            400,
            f"output_model {name[:100]!r} must be {MODEL_PREFIX}<id>, the id 1 to 63 of a-z, 0-9"
            " and '-'",
        )
    return match.group(1)


async def run_promotion(order: Order) -> str:
    """Carry out an order as `MakeModel` says, in a process that has torch."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fireworks_training.local.model.promotion",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await process.communicate(order.line())
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode == 0:
        return ""
    try:
        return str(json.loads(out.splitlines()[-1])["error"])
    except (ValueError, IndexError, KeyError, TypeError):
        return f"its process ended with {process.returncode}; see the platform's log"
